"""How weights want their input: a record that travels in their card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Crop = Literal["none", "foreground"]
Fit = Literal["squash", "pad"]
Decode = Literal["full", "reduced"]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How weights want their input; the default is that of the published models.

    Attributes:
        size: side of the square network input, in pixels.
        crop: ``none`` keeps the whole film; ``foreground`` keeps what is brighter than the
            film's background (Otsu's threshold), with a margin.
        fit: ``squash`` resizes the kept region to the square whatever its shape; ``pad``
            widens it to a square first, with black outside the film.
        mean, std: per RGB channel, on a 0–1 scale.
        decode: ``reduced`` lets JPEG and grey JPEG 2000 be decoded at a half, a quarter or an
            eighth of their size, down to a longer side of :attr:`enough`, where the network sees
            most of the film: much faster, and not quite the same pixels.
    """

    size: int = 224
    crop: Crop = "none"
    fit: Fit = "squash"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    decode: Decode = "full"

    @property
    def enough(self) -> int | None:
        """Pixels of a film's longer side that will do, twice the network's; None for all."""
        return 2 * self.size if self.decode == "reduced" else None
