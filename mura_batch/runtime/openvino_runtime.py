"""The network on OpenVINO, in f32, on the CPU.

OpenVINO's own converter traces the network with ``torch.jit`` (deprecated) and takes many
seconds for each area at every start. A DenseNet needs six operations, so its torch graph is
carried over node by node, in well under a second; the tests hold the result to torch's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from mura_batch.network import EvidenceNet
from mura_batch.preprocessing import Preprocessing
from mura_batch.runtime.inference import Inference, memory_watched, watched

# `import openvino` would fork this process to tell a vendor's server of the import; without
# this package it goes on in silence.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # Python's own mark for a module that is not there

import openvino  # noqa: E402 - after the line above, or it would send
from openvino import opset13 as op  # noqa: E402 - likewise

Node = Any  # an OpenVINO node or output: the package has no types

# f32 on every CPU (some would choose bf16 by themselves). With the throughput hint OpenVINO makes
# a stream for every one or few cores, and the views of a batch go to them one by one: as fast as
# larger requests, and with its shape fixed a network takes a third of their memory.
SETTINGS: Final = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}

# Memory of a warm network in sizes of its weights (measured, sides of 160 and 224 pixels): it
# packs them for the processor, and each stream has room for one view.
_KEPT = 4


class OpenVinoRuntime:
    """OpenVINO in f32 on the CPU; of the torch network nothing is kept."""

    name: Final = "openvino"
    device: Final = "cpu"

    def __init__(self, network: EvidenceNet, spec: Preprocessing) -> None:
        with memory_watched(0, self.device):
            model = openvino_model(network, spec)
            self._compiled = openvino.Core().compile_model(model, "CPU", SETTINGS)
        self._spare: list[Any] = []  # requests that are not under way
        self.nbytes: Final = _KEPT * sum(t.nbytes for t in network.state_dict().values())

    def infer(self, pixels: NDArray[np.uint8]) -> Iterator[Inference]:
        """Score luminance of shape (N, S, S); see :class:`mura_batch.runtime.Runtime`.

        Every view has a request of its own, all are queued at once, and none calls back into
        Python, so that no stream ever waits for the interpreter.
        """
        requests = []
        with memory_watched(len(pixels), self.device):
            for number in range(len(pixels)):
                spare = self._spare.pop() if self._spare else self._compiled.create_infer_request()
                spare.set_input_tensor(openvino.Tensor(pixels[number : number + 1]))
                spare.start_async()
                requests.append(spare)
        return watched(self._results(requests), len(pixels), self.device)

    def _results(self, requests: list[Any]) -> Iterator[Inference]:
        for request in requests:
            request.wait()
            logits, maps = (request.get_output_tensor(n).data.copy() for n in range(2))
            self._spare.append(request)
            yield Inference(logits, maps)


def openvino_model(network: EvidenceNet, spec: Preprocessing) -> openvino.Model:
    """Return the graph from uint8 luminance (1, S, S) to logit (1,) and map (1, h, w).

    Raises:
        NotImplementedError: ``network`` has an operation that a DenseNet does not have.
    """
    network = network.eval().to("cpu")
    films = op.parameter([1, spec.size, spec.size], np.uint8, name="pixels")
    activations = op.relu(_features(network.features, _normalised(films, spec)))
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


def _features(trunk: nn.Module, images: Node) -> Node:
    """Carry ``trunk``'s torch graph over to OpenVINO, node by node."""
    done: dict[fx.Node, Node] = {}
    for node in fx.symbolic_trace(trunk).graph.nodes:
        if node.op == "placeholder":
            done[node] = images
        elif node.op == "output":
            return done[node.args[0]]
        elif node.op == "call_function" and node.target is torch.cat:
            done[node] = op.concat([done[part] for part in node.args[0]], axis=1)
        elif node.op == "call_module":
            module = trunk.get_submodule(node.target)
            build = _LAYERS.get(type(module))
            if build is None:
                raise NotImplementedError(f"no OpenVINO operation for {type(module).__name__}")
            done[node] = build(module, done[node.args[0]])
        else:
            raise NotImplementedError(f"no OpenVINO operation for {node.target}")
    raise NotImplementedError("a network without an output")


def _convolution(layer: nn.Conv2d, x: Node) -> Node:
    padding = list(layer.padding)
    kernel = _constant(layer.weight.detach().numpy())
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
