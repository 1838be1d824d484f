"""The figures of a run's steps: losses, bits per byte between steps, learning rate, and gradient norm.

Steps are counted from 1, as in the lines of a run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.items import BITS_PER_BYTE
from babel_jax.evaluation.points import scores_of
from babel_jax.languages import LANGUAGES, in_order
from babel_jax.pages.charts import Curve, Figure, Table, averaged, lines, spark
from babel_jax.report.record import RunRecord

# The number of the first stage's series: base and expanded come before. A stage has the colour of its result.
STAGES = 2


def loss_figure(record: RunRecord) -> Figure | None:
    """Training loss by stage."""
    curves = _by_stage(record.steps, lambda step: step["loss"])
    if not curves:
        return None
    series = {name: index for index, name in enumerate(curves, STAGES)}
    # The mean is drawn over the thin line; the table has six rows for each stage.
    smooth = {name: averaged(curve, 25) for name, curve in curves.items()}
    rows = []
    for name, curve in curves.items():
        few = averaged(curve, 6)
        rows += [[name, f"{step:.0f}", f"{loss:.3f}"] for step, loss in few]
    shown = {name: averaged(curve, 400) for name, curve in curves.items()}
    return Figure(
        "loss",
        "Training loss by stage",
        "Nats per token of each step's batch (thin line), and the running mean. Stages read different "
        "mixtures, so their losses cannot be compared.",
        [("", "", lines(smooth, series, "step", "nats per token", shown))],
        Table(["Stage", "Step (mean of a sixth)", "Loss"], rows),
        series,
    )


def rate_figure(record: RunRecord) -> Figure | None:
    """The learning rate by stage."""
    curves = _by_stage(record.steps, lambda step: step.get("rate"))
    if not curves:
        return None
    series = {name: index for index, name in enumerate(curves, STAGES)}
    rows = []
    for name, curve in curves.items():
        rates = [rate for _, rate in curve]
        rows.append([name, *(f"{rate:.3g}" for rate in (rates[0], max(rates), rates[-1]))])
    # More points than the chart has units of width would only make the page larger.
    shown = {name: averaged(curve, 400) for name, curve in curves.items()}
    return Figure(
        "rate",
        "Learning rate",
        "The rate of each step.",
        [("", "", lines(shown, series, "step", ""))],
        Table(["Stage", "First", "Highest", "Last"], rows),
        series,
    )


def gradient_figure(record: RunRecord) -> Figure | None:
    """The norm of the gradient by stage."""
    curves = _by_stage(record.steps, lambda step: step.get("gradient_norm"))
    if not curves:
        return None
    series = {name: index for index, name in enumerate(curves, STAGES)}
    smooth = {name: averaged(curve, 25) for name, curve in curves.items()}
    shown = {name: averaged(curve, 400) for name, curve in curves.items()}
    rows = []
    for name, curve in curves.items():
        norms = sorted(norm for _, norm in curve)
        rows.append([name, f"{norms[len(norms) // 2]:.3g}", f"{norms[-1]:.3g}"])
    skipped = sum(step.get("skipped") or 0 for step in record.steps)
    return Figure(
        "gradient-norm",
        "Gradient norm",
        "The norm of each step's gradient before clipping (thin line), and the running mean."
        + (f" {skipped} steps were skipped." if skipped else ""),
        [("", "", lines(smooth, series, "step", "", shown))],
        Table(["Stage", "Median", "Highest"], rows),
        series,
    )


def during_figure(record: RunRecord) -> Figure | None:
    """The mean of bits per byte, evaluated between steps."""
    labels = {"all": "all languages", "high": "high-resource", "low": "low-resource"}
    all_curves: dict[str, list[tuple[float, float]]] = {label: [] for label in labels.values()}
    rows = []
    for line in record.during:
        # A group without a score at this step has a gap in its curve, and an empty cell.
        means = class_means(scores_of(line["tasks"], BITS_PER_BYTE))
        cells = [str(line["step"])]
        for group, label in labels.items():
            mean = means[group]
            if mean is not None:
                all_curves[label].append((line["step"], mean))
            cells.append("" if mean is None else f"{mean:.3f}")
        rows.append(cells)

    # One point is no curve.
    curves = {label: curve for label, curve in all_curves.items() if len(curve) > 1}
    if not curves:
        return None
    series = {label: index for index, label in enumerate(curves, STAGES)}
    best = ""
    if record.best:
        best = f" The best is after step {record.best['step']}: {record.best['bits_per_byte']:.3f}."
    return Figure(
        "during",
        "Bits per byte during training",
        f"Means over languages, on held-out text.{best}",
        [("", "", lines(curves, series, "steps", "bits per byte"))],
        Table(["Steps", *labels.values()], rows),
        series,
    )


def language_loss_figure(record: RunRecord) -> Figure | None:
    """Training loss of each language."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for step in record.steps:
        for code, loss in step["loss_by_language"].items():
            if loss is not None and code in LANGUAGES:
                curves.setdefault(code, []).append((step["step"] + 1, loss))

    # One point is no curve.
    drawn = {code: curves[code] for code in in_order(curves) if len(curves[code]) > 1}
    if not drawn:
        return None

    drawings, rows = [], []
    for code, curve in drawn.items():
        # Small charts: thirty means show the course of a curve.
        smooth = averaged(curve, 30)
        note = f"{smooth[0][1]:.2f} → {smooth[-1][1]:.2f}"
        drawings.append((LANGUAGES[code].name, note, spark(smooth)))
        rows.append([LANGUAGES[code].name, *(f"{loss:.2f}" for _, loss in averaged(curve, 5))])
    parts = max(map(len, rows)) - 1
    return Figure(
        "language-loss",
        "Training loss by language",
        "Nats per token over the run, each language on its own scale; above each curve are its first and "
        "its last mean.",
        drawings,
        Table(["Language", *(f"part {part + 1} of {parts}" for part in range(parts))], rows),
    )


def _by_stage(steps: Sequence[Mapping[str, Any]], value: Any) -> dict[str, Curve]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for step in steps:
        if value(step) is not None:
            curves.setdefault(step["stage"], []).append((step["step"] + 1, value(step)))
    return dict(curves)
