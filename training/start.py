"""What a network begins with: nothing, ImageNet, the bundled weights, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import DenseNet121_Weights, densenet121

from mura_batch.area import Area
from mura_batch.config import load as load_settings
from mura_batch.errors import Misconfigured, Transient, WeightsRefused
from mura_batch.network import network_with, weights_of
from mura_batch.weights import Card, WeightsStore, bundled_card, load_bundled, read_card
from mura_batch.weights_card import ARCHITECTURE
from training.run_folder import UNREADABLE, read_settings
from training.settings import FROM_NOTHING, LIMB_FILMS, FitSettings, two_phases

_NO_START = "{!r}: no such file; --start takes nothing, imagenet, bundled, auto, or a file."
_FIXED = {"nothing": FROM_NOTHING, "imagenet": FitSettings()}
WORDS = (*_FIXED, "bundled", "auto")  # what --start takes besides files


def settings_for(start: str) -> FitSettings:
    """Return the settings to train with by default: the whole way from nothing, else two phases.

    Weights keep the preprocessing and the architecture that the card (``FILE.json``) or the run
    beside them states; a trunk goes on to crops of films and whole ones.

    Raises:
        Misconfigured, WeightsRefused: the run or the card beside a file is damaged.
    """
    if start in _FIXED:
        return _FIXED[start]
    if start == "bundled":
        return like(bundled_card(Area.XR_HAND))
    file = Path(start)
    if not file.name:
        raise Misconfigured(_NO_START.format(start))
    if file.with_suffix(".json").is_file():
        return like(read_card(file.with_suffix(".json")))
    if file.with_name("run.json").is_file():
        before = read_settings(file.with_name("run.json"))
        if before.joint:
            return replace(LIMB_FILMS, architecture=before.architecture)
        return like(before)
    return FitSettings()


def obtained(start: str) -> tuple[str, str]:
    """Return what ``auto`` stands for, and why in words: ImageNet where its weights can be had,
    else the bundled ones. Everything else stands for itself.
    """
    if start != "auto":
        return start, ""
    try:
        _imagenet()
    except Transient as exc:
        return "bundled", f"begins with the bundled weights: {exc}"
    return "imagenet", "begins with ImageNet's weights"


def of_the_bundled() -> str:
    """Return what to know before the bundled weights are measured, or what began with them is."""
    learned = bundled_card(Area.XR_HAND).training_data
    return f"the bundled weights learned {learned}: figures on any of these films are too good"


def in_home(home: Path, digest: str) -> tuple[Path, Card]:
    """Return the file and a card of those weights in a home whose digest begins so.

    Raises:
        Misconfigured: there are none, or several.
    """
    store = WeightsStore(load_settings(home, {}).weights_dir)
    card = store.find(None, digest)
    return store.file(card), card


def like(before: Card | FitSettings) -> FitSettings:
    """Return the default settings to go on from weights or a run."""
    return two_phases(before.preprocessing, before.architecture)


def state_of(start: str) -> Mapping[str, Tensor] | None:
    """Return the state that ``start`` names, None for random weights.

    Of ImageNet's weights the classifier is left out: it has a thousand classes.

    Raises:
        Misconfigured: no such file, or it holds another network.
        Transient: ImageNet's weights cannot be downloaded.
    """
    if start == "nothing":
        return None
    if start == "imagenet":
        return _imagenet()
    if start == "bundled":
        return network_with(load_bundled(Area.XR_HAND)[0]).state_dict()
    return _of_file(Path(start))


def shared(own: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors of a start that a network has too, in the same shape."""
    return {n: t for n, t in start.items() if n in own and own[n].shape == t.shape}


def _imagenet() -> Mapping[str, Tensor]:
    try:
        state = densenet121(weights=DenseNet121_Weights.IMAGENET1K_V1).state_dict()
    except (URLError, OSError) as exc:
        raise Transient(
            f"ImageNet's weights cannot be downloaded ({exc}): try again, or --start bundled"
        ) from exc
    return {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}


def _of_file(file: Path) -> Mapping[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError as exc:
        raise Misconfigured(_NO_START.format(str(file))) from exc
    except (*UNREADABLE, SafetensorError) as exc:
        raise Misconfigured(
            f"{file} is no network's state: give one that torch or safetensors wrote."
        ) from exc
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not (named and all(isinstance(tensor, Tensor) for tensor in state.values())):
        raise Misconfigured(f"{file} holds no tensors by name: give a network's state.")
    hybrid = "encoder.layers.0.linear1.weight" in state
    architecture = "densenet121-transformer" if hybrid else ARCHITECTURE
    try:
        return network_with(weights_of(state, architecture)).state_dict()
    except WeightsRefused as exc:
        raise Misconfigured(f"{file} holds another network: {exc}") from exc
