"""The report of an ablation: its table, plot and figures, in the folder of the study."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from babel_jax.evaluation.bits_per_byte import class_mean, class_means
from babel_jax.files import write_text
from babel_jax.languages import groups_with_means
from babel_jax.pages.charts import Figure, Table, dots
from babel_jax.pages.document import Section, page_text
from babel_jax.plots import INK, SERIES, saved_figure


def write_ablation(out: Path, result: dict[str, Any], depth: int) -> dict[str, Any]:
    """Writes ablation.md, .json, .png and .html into the folder `out`; returns the result with "out" and
    "summary".

    result: {"model", "new_layers", "tokens", "base": bits per byte by language of the unexpanded model,
    "results": those of each variant and seed}. depth: the layers of the unexpanded model.
    """
    tokens, base, results = result["tokens"], result["base"], result["results"]
    after = f" After {tokens:,} tokens of training; +- is the deviation over seeds." if tokens else ""
    text = "\n".join(
        [
            f"# {result['new_layers']} new layers in {result['model']} ({depth} layers)",
            "",
            f"Held-out bits per byte, unweighted means over languages; lower is better.{after}",
            "",
            ablation_table(base, results),
            "",
            f"Page: {out / 'ablation.html'}. Plot: {out / 'ablation.png'}",
        ]
    )
    _plot(out / "ablation.png", base, results)
    write_text(out / "ablation.html", _page(result, depth))
    write_text(out / "ablation.md", text + "\n")
    write_text(out / "ablation.json", json.dumps(result, indent=2) + "\n")
    return {**result, "out": str(out), "summary": text}


def ablation_table(base: dict[str, float], results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each variant; means over languages and seeds, the change from the base, and the
    standard deviation over seeds.
    """
    groups = [group for group, mean in class_means(base).items() if mean is not None]
    points = _points_of(results)

    # Columns: each point, by group of languages.
    heads = []
    for point in points:
        heads += [f"{point} training, {group}" for group in groups]
    lines = ["| variant | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    whole = [f"{class_means(base)[group]:.3f}" for group in groups]
    lines.append("| the model as it is | " + " | ".join(whole + [""] * (len(heads) - len(groups))) + " |")

    # Rows: the base is known before training only; each variant has the mean and spread over its seeds.
    for variant in dict.fromkeys(result["variant"] for result in results):
        cells = []
        for point in points:
            for group in groups:
                values = _over_seeds(results, variant, point, group)
                # The deviation of the seeds, not of their mean; one seed has none.
                spread = f" +- {values.std(ddof=1):.3f}" if len(values) > 1 else ""
                change = 100 * (values.mean() / class_mean(base, group) - 1)
                cells.append(f"{values.mean():.3f}{spread} ({change:+.1f}%)")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _page(result: dict[str, Any], depth: int) -> str:
    """One HTML page: for each group of languages the means of each variant, before and after training."""
    labels = groups_with_means(result["base"]) or {"all": next(iter(result["base"]))}
    figures = []
    for group, label in labels.items():
        figures.append(_group_figure(group, label, result["base"], result["results"]))
    facts = [f"{depth} layers", f"{result['new_layers']} new", f"{result['tokens']:,} tokens of training"]
    return page_text(
        "ablation of new layers", result["model"], facts, [Section("variants", "Variants", figures)]
    )


def _group_figure(
    group: str, label: str, base: dict[str, float], results: Sequence[dict[str, Any]]
) -> Figure:
    """The means over a group of languages by variant, as a chart and a table."""
    points = _points_of(results)
    # The colours of a run's base and of its trained model.
    series = {point: index for index, point in zip((0, 3), points, strict=False)}
    rows: dict[str, list[float | None]] = {}
    table = [["the model as it is", f"{class_mean(base, group):.3f}", *[""] * (2 * len(points) - 1)]]
    for variant in dict.fromkeys(result["variant"] for result in results):
        # A dot for each point in the chart; mean, spread and change in the table.
        means: list[float | None] = []
        cells = []
        for point in points:
            values = _over_seeds(results, variant, point, group)
            means.append(float(values.mean()))
            spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
            change = 100 * (values.mean() / class_mean(base, group) - 1)
            cells += [f"{values.mean():.3f}{spread}", f"{change:+.1f}%"]
        rows[variant] = means
        table.append([variant, *cells])
    heads = ["Variant"]
    for point in points:
        heads += [f"{point.capitalize()} training", "Change"]
    chart = dots({"Variants": rows}, series, "bits per byte", {"the model as it is": class_mean(base, group)})
    return Figure(
        f"group-{group}",
        f"Bits per byte: {label}",
        "Means over languages and seeds; fewer are better. The dashed line is the model as it is; ± is the "
        "deviation over seeds.",
        [("", "", chart)],
        Table(heads, table),
        series,
        open_table=True,
    )


def _points_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """The points that all results have: a study without tokens has no training."""
    return ["before", "after"] if all("after" in result for result in results) else ["before"]


def _over_seeds(results: Sequence[dict[str, Any]], variant: str, point: str, group: str) -> np.ndarray:
    of_variant = [result for result in results if result["variant"] == variant]
    return np.array([class_mean(result[point], group) for result in of_variant])


def _plot(path: Path, base: dict[str, float], results: Sequence[dict[str, Any]]) -> None:
    """A PNG with a panel for each point: bars of the mean by variant, and a dot for each seed."""
    variants = list(dict.fromkeys(result["variant"] for result in results))
    # Without training there are no figures "after".
    evaluated_points = set().union(*results)
    points = [point for point in ("before", "after") if point in evaluated_points]
    with saved_figure(path, len(points), (10, 1.5 + 3.2 * len(points))) as axes:
        for point, ax in zip(points, np.atleast_1d(axes), strict=True):
            evaluated = [result for result in results if point in result]
            color = SERIES[3] if point == "before" else SERIES[2]
            for number, variant in enumerate(variants):
                values = _over_seeds(evaluated, variant, point, "all")
                ax.barh(number, np.mean(values) if len(values) else np.nan, color=color, alpha=0.6)
                ax.plot(values, [number] * len(values), ".", color=INK, markersize=5)
            ax.axvline(class_mean(base, "all"), color=INK, linestyle="--", linewidth=1)
            ax.set_yticks(range(len(variants)), variants)
            ax.invert_yaxis()
            ax.set_xlabel("bits per byte, mean over languages (dots: seeds; dashed: the model as it is)")
            ax.set_title("Before training" if point == "before" else "After recovery")
            low = min([class_mean(base, "all"), *(class_mean(result[point], "all") for result in evaluated)])
            ax.set_xlim(left=0.9 * low)
