"""The report of a run: one HTML page without scripts and without network, made from the run folder alone."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from babel_jax import __version__
from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.items import BITS_PER_BYTE
from babel_jax.evaluation.points import point_names, scores_of
from babel_jax.files import write_text
from babel_jax.languages import LANGUAGES
from babel_jax.report.charts import Figure, number, shape
from babel_jax.report.figures import (
    during_figure,
    evaluation_figures,
    expansion_figures,
    goodput_figure,
    language_loss_figure,
    loss_figure,
    mixture_figures,
    suite_note,
)
from babel_jax.report.gate import PARENT_POINT, regression_gate
from babel_jax.report.record import RunRecord, read_run

PAGE = "report.html"


def write_report(run_folder: Path, path: Path, tolerance: float = 0.0) -> dict[str, Any]:
    """Writes the page to `path`; returns {"path", "gate"}, where the gate is the output of `regression_gate`
    (None without a parent).
    """
    record = read_run(run_folder)
    evaluated = [name for name in point_names(record.config) if name in record.points]
    gate = regression_gate(record.points, record.items, evaluated[-1] if evaluated else None, tolerance)
    # Text from the run is escaped; the charts are Markup.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("babel_jax.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("page.html.jinja").render(
        name=_name(run_folder),
        facts=_facts(record),
        tiles=_tiles(record, gate),
        gate=gate,
        languages=LANGUAGES,
        sections=_sections(record),
        samples=record.samples,
        config=(run_folder / "config.toml").read_text(encoding="utf-8"),
        versions=record.summary.get("versions", {}),
        mark=lambda series: Markup(shape(series, 7, 7)),
        version=__version__,
    )
    write_text(path, page)
    return {"path": str(path), "gate": gate}


def _name(run_folder: Path) -> str:
    folder = run_folder.resolve()
    return folder.parent.name if folder.name == "run" else folder.name


def _sections(record: RunRecord) -> list[dict[str, Any]]:
    """The parts of the page with figures: an anchor, a title, a note and the figures."""

    def section(name: str, title: str, figures: list[Figure | None], note: str = "") -> dict[str, Any]:
        return {
            "name": name,
            "title": title,
            "note": note,
            "figures": [figure for figure in figures if figure is not None],
        }

    evaluated = evaluation_figures(record)
    sections = [
        section("bits", "Bits per byte", [figure for figure in evaluated if figure.name == BITS_PER_BYTE]),
        section(
            "tasks",
            "Tasks",
            [figure for figure in evaluated if figure.name != BITS_PER_BYTE],
            suite_note(record),
        ),
        section(
            "training",
            "Expansion and training" if record.plans else "Training",
            [
                *expansion_figures(record),
                loss_figure(record),
                during_figure(record),
                goodput_figure(record),
                language_loss_figure(record),
            ],
        ),
        section("mixture", "Mixture", list(mixture_figures(record))),
    ]
    return [part for part in sections if part["figures"]]


def _facts(record: RunRecord) -> list[str]:
    """The facts about the run in the page's head, a few words each."""
    facts = []
    if record.plans:
        facts.append(f"{record.plans[0][1].depth} → {len(record.plans[-1][1].layers)} layers")
    elif "layers" in record.summary:
        facts.append(f"{record.summary['layers']} layers")
    if "parameters" in record.summary:
        facts.append(f"{number(record.summary['parameters'])} parameters")
    facts.append(f"{len(record.languages)} languages")
    if record.steps:
        facts.append(
            f"{number(sum(step['tokens'] for step in record.steps))} tokens in {number(len(record.steps))} "
            "steps"
        )
    if not record.summary:
        facts.append("under way")
    return facts


def _tiles(record: RunRecord, gate: dict[str, Any] | None) -> list[dict[str, str]]:
    """The most important figures: bits per byte of the last point, and the change since the parent."""
    evaluated = {}
    for name in point_names(record.config):
        if scores := scores_of(record.points.get(name, {}), BITS_PER_BYTE):
            evaluated[name] = scores
    if not evaluated:
        return []
    last = [*evaluated][-1]
    means = class_means(evaluated[last])
    tiles = [
        {
            "label": f"bits per byte, {last}",
            "value": f"{means['all']:.3f}",
            "words": "mean over languages",
            "tone": "",
        }
    ]

    # Without a parent there is no change to show.
    if gate is None:
        return tiles
    before = class_means(evaluated[PARENT_POINT])
    for group, label in (("all", "all languages"), ("high", "high-resource"), ("low", "low-resource")):
        parent, model = before[group], means[group]
        if parent is not None and model is not None:
            change = 100 * (model / parent - 1)
            words = f"{label}: {parent:.3f} → {model:.3f}"
            tone = "good" if change <= 0 else "bad"
            tiles.append(
                {
                    "label": "against the parent",
                    "value": f"{change:+.1f}%".replace("-", "−"),
                    "words": words,
                    "tone": tone,
                }
            )
    return tiles
