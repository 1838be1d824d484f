"""The report of an ablation: its table, plot and figures, in the folder of the study."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.files import write_text
from babel_jax.plots import saved_figure


def write_ablation(out: Path, result: dict[str, Any], depth: int) -> dict[str, Any]:
    """Writes ablation.md, .json and .png into the folder `out`; returns the result with "out" and "summary".

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
            f"Plot: {out / 'ablation.png'}",
        ]
    )
    _plot(out / "ablation.png", base, results)
    write_text(out / "ablation.md", text + "\n")
    write_text(out / "ablation.json", json.dumps(result, indent=2) + "\n")
    return {**result, "out": str(out), "summary": text}


def ablation_table(base: dict[str, float], results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each variant; means over languages and seeds, the change from the base, and the
    standard deviation over seeds.
    """
    groups = [group for group, mean in class_means(base).items() if mean is not None]
    points = ["before", "after"] if all("after" in result for result in results) else ["before"]

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
                spread = f" +- {values.std(ddof=1):.3f}" if len(values) > 1 else ""
                cells.append(
                    f"{values.mean():.3f}{spread} ({100 * (values.mean() / _mean(base, group) - 1):+.1f}%)"
                )
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _over_seeds(results: Sequence[dict[str, Any]], variant: str, point: str, group: str) -> np.ndarray:
    return np.array([_mean(result[point], group) for result in results if result["variant"] == variant])


def _mean(by_language: dict[str, float], group: str) -> float:
    mean = class_means(by_language)[group]
    return float("nan") if mean is None else mean


def _plot(path: Path, base: dict[str, float], results: Sequence[dict[str, Any]]) -> None:
    """A PNG with a panel for each point: bars of the mean by variant, and a dot for each seed."""
    variants = list(dict.fromkeys(result["variant"] for result in results))
    # Without training there are no figures "after".
    evaluated_points = {point for result in results for point in result}
    points = [point for point in ("before", "after") if point in evaluated_points]
    with saved_figure(path, len(points), (10, 1.5 + 3.2 * len(points))) as axes:
        for point, ax in zip(points, np.atleast_1d(axes), strict=True):
            evaluated = [result for result in results if point in result]
            color = "tab:blue" if point == "before" else "tab:green"
            for number, variant in enumerate(variants):
                values = [_mean(result[point], "all") for result in evaluated if result["variant"] == variant]
                ax.barh(number, np.mean(values) if values else np.nan, color=color, alpha=0.6)
                ax.plot(values, [number] * len(values), "k.", markersize=5)
            ax.axvline(_mean(base, "all"), color="k", linestyle="--", linewidth=1)
            ax.set_yticks(range(len(variants)), variants)
            ax.invert_yaxis()
            ax.set_xlabel("bits per byte, mean over languages (dots: seeds; dashed: the model as it is)")
            ax.set_title("Before training" if point == "before" else "After recovery")
            low = min([_mean(base, "all"), *(_mean(result[point], "all") for result in evaluated)])
            ax.set_xlim(left=0.9 * low)
