"""mura-batch: upper-limb radiograph studies in, probabilities and Grad-CAM overlays out.

Research use only, not a medical device. The way of a study through the modules:

    inbox       find, settle, group: what in the drop folder is complete; wakeup: when to look
    custody     claim it by renames that a restart can repeat; later archive or quarantine it
    study       headers of the claimed files → views, content digest
    area        codes, tags, words, folder names → one of seven areas, with the evidence
    radiograph  PNG, JPEG, DICOM → luminance (dicom_file, dicom_pixels, dicom_grey, greyscale,
                gpu_decode; what files may claim: untrusted); network_input: what the
                network sees, by the weights' preprocessing
    scoring     batches across studies, one warm network per set of weights
      network   DenseNet-121: one forward pass → logit and evidence map
      runtime   the network on torch or OpenVINO
      weights   versioned, with cards; import, fetch, activate, roll back
      tensors   what a network computes with: read and checked, without torch
    assessment  views' areas and scores → what is said of the study; outcome: as the ledger keeps it
    overlay     evidence map → picture
    store       the ledger and the results: intake (claims → studies), worklist (what is asked),
                revisions (scores → results), lookup; schema, engine, migrations/
    results     what people read: query, export, status; in SQL text, through reader

``pipeline`` joins these, ``daemon`` gives it threads and a clock, ``cli`` gives it flags.
For notebooks there are the names below.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mura_batch.area import Area as Area
    from mura_batch.inference import ImageScore as ImageScore
    from mura_batch.inference import Model as Model
    from mura_batch.inference import load_model as load_model
    from mura_batch.radiograph import read_luminance as read_luminance

__all__ = ["Area", "ImageScore", "Model", "load_model", "read_luminance"]

_HOMES = {
    "Area": "area",
    "ImageScore": "inference",
    "Model": "inference",
    "load_model": "inference",
    "read_luminance": "radiograph",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``import mura_batch`` stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
