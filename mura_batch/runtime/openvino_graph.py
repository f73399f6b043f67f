"""DenseNet-121 as an OpenVINO graph, in f32 or with int8 convolutions, built from its tensors.

OpenVINO's own converter needs torch and the network traced by ``torch.jit`` (deprecated), and takes
many seconds for each area at every start. This takes well under a second; the tests hold the result
to torch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.openvino_runtime import openvino
from mura_batch.tensors import BLOCKS, Weights

op = openvino.opset13

Node = Any  # an OpenVINO node or output: the package has no types
Ranges = Mapping[str, float]

_LEVELS = 256  # of an activation in int8; weights have one less, to be symmetric about 0
_EPSILON = 1e-5  # of batch normalisation, torch's


def openvino_model(
    weights: Weights, spec: Preprocessing, ranges: Ranges = MappingProxyType({})
) -> openvino.Model:
    """Return the graph from uint8 luminance (1, S, S) to logit (1,) and map (1, h, w).

    Args:
        weights: of a network that pools, see :class:`mura_batch.tensors.Weights`.
        spec: the preprocessing from the weights' card.
        ranges: the largest input, from 0, of each convolution that is to run in int8, by its name;
            see :func:`mura_batch.runtime.quantization.activation_ranges`. The first one cannot.
    """
    tensors = weights.tensors
    films = op.parameter([1, spec.size, spec.size], np.uint8, name="pixels")
    activations = op.relu(_Trunk(tensors, ranges).features(films, spec))
    weight = tensors["classifier.weight"][:, :, None, None]
    evidence = op.convolution(activations, _constant(weight), [1, 1], [0, 0], [0, 0], [1, 1])
    cells = math.prod(evidence.output(0).shape[2:])
    evidence = op.squeeze(evidence, _indices([1]))
    maps = op.divide(evidence, _constant(cells))
    if weights.pooling == "mean":
        pooled = op.reduce_sum(maps, _indices([1, 2]))
    else:
        most = op.reduce_max(evidence, _indices([1, 2]), keep_dims=True)  # or exp would overflow
        odds = op.reduce_mean(op.exp(op.subtract(evidence, most)), _indices([1, 2]))
        pooled = op.add(op.squeeze(most, _indices([1, 2])), op.log(odds))
    logits = op.add(pooled, _constant(tensors["classifier.bias"]))
    return openvino.Model([logits, maps], [films], "evidence")


class _Trunk:
    """DenseNet-121 up to its last feature map, as torchvision has it; its names are used here."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], ranges: Ranges) -> None:
        self._tensors = tensors
        self._ranges = ranges

    def features(self, films: Node, spec: Preprocessing) -> Node:
        """Return what the last batch normalisation gives, (1, 1024, h, w)."""
        x = op.relu(self._batch_norm("norm0", self._first(films, spec)))
        x = op.max_pool(x, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
        for block, layers in enumerate(BLOCKS, start=1):
            for layer in range(1, layers + 1):
                at = f"denseblock{block}.denselayer{layer}"
                new = self._convolution(f"{at}.conv1", op.relu(self._batch_norm(f"{at}.norm1", x)))
                new = op.relu(self._batch_norm(f"{at}.norm2", new))
                # Each concatenation goes on from the one before: of separate ones OpenVINO moves
                # the rounding to int8 before each of their parts, which takes four times the
                # memory.
                x = op.concat([x, self._convolution(f"{at}.conv2", new, padding=1)], axis=1)
            if block < len(BLOCKS):
                at = f"transition{block}"
                x = self._convolution(f"{at}.conv", op.relu(self._batch_norm(f"{at}.norm", x)))
                x = op.avg_pool(x, [2, 2], [0, 0], [0, 0], [2, 2], exclude_pad=False)
        return self._batch_norm("norm5", x)

    def _first(self, films: Node, spec: Preprocessing) -> Node:
        """Return the first convolution of the film, normalised to three channels.

        They show the same luminance, so it is convolved once, with the sum of their kernels. What
        their means differ by from a common one adds a map that is the same for all films: a
        constant, but for the edges, beyond which normalised films are 0.
        """
        weight = self._tensors["features.conv0.weight"].astype(np.float64)
        mean, std = (255 * np.reshape(v, (1, 3, 1, 1)) for v in (spec.mean, spec.std))
        common = np.rint(mean.mean())  # in whole steps of luminance, which bf16 can tell apart
        film = op.subtract(op.convert(films, np.float32), _constant(common))
        anywhere = _constant(np.ones((1, 1, spec.size, spec.size)))
        return op.add(
            _wide(op.unsqueeze(film, _indices([1])), weight / std),
            _wide(anywhere, weight * (common - mean) / std),
        )

    def _batch_norm(self, name: str, x: Node) -> Node:
        parts = ("weight", "bias", "running_mean", "running_var")
        values = [_constant(self._tensors[f"features.{name}.{part}"]) for part in parts]
        return op.batch_norm_inference(x, *values, _EPSILON)

    def _convolution(self, name: str, x: Node, *, padding: int = 0) -> Node:
        """Return a convolution; in int8 inputs have 256 steps from 0, and weights 255 about 0.

        OpenVINO takes such a pair of ``FakeQuantize`` and convolution for one in int8.
        """
        weight = self._tensors[f"features.{name}.weight"]
        kernel = _constant(weight)
        if name in self._ranges:
            most = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)  # of each output channel
            kernel = _quantised(kernel, -most, most, _LEVELS - 1)
            x = _quantised(x, 0.0, self._ranges[name], _LEVELS)
        pads = [padding, padding]
        return op.convolution(x, kernel, [1, 1], pads, pads, [1, 1])


def _wide(x: Node, kernel: NDArray[Any]) -> Node:
    """Return the first convolution of three channels that are all ``x``."""
    kernel = kernel.sum(axis=1, keepdims=True)
    return op.convolution(x, _constant(kernel), [2, 2], [3, 3], [3, 3], [1, 1])


def _quantised(x: Node, low: Any, high: Any, levels: int) -> Node:
    edges = [_constant(low), _constant(high)]
    return op.fake_quantize(x, *edges, *edges, levels)


def _constant(values: Any) -> Node:
    return op.constant(np.ascontiguousarray(values, dtype=np.float32))


def _indices(values: Any) -> Node:
    return op.constant(values, dtype=np.int32)
