"""What networks compute with: their tensors by name, read and checked without torch.

Torch's import takes seconds and hundreds of megabytes, which OpenVINO does without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from mura_batch.errors import WeightsRefused

Pooling = Literal["mean", "log-sum-exp"]
Shape = tuple[int, ...]

# Of each architecture in a card: how the evidence is pooled into the logit. In the hybrid an
# encoder decides, and nothing is pooled.
POOLINGS: Final[Mapping[str, Pooling | None]] = MappingProxyType(
    {"densenet121": "mean", "densenet121-lse": "log-sum-exp", "densenet121-transformer": None}
)
BLOCKS: Final = (6, 12, 24, 16)  # layers of DenseNet-121's dense blocks
TOKEN_WIDTH: Final = 256  # of the hybrid's encoder
ENCODER_LAYERS: Final = 2  # of the hybrid's encoder

_GROWTH, _BOTTLENECK = 32, 128  # channels that a layer adds, and that it computes them from
_AFFINE = ("weight", "bias")
_COUNTER = "num_batches_tracked"  # of batch normalisation; scoring does not use it
_NAMED = 5  # wrong tensors that a message names; the rest is counted
_STORED: Final = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}  # NumPy has no bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What a network computes with.

    Attributes:
        architecture: a name of ``POOLINGS``.
        tensors: float16 or float32, of the names and shapes that torch gives them.
    """

    architecture: str
    tensors: Mapping[str, NDArray[Any]]

    @property
    def pooling(self) -> Pooling | None:
        """How the evidence is pooled into the logit; None in the hybrid."""
        return POOLINGS[self.architecture]

    @property
    def nbytes(self) -> int:
        """Size of the tensors as float32, in bytes."""
        return sum(4 * tensor.size for tensor in self.tensors.values())


def read(content: bytes, architecture: str) -> Weights:
    """Return the weights that a safetensors file of any float precision holds.

    Raises:
        WeightsRefused: it is no such file, or as for :func:`checked`.
    """
    try:
        stored = {name: _array(**told) for name, told in deserialize(content)}  # type: ignore[no-untyped-call]  # it has no types
    except (SafetensorError, ValueError) as exc:  # the latter: more dimensions than NumPy has
        raise WeightsRefused(f"not a safetensors file: {exc}") from exc
    return checked(stored, architecture)


def _array(dtype: str, shape: list[int], data: bytearray) -> NDArray[Any]:
    """Return a stored tensor; one of no kind of ``_STORED`` as booleans, which are refused."""
    if dtype not in _STORED:
        return np.zeros(shape, np.bool_)
    values = np.frombuffer(data, _STORED[dtype]).reshape(shape)
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        return values.astype(np.float32) if dtype == "F64" else values


def checked(state: Mapping[str, NDArray[Any]], architecture: str) -> Weights:
    """Return the tensors of a network's state as its weights.

    The batch counters of batch normalisation may be left out, and are.

    Raises:
        WeightsRefused: names what is missing, unexpected, of another shape or not a number.
    """

    def refuse(what: str, names: Iterable[str]) -> None:
        if found := sorted(names):
            raise WeightsRefused(_refusal(architecture, what, found))

    expected = shapes(architecture)
    used = {name for name in expected if not name.endswith(_COUNTER)}
    refuse("missing", used - state.keys())
    refuse("unexpected", state.keys() - expected.keys())
    wrong = {name: tensor.shape for name, tensor in state.items() if tensor.shape != expected[name]}
    refuse("of another shape", {f"{n} {own} instead of {expected[n]}" for n, own in wrong.items()})
    tensors = {name: state[name] for name in sorted(used)}
    refuse("no floats of 16, 32 or 64 bits", {n for n, t in tensors.items() if t.dtype.kind != "f"})
    refuse("NaN or infinite", {n for n, t in tensors.items() if not np.isfinite(t).all()})
    spread = {n: t for n, t in tensors.items() if n.endswith("running_var")}
    refuse("negative variances", {n for n, t in spread.items() if (t < 0).any()})
    return Weights(architecture, tensors)


def _refusal(architecture: str, what: str, names: list[str]) -> str:
    """Say what is wrong with the tensors of these ``names``, of which the first few are shown."""
    encoder = "" if POOLINGS[architecture] else " with a Transformer encoder"
    shown = ", ".join(ascii(name[:120])[1:-1] for name in names[:_NAMED])
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"not a DenseNet-121{encoder} with one logit: tensors {what}: {shown}{rest};"
        " give a checkpoint of that network"
    )


@cache
def shapes(architecture: str) -> Mapping[str, Shape]:
    """Return the shape of each tensor of an architecture by its name, batch counters included."""
    found = _trunk() | _linear("classifier", 1024, 1)
    if POOLINGS[architecture] is None:
        found |= _linear("project", 1024, TOKEN_WIDTH) | _linear("classifier", TOKEN_WIDTH, 1)
        for number in range(ENCODER_LAYERS):
            found |= _encoder_layer(f"encoder.layers.{number}")
    return MappingProxyType(found)


def _trunk() -> dict[str, Shape]:
    """Return the shapes of torchvision's DenseNet-121 up to its last feature map."""
    width = 64
    found: dict[str, Shape] = {"features.conv0.weight": (width, 3, 7, 7)}
    found |= _batch_norm("features.norm0", width)
    for block, layers in enumerate(BLOCKS, start=1):
        for layer in range(1, layers + 1):
            at = f"features.denseblock{block}.denselayer{layer}"
            found |= _batch_norm(f"{at}.norm1", width) | _batch_norm(f"{at}.norm2", _BOTTLENECK)
            found[f"{at}.conv1.weight"] = (_BOTTLENECK, width, 1, 1)
            found[f"{at}.conv2.weight"] = (_GROWTH, _BOTTLENECK, 3, 3)
            width += _GROWTH
        if block < len(BLOCKS):
            found |= _batch_norm(f"features.transition{block}.norm", width)
            found[f"features.transition{block}.conv.weight"] = (width // 2, width, 1, 1)
            width //= 2
    return found | _batch_norm("features.norm5", width)


def _encoder_layer(name: str) -> dict[str, Shape]:
    width, inner = TOKEN_WIDTH, 2 * TOKEN_WIDTH
    attention = f"{name}.self_attn"
    return {
        f"{attention}.in_proj_weight": (3 * width, width),
        f"{attention}.in_proj_bias": (3 * width,),
        **_linear(f"{attention}.out_proj", width, width),
        **_linear(f"{name}.linear1", width, inner),
        **_linear(f"{name}.linear2", inner, width),
        **{f"{name}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in _AFFINE},
    }


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _batch_norm(name: str, width: int) -> dict[str, Shape]:
    parts = (*_AFFINE, "running_mean", "running_var")
    return {f"{name}.{_COUNTER}": (), **{f"{name}.{part}": (width,) for part in parts}}
