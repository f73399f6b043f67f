"""Curves of scored cases and of training, as SVG, and the look of pages that hold them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_curve

from training.metrics import Cases

STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .15em .8em; text-align: left; border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums }
svg, img { max-width: 100%; height: auto }
@page { size: A4 landscape; margin: 12mm }
@media print { body { font-size: 8px; max-width: none; margin: 0 } td, th { padding: .1em .4em } }
</style>"""


def plots(cases: Cases) -> str:
    """Return ROC, precision-recall and reliability of cases of both labels, as SVG."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    roc, recall, reliability = figure.subplots(1, 3)
    false, true, _ = roc_curve(cases.labels, cases.logits)
    roc.plot(false, true)
    roc.plot([0, 1], [0, 1], ":", color="grey")
    roc.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    precision, found, _ = precision_recall_curve(cases.labels, cases.logits)
    recall.plot(found, precision)
    recall.axhline(float(np.mean(cases.labels)), linestyle=":", color="grey")
    recall.set(title="precision and recall", xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    share, told = calibration_curve(
        cases.labels, cases.probabilities, n_bins=10, strategy="quantile"
    )
    reliability.plot(told, share, "o-")
    reliability.plot([0, 1], [0, 1], ":", color="grey")
    reliability.set(title="reliability", xlabel="probability told", ylabel="share positive")
    return as_svg(figure)


def loss_curves(runs: Mapping[str, Sequence[float]]) -> str:
    """Return the training losses of runs by epoch, as SVG."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for name, losses in runs.items():
        axes.plot(range(1, len(losses) + 1), losses, label=name)
    axes.set(xlabel="epoch", ylabel="training loss")
    axes.legend()
    return as_svg(figure)


def as_svg(figure: Figure) -> str:
    """Return a figure as an SVG element, the same for the same figure."""
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "mura-batch"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    drawing = stream.getvalue()
    return drawing[drawing.index("<svg") :]
