"""The plain script that mura-batch is measured against: torch and pytorch-grad-cam, file by file.

    python tests/bench/peer.py FILES_FOLDER OVERLAYS_FOLDER

For each film: read, resize, forward, backward (Grad-CAM), overlay as PNG, probability. It is what
someone who knows both libraries writes in an hour: one model, loaded once, one forward and one
backward pass a film (the logit comes out of the same pass), the bundled weights, pooled as
torchvision pools, their input size, overlays of the same length of side as mura-batch's. It knows
nothing of crops, areas, batches, crashes or databases. Prints one JSON line: images, seconds of
the loop, seconds until the loop.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click
import numpy as np
import pydicom
import torch
from numpy.typing import NDArray
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from safetensors.torch import load_file
from torchvision.models import densenet121
from torchvision.transforms import functional

BUNDLED = Path(__file__).parents[2] / "mura_batch" / "bundled"
LARGEST = 640  # pixels of an overlay's longer side, as mura-batch's


def main() -> None:
    """Loop over the files that are named on the command line."""
    started = time.perf_counter()
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    card = json.loads((BUNDLED / "cards" / "XR_HAND.json").read_text())["preprocessing"]
    model = densenet121(num_classes=1)
    weights = {k: v.float() for k, v in load_file(BUNDLED / "generalist.safetensors").items()}
    model.load_state_dict(weights, strict=False)
    model.eval()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    ready = time.perf_counter()
    with GradCAM(model=model, target_layers=[model.features[-1]]) as cam:
        for number, file in enumerate(files):
            film = read(file)
            pixels = functional.to_tensor(film.resize((card["size"], card["size"])).convert("RGB"))
            batch = functional.normalize(pixels, card["mean"], card["std"])[None]
            heat = cam(input_tensor=batch, targets=None)[0]
            probability = float(torch.sigmoid(cam.outputs.detach())[0, 0])
            overlay(film, heat).save(target / f"{number:05}-{probability:.3f}.png")
    done = time.perf_counter()
    result = {"images": len(files), "seconds": done - ready, "start_s": ready - started}
    click.echo(json.dumps(result))


def read(file: Path) -> Image.Image:
    """Return a film in grey."""
    if file.suffix in {".png", ".jpg"}:
        return Image.open(file).convert("L")
    return Image.fromarray(pydicom.dcmread(file).pixel_array.astype(np.uint8))


def overlay(film: Image.Image, heat: NDArray[np.float32]) -> Image.Image:
    """Return the film under its Grad-CAM."""
    film = film.convert("RGB")
    film = film.reduce(-(-max(film.size) // LARGEST))
    spread = np.asarray(Image.fromarray(heat).resize(film.size, Image.Resampling.BILINEAR))
    picture = show_cam_on_image(np.asarray(film, np.float32) / 255, spread, use_rgb=True)
    return Image.fromarray(picture)


if __name__ == "__main__":
    main()
