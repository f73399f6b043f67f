"""Networks in a notebook: load an area's model, score files or arrays, look at the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mura_batch.area import Area
from mura_batch.network_input import Box, Luminance, NetworkInput, prepare
from mura_batch.overlay import Caption, render, thumbnail
from mura_batch.radiograph import read_film
from mura_batch.runtime import Inference, Runtime, load
from mura_batch.scoring import sigmoid
from mura_batch.weights import WeightsStore, load_bundled
from mura_batch.weights_card import Card
from mura_batch.weights_import import load_checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class ImageScore:
    """What a model said of one image.

    Attributes:
        logit: raw output.
        probability: its sigmoid, 0 to 1, of the target that ``Model.card`` names.
        map: float32 (h, w), signed evidence in logit units; its positive part is the Grad-CAM.
        box: the region of the image that the network saw, in pixels of the image as it was read
            (:attr:`mura_batch.preprocessing.Preprocessing.decode`).
    """

    logit: float
    probability: float
    map: NDArray[np.float32]
    box: Box


class Model:
    """One area's network with its card, ready to score; made by :func:`load_model`."""

    def __init__(self, card: Card, runtime: Runtime) -> None:
        self.card = card
        self._runtime = runtime

    def score(
        self, images: Sequence[str | Path | Luminance], *, batch: int = 16
    ) -> list[ImageScore]:
        """Score image files (PNG, JPEG, DICOM) or luminance arrays, uint8 (H, W), bone bright.

        Raises:
            UnreadableImage: a file is not a decodable radiograph.
            ValueError: an array is not uint8 of shape (H, W).
            TypeError: ``images`` is one path and not a list of them.
        """
        if isinstance(images, (str, Path)):
            raise TypeError(f"give a list of images: score([{str(images)!r}])")
        scores = []
        for start in range(0, len(images), batch):
            inputs = [self._film(image)[1] for image in images[start : start + batch]]
            pixels = np.stack([each.pixels for each in inputs])
            result = Inference.joined(self._runtime.infer(pixels))
            scores += [
                ImageScore(float(logit), sigmoid(float(logit)), evidence, each.box)
                for logit, evidence, each in zip(result.logits, result.maps, inputs, strict=True)
            ]
        return scores

    def overlay(self, image: str | Path | Luminance, score: ImageScore) -> Image.Image:
        """Return the picture that the daemon would write: the radiograph under its evidence.

        Raises:
            UnreadableImage, ValueError: as for :meth:`score`.
        """
        picture = thumbnail(self._film(image)[0], score.box)
        return render(picture, score.map, Caption(self.card, score.probability))

    def _film(self, image: str | Path | Luminance) -> tuple[Luminance, NetworkInput]:
        """Return an image and what the network sees of it."""
        spec = self.card.preprocessing
        if not isinstance(image, np.ndarray):
            return read_film(Path(image), 0, spec)
        if image.dtype != np.uint8 or image.ndim != 2 or not image.size:  # noqa: PLR2004 - H, W
            raise ValueError(
                f"an array of {image.dtype} {image.shape} is no luminance: give uint8 (H, W), bone"
                " bright, or the file"
            )
        return image, prepare(image, spec)


def load_model(
    area: Area | str,
    checkpoint: str | Path | None = None,
    *,
    home: str | Path | None = None,
    runtime: str = "auto",
    device: str = "auto",
) -> Model:
    """Return the model of an area: from a checkpoint, else a home's active weights, else bundled.

    Args:
        area: ``XR_ELBOW`` … ``XR_WRIST``.
        checkpoint: a torch checkpoint, or safetensors with its card.
        home: a site's home folder, whose active weights are used.
        runtime: ``auto``, ``torch`` or ``openvino``.
        device: ``auto``, ``cpu``, ``cuda:N`` or ``mps``.

    Raises:
        ValueError: no such area.
        WeightsRefused: the checkpoint does not fit.
        NoWeights: the home has no weights for the area.
        Misconfigured: the runtime or the device is unknown or not on this machine.
    """
    area = Area(area)
    if checkpoint is not None:
        weights, card = load_checkpoint(Path(checkpoint), area)
    elif home is not None:
        store = WeightsStore(Path(home) / "weights")
        card = store.require(area)
        weights = store.load(card)
    else:
        weights, card = load_bundled(area)
    return Model(card, load(weights, card.preprocessing, runtime=runtime, device=device))
