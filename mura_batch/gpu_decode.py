"""Compressed DICOM frames decoded on a GPU, by nvImageCodec's plugin for pydicom."""

from __future__ import annotations

from mura_batch.errors import Misconfigured


def decode_on_gpu() -> None:
    """Let an NVIDIA GPU decode JPEG, JPEG lossless, JPEG 2000 and HTJ2K from now on.

    pydicom asks the plugin first; what it cannot decode goes to the decoders of the CPU.

    Raises:
        Misconfigured: nvImageCodec is not installed, or finds no GPU.
    """
    try:
        from nvidia import nvimgcodec  # noqa: PLC0415 - an option, of which most have nothing
        from nvidia.nvimgcodec.tools.dicom import pydicom_plugin  # noqa: PLC0415 - a part of that option, missing where it is
    except ImportError as exc:
        raise Misconfigured(
            "`gpu_decode` needs nvImageCodec: pip install 'nvidia-nvimgcodec-cu12[all]>=0.8'"
            " (-cu13 for CUDA 13), or set `gpu_decode` to false"
        ) from exc
    try:
        nvimgcodec.Decoder()
    except RuntimeError as exc:
        raise Misconfigured(
            f"`gpu_decode`: nvImageCodec finds no GPU to work on ({exc}): set it to false"
        ) from exc
    pydicom_plugin.register()
