"""The torch network as an OpenVINO graph, in f32 or with int8 convolutions.

OpenVINO's own converter traces the network with ``torch.jit`` (deprecated) and takes many
seconds for each area at every start. A DenseNet needs six operations, so its torch graph is
carried over node by node, in well under a second; the tests hold the result to torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from mura_batch.network import EvidenceNet
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.openvino_runtime import openvino

op = openvino.opset13

Node = Any  # an OpenVINO node or output: the package has no types
Ranges = Mapping[str, float]

_LEVELS = 256  # of an activation in int8; weights have one less, to be symmetric about 0


def openvino_model(
    network: EvidenceNet, spec: Preprocessing, ranges: Ranges = MappingProxyType({})
) -> openvino.Model:
    """Return the graph from uint8 luminance (1, S, S) to logit (1,) and map (1, h, w).

    Args:
        network: on the CPU or not; it is moved there.
        spec: the preprocessing from the weights' card.
        ranges: the largest input, from 0, of each convolution that is to run in int8, by its name;
            see :func:`mura_batch.runtime.quantization.activation_ranges`. All else stays f32.

    Raises:
        NotImplementedError: ``network`` has an operation that a DenseNet does not have: whoever
            adds an architecture is told here, and not by wrong numbers.
    """
    network = network.eval().to("cpu")
    films = op.parameter([1, spec.size, spec.size], np.uint8, name="pixels")
    activations = op.relu(_features(network.features, _normalised(films, spec), ranges))
    weight = network.classifier.weight.detach().numpy()[:, :, None, None]
    evidence = op.convolution(activations, _constant(weight), [1, 1], [0, 0], [0, 0], [1, 1])
    cells = math.prod(evidence.output(0).shape[2:])
    evidence = op.squeeze(evidence, _indices([1]))
    maps = op.divide(evidence, _constant(np.float32(cells)))
    if network.pooling == "mean":
        pooled = op.reduce_sum(maps, _indices([1, 2]))
    else:
        most = op.reduce_max(evidence, _indices([1, 2]), keep_dims=True)  # or exp would overflow
        odds = op.reduce_mean(op.exp(op.subtract(evidence, most)), _indices([1, 2]))
        pooled = op.add(op.squeeze(most, _indices([1, 2])), op.log(odds))
    logits = op.add(pooled, _constant(network.classifier.bias.detach().numpy()))
    return openvino.Model([logits, maps], [films], "evidence")


def _normalised(films: Node, spec: Preprocessing) -> Node:
    """Like :func:`mura_batch.network.normalise`."""
    scaled = op.divide(op.convert(films, np.float32), _constant(np.float32(255)))
    one = op.unsqueeze(scaled, _indices([1]))
    mean, std = (_constant(np.reshape(v, (1, 3, 1, 1))) for v in (spec.mean, spec.std))
    return op.divide(op.subtract(one, mean), std)


def _features(trunk: nn.Module, images: Node, ranges: Ranges) -> Node:
    """Carry ``trunk``'s torch graph over to OpenVINO, node by node."""
    done: dict[fx.Node, Node] = {}
    joined: dict[tuple[fx.Node, ...], Node] = {}
    *nodes, output = fx.symbolic_trace(trunk).graph.nodes
    for node in nodes:
        if node.op == "placeholder":
            done[node] = images
        elif node.op == "call_function" and node.target is torch.cat:
            # Each concatenation goes on from the one before: of separate ones OpenVINO moves the
            # rounding to int8 before each of their parts, which takes four times the memory.
            parts = tuple(node.args[0])
            first = [joined[parts[:-1]]] if parts[:-1] in joined else [done[p] for p in parts[:-1]]
            joined[parts] = done[node] = op.concat([*first, done[parts[-1]]], axis=1)
        elif node.op == "call_module":
            module = trunk.get_submodule(node.target)
            build = _LAYERS.get(type(module))
            if build is None:
                raise NotImplementedError(f"no OpenVINO operation for {type(module).__name__}")
            if node.target in ranges:
                build = partial(_int8_convolution, highest=ranges[node.target])
            done[node] = build(module, done[node.args[0]])
        else:
            raise NotImplementedError(f"no OpenVINO operation for {node.target}")
    return done[output.args[0]]


def _convolution(layer: nn.Conv2d, x: Node) -> Node:
    return _convolved(layer, x, _constant(layer.weight.detach().numpy()))


def _int8_convolution(layer: nn.Conv2d, x: Node, *, highest: float) -> Node:
    """Return a convolution with inputs in 256 steps from 0, and weights in 255 about 0.

    OpenVINO takes such a pair of ``FakeQuantize`` and convolution for one in int8.
    """
    weight = layer.weight.detach().numpy()
    most = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)  # of each output channel
    kernel = _quantised(_constant(weight), -most, most, _LEVELS - 1)
    return _convolved(layer, _quantised(x, 0.0, highest, _LEVELS), kernel)


def _quantised(x: Node, low: Any, high: Any, levels: int) -> Node:
    edges = [_constant(low), _constant(high)]
    return op.fake_quantize(x, *edges, *edges, levels)


def _convolved(layer: nn.Conv2d, x: Node, kernel: Node) -> Node:
    padding = list(layer.padding)
    return op.convolution(x, kernel, list(layer.stride), padding, padding, list(layer.dilation))


def _batch_norm(layer: nn.BatchNorm2d, x: Node) -> Node:
    values = layer.state_dict()
    scale, shift, mean, variance = (
        _constant(values[key].numpy()) for key in ("weight", "bias", "running_mean", "running_var")
    )
    return op.batch_norm_inference(x, scale, shift, mean, variance, layer.eps)


def _max_pool(layer: nn.MaxPool2d, x: Node) -> Node:
    stride, dilation, padding, kernel = (
        [v, v] for v in (layer.stride, layer.dilation, layer.padding, layer.kernel_size)
    )
    return op.max_pool(x, stride, dilation, padding, padding, kernel).output(0)


def _average_pool(layer: nn.AvgPool2d, x: Node) -> Node:
    stride, padding, kernel = ([v, v] for v in (layer.stride, layer.padding, layer.kernel_size))
    return op.avg_pool(x, stride, padding, padding, kernel, exclude_pad=False)


def _relu(_: nn.ReLU, x: Node) -> Node:
    return op.relu(x)


_LAYERS: dict[type[nn.Module], Callable[[Any, Node], Node]] = {
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.ReLU: _relu,
}


def _constant(values: Any) -> Node:
    return op.constant(np.ascontiguousarray(values, dtype=np.float32))


def _indices(values: Any) -> Node:
    return op.constant(values, dtype=np.int32)
