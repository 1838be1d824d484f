"""The report of a run: one HTML page without scripts and without network, made from the run folder alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from babel_jax.evaluation.items import BITS_PER_BYTE, FEWEST_ITEMS
from babel_jax.evaluation.tables import percent_text
from babel_jax.files import write_text
from babel_jax.languages import LANGUAGES
from babel_jax.pages.charts import Figure
from babel_jax.pages.document import Section, environment, page_text
from babel_jax.report.curves import (
    during_figure,
    gradient_figure,
    language_loss_figure,
    loss_figure,
    rate_figure,
)
from babel_jax.report.figures import (
    evaluation_figures,
    expansion_figures,
    goodput_figure,
    mixture_figures,
    suite_note,
)
from babel_jax.report.gate import regression_gate
from babel_jax.report.head import facts, next_commands, sources_figure, tiles
from babel_jax.report.record import RunRecord, read_run, run_name

PAGE = "report.html"


def write_report(
    run_folder: Path, path: Path, tolerance: float = 0.0, refresh: int | None = None
) -> dict[str, Any]:
    """Writes the page to `path`; returns {"path", "gate"}, where the gate is the output of `regression_gate`
    (None without a parent).

    refresh: seconds after which a browser loads the page again.
    """
    record = read_run(run_folder)
    # The gate compares the run's last point with its parent; points of other models do not count.
    own = record.own_points
    gate = regression_gate(record.points, record.items, own[-1] if own else None, tolerance)
    sections = [part for part in _sections(record, gate, run_folder) if part.figures or part.body]
    write_text(path, page_text("babel-jax run", run_name(run_folder), facts(record), sections, refresh))
    return {"path": str(path), "gate": gate}


def _part(part: str, **values: Any) -> Markup:
    """HTML of a part of the page; empty if it has no content."""
    template = environment("babel_jax.report").get_template("parts.html.jinja")
    return Markup(template.render(part=part, languages=LANGUAGES, fewest=FEWEST_ITEMS, **values).strip())


def _sections(record: RunRecord, gate: dict[str, Any] | None, run_folder: Path) -> list[Section]:
    """The parts of the page, in order; parts without content are left out by the caller."""

    def percent_of(code: str) -> str:
        assert gate is not None
        return percent_text(gate["changes"][code], gate["intervals"].get(code))

    # What decides comes first: better or worse than the parent, and by how much.
    result_tiles = tiles(record, gate)
    result = _part("gate", gate=gate, tiles=result_tiles, percent_of=percent_of)
    evaluated = evaluation_figures(record)
    curves = [loss_figure, rate_figure, gradient_figure, during_figure, goodput_figure, language_loss_figure]
    training = [*expansion_figures(record), *(figure(record) for figure in curves)]
    sections = [
        Section("result", "Result", tiles=result_tiles, body=result),
        Section("bits", "Bits per byte", [figure for figure in evaluated if figure.name == BITS_PER_BYTE]),
        Section(
            "tasks",
            "Tasks",
            [figure for figure in evaluated if figure.name != BITS_PER_BYTE],
            suite_note(record),
        ),
        Section("training", "Expansion and training" if record.plans else "Training", _present(training)),
        Section(
            "mixture", "Mixture and sources", _present([*mixture_figures(record), sources_figure(record)])
        ),
    ]
    if record.samples:
        samples, note = _samples(record)
        sections.append(Section("samples", "Samples", note=note, body=samples))
    if commands := next_commands(record, run_folder):
        sections.append(Section("next", "Next", body=_part("next", commands=commands)))
    config = (run_folder / "config.toml").read_text(encoding="utf-8")
    settings = _part("settings", config=config, versions=record.summary.get("versions", {}))
    return [*sections, Section("settings", "Settings", body=settings)]


def _samples(record: RunRecord) -> tuple[Markup, str]:
    """The HTML of the samples, with the parent's beside them where there are some, and their note."""
    samples = {}
    for code, sample in record.samples.items():
        parent = record.parent_samples.get(code, {}).get("text")
        samples[code] = {**sample, "parent": parent}
    note = (
        "The beginning of a held-out passage (in grey) and the text that a model writes after it, drawn at "
        "temperature 0.7 from the likeliest 90%."
    )
    return _part("samples", samples=samples, parent_label="parent", model_label="this model"), note


def _present(figures: Sequence[Figure | None]) -> list[Figure]:
    return [figure for figure in figures if figure is not None]
