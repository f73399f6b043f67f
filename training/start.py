"""What a network begins with: nothing, ImageNet, the bundled weights, or a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import DenseNet121_Weights, densenet121

from mura_batch.area import Area
from mura_batch.errors import Misconfigured, Transient
from mura_batch.network import EvidenceNet
from mura_batch.weights import bundled_card, load_bundled
from training.fit import FROM_NOTHING, FitSettings


def settings_for(start: str) -> FitSettings:
    """Return the settings to train with by default: the whole way from nothing, else two phases.

    What begins with the bundled weights keeps their preprocessing.
    """
    if start == "nothing":
        return FROM_NOTHING
    if start == "bundled":
        return FitSettings(preprocessing=bundled_card(Area.XR_HAND).preprocessing)
    return FitSettings()


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
        return load_bundled(Area.XR_HAND)[0].state_dict()
    state = _of_file(Path(start))
    problems = EvidenceNet().load_state_dict(state, strict=False)
    missing = [name for name in problems.missing_keys if "num_batches_tracked" not in name]
    if missing or problems.unexpected_keys:
        names = ", ".join([*missing, *problems.unexpected_keys][:3])
        raise Misconfigured(f"{start} holds another network than DenseNet-121 ({names}, …).")
    return state


def _imagenet() -> Mapping[str, Tensor]:
    try:
        state = densenet121(weights=DenseNet121_Weights.IMAGENET1K_V1).state_dict()
    except (URLError, OSError) as exc:
        raise Transient(
            f"ImageNet's weights cannot be downloaded ({exc}): try again, or --start bundled."
        ) from exc
    return {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}


def _of_file(file: Path) -> Mapping[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return {name: tensor.float() for name, tensor in load_file(file).items()}
        state: Mapping[str, Tensor] = torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError as exc:
        raise Misconfigured(
            f"{file}: no such file; --start takes nothing, imagenet, bundled, or a file."
        ) from exc
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as exc:
        raise Misconfigured(
            f"{file} is no network's state: give one that torch or safetensors wrote."
        ) from exc
    return state
