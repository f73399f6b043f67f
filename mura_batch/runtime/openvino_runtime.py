"""The network on OpenVINO, in f32 or int8, on the CPU."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mura_batch.runtime.inference import Inference, Precision, memory_watched, watched

# `import openvino` would fork this process to tell a vendor's server of the import; without
# this package it goes on in silence.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # Python's own mark for a module that is not there

import openvino  # noqa: E402 - after the line above, or it would send

__all__ = ["OpenVinoRuntime", "openvino", "settings_of"]


def settings_of(precision: Precision) -> dict[str, str]:
    """Return with what OpenVINO compiles a graph for some CPU.

    With the throughput hint it makes a stream for every one or few cores, and the views of a batch
    go to them one by one: as fast as larger requests, and with its shape fixed a network takes a
    third of their memory. Where a CPU has bf16, it would compute all that is not int8 in it unless
    told otherwise.
    """
    rest = "bf16" if precision == "int8+bf16" else "f32"
    return {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": rest}


class OpenVinoRuntime:
    """A compiled graph on the CPU.

    Args:
        compiled: made with the :func:`settings_of` the precision.
        nbytes: see :class:`mura_batch.runtime.Runtime`.
    """

    name: Final = "openvino"
    device: Final = "cpu"

    def __init__(self, compiled: openvino.CompiledModel, precision: Precision, nbytes: int) -> None:
        self.precision: Final = precision
        self.nbytes: Final = nbytes
        self._compiled = compiled
        self._spare: list[Any] = []  # requests that are not under way

    def exported(self) -> bytes:
        """Return what :meth:`openvino.Core.import_model` makes the compiled graph from again."""
        stream = io.BytesIO()
        self._compiled.export_model(stream)
        return stream.getvalue()

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
