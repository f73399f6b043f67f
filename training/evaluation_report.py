"""An evaluation as files: JSON and CSV for programs, HTML with plots for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import jinja2

from mura_batch.atomic import write_atomic
from mura_batch.config import NOTICE
from training.evaluate import Evaluation, Findings
from training.localisation import LEVEL
from training.plots import STYLE, plots
from training.settings import CELL

_COLUMNS = ("area", "level", "stratum", "count", "positive", "figure", "value", "low", "high")


def write_report(folder: Path, found: Findings, about: Mapping[str, str | None]) -> None:
    """Write ``evaluation.json``, ``evaluation.csv``, ``films.csv`` and ``report.html``.

    ``about`` says what was measured on; it goes into the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "notice": NOTICE,
        **about,
        "weights": {area: card.sha256 for area, card in found.cards.items()},
        "evaluations": [asdict(evaluation) for evaluation in found.evaluations],
    }
    _write(folder / "evaluation.json", json.dumps(told, indent=1))
    _write(folder / "evaluation.csv", _csv(_COLUMNS, _rows(found.evaluations)))
    films = [
        (f.where, f.name, f.study, f.patient, f.area, f.label, one.logit)
        for one in found.scores
        for f in (one.film,)
    ]
    names = ("where", "film", "study", "patient", "area", "label", "logit")
    _write(folder / "films.csv", _csv(names, films))
    _write(folder / "report.html", _html(found))


def _rows(evaluations: Sequence[Evaluation]) -> list[tuple[object, ...]]:
    return [
        (e.area, e.level, e.stratum, e.count, e.positive, name, told.value, told.low, told.high)
        for e in evaluations
        for name, told in e.figures.items()
    ]


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    stream = io.StringIO()
    table = csv.writer(stream)
    table.writerow(columns)
    table.writerows(rows)
    return stream.getvalue()


def _html(found: Findings) -> str:
    drawn = {a: plots(c) for a, c in found.studies.items() if len(set(c.labels.tolist())) > 1}
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    areas = list(dict.fromkeys(e.area for e in found.evaluations))
    return page.render(
        style=STYLE, notice=NOTICE, found=found, plots=drawn, areas=areas, cell=CELL, level=LEVEL
    )


def _write(file: Path, text: str) -> None:
    write_atomic(file, lambda stream: stream.write(text.encode()))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Evaluation</title>
{{ style | safe }}
<h1>Evaluation</h1>
<p><strong>{{ notice }}</strong></p>
<table><tr><th>area</th><th>weights</th><th>target</th><th>trained on</th></tr>
{% for area, card in found.cards.items() %}
<tr><td>{{ area }}</td><td>{{ card.short }}</td><td>{{ card.target }}</td>
<td>{{ card.training_data }}</td></tr>
{% endfor %}</table>
<p>Intervals are 95 % percentile bootstraps over patients. A dash stands where a figure does not
exist, such as an area under the curve of one label. The expected calibration error (ece)
grows with fewer distinct cases, so that its interval lies above it. Of evidence, on the network's
own grid (a cell is {{ cell }} pixels of its input): <em>hit</em> is how often the cell with most of
it touches a box, <em>chance</em> how often a random one would, <em>energy</em> the share of
positive evidence that lies inside, <em>overlap</em> the intersection over union with what has at
least {{ "%.0f" | format(100 * level) }} % of the most.</p>
{% for area in areas %}
<h2>{{ area }}</h2>
{% if area in plots %}{{ plots[area] | safe }}{% endif %}
{% for e in found.evaluations if e.area == area %}
<h3>{{ e.level }} level, {{ e.stratum }}: {{ e.count }}, {{ e.positive }} positive</h3>
<table>{% for name, told in e.figures.items() %}
<tr><td>{{ name.replace("_", " ") }}</td>
{% if told.value is none %}<td class="n">-</td><td></td>
{% else %}<td class="n">{{ "%.3f" | format(told.value) }}</td>
<td>{{ "%.3f" | format(told.low) }} to {{ "%.3f" | format(told.high) }}</td>{% endif %}</tr>
{% endfor %}</table>
{% endfor %}{% endfor %}
</html>
"""
