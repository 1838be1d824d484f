"""The summary of a finished run: a table, a plot and summary.json."""

import json
from pathlib import Path

from babel_jax.config import Config, ModelConfig
from babel_jax.evaluation.bits_per_byte import class_means, common_to
from babel_jax.evaluation.items import BITS_PER_BYTE
from babel_jax.evaluation.points import point_names, read_items, read_points, scores_of
from babel_jax.evaluation.tables import findings, plot_points, points_table, suite_table
from babel_jax.files import write_text
from babel_jax.model.decoder import count_parameters
from babel_jax.report.page import PAGE
from babel_jax.report.record import versions
from babel_jax.run_files import Best, StepLine, read_as, read_lines
from babel_jax.training.goodput import goodput_of
from babel_jax.training.watch import BEST


def summarize(
    config: Config, run_folder: Path, model_config: ModelConfig, export_difference: float | None
) -> None:
    """Writes summary.md, summary.png and summary.json of a run whose points are all evaluated."""
    results, best = read_points(run_folder, point_names(config)), run_folder / "evaluation" / BEST
    items = read_items(run_folder, point_names(config))
    points = {name: scores_of(tasks, BITS_PER_BYTE) for name, tasks in results.items()}

    # The training loss by stage, for the plot.
    losses: dict[str, list[tuple[int, float]]] = {stage.name: [] for stage in config.stages}
    for line in read_lines(run_folder / "metrics.jsonl", StepLine):
        if line["stage"] in losses and line["loss"] is not None:
            losses[line["stage"]].append((line["step"], line["loss"]))
    goodput = goodput_of(run_folder / "goodput.json")
    text = "\n".join(
        [
            "# Bits per byte on held-out text, by language (lower is better)",
            "",
            points_table(results, items),
            "",
            *findings(results, items),
            "",
            *suite_table(results),
            (
                f"{count_parameters(model_config):,} parameters in {model_config.num_hidden_layers} "
                f"layers. Model: {run_folder / 'hf'}"
            ),
            f"Plot: {run_folder / 'summary.png'}. Report: {run_folder / PAGE}",
            *_goodput_line(goodput),
        ]
    )
    # Only a run that was asked to compare has this figure.
    if export_difference is not None:
        text += (
            f"\nThe exported model ({config.export_dtype}), read again, gives logits that differ by at most "
            f"{export_difference:.1e}."
        )

    plot_points(run_folder / "summary.png", points, losses)
    write_text(run_folder / "summary.md", text + "\n")
    result = {
        "out": str(run_folder),
        "hf": str(run_folder / "hf"),
        "layers": model_config.num_hidden_layers,
        "parameters": count_parameters(model_config),
        "bits_per_byte": points,
        "means": {name: class_means(values) for name, values in common_to(points).items()},
        "tasks": results,
        **({"best": read_as(best, Best)} if best.is_file() else {}),
        "report": str(run_folder / PAGE),
        "versions": versions(),
        **({} if goodput is None else {"goodput": goodput}),
        **({} if export_difference is None else {"export_difference": export_difference}),
        "summary": text,
    }
    write_text(run_folder / "summary.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _goodput_line(parts: dict[str, float] | None) -> list[str]:
    """The goodput and the largest other parts, as a line of the summary; no line if it is unknown."""
    if parts is None:
        return []
    largest_first = sorted(parts.items(), key=lambda item: -item[1])
    rest = []
    for name, part in largest_first:
        # Smaller parts would be shown as 0.0%.
        if name != "step" and part >= 0.001:
            rest.append(f"{name} {part:.1%}")
    return [f"Goodput {parts['step']:.1%} of the wall time of training; the rest: {', '.join(rest)}."]
