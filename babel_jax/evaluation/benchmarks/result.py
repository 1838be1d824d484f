"""The result of an evaluation and its files, from the scored items of all models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babel_jax.evaluation.benchmarks.page import evaluation_page
from babel_jax.evaluation.benchmarks.tables import as_csv, plot_means, plot_task, report_text, title_of
from babel_jax.evaluation.items import BITS_PER_BYTE, Items, differences, means_of, scores_of
from babel_jax.files import write_text
from babel_jax.model_folders.folder import model_name


def result_of(
    model: str,
    items: dict[str, dict[str, dict[str, list[Items]]]],
    details: dict[str, dict[str, Any]],
    missing: dict[str, list[str]],
) -> dict[str, Any]:
    """Makes the result of `evaluate` from the scored items and other figures (`details`) of all models.
    `model` is compared with the others.
    """
    # Differences are ours minus theirs, over the same items.
    scores = {name: scores_of(tasks) for name, tasks in items.items()}
    changes, others = {}, {}
    for name, tasks in items.items():
        # Every other model is compared with ours, and with no other one.
        if name != model:
            changes[name] = differences(items[model], tasks)
            others[name] = {
                "tasks": scores[name],
                "means": _means(scores[name]),
                "differences": changes[name],
                **details[name],
            }
    fertilities = {}
    for name, figures in details.items():
        if "fertility" in figures:
            fertilities[name] = figures["fertility"]

    # The result names models by path; its tables use short names.
    label = _labels(list(scores))
    summary = report_text(
        _renamed(scores, label),
        _renamed(changes, label),
        missing,
        _notes(model, details, label),
        _renamed(fertilities, label),
    )
    return {
        "model": model,
        "tasks": scores[model],
        "means": _means(scores[model]),
        "task_means": {task: _means({task: by_language}) for task, by_language in scores[model].items()},
        **details[model],
        "missing": missing,
        **({"baselines": others} if others else {}),
        "summary": summary,
    }


def _notes(model: str, details: dict[str, dict[str, Any]], label: dict[str, str]) -> list[str]:
    """Notes on what makes scores doubtful: requests that were cut, and items in the training text."""
    notes = []
    for name, figures in details.items():
        if count := figures.get("truncated"):
            notes.append(
                f"{label[name]}: {count} requests were longer than the model's positions; their beginnings "
                "were cut."
            )
    for task, by_language in details[model].get("contamination", {}).items():
        for code, counts in by_language.items():
            notes.append(
                f"{title_of(task)}, {code}: {counts['overlapping']} of {counts['items']} items share 13 "
                f"tokens in a row with the training windows ({counts['long_enough']} have 13 tokens or more)."
            )
    return notes


def _labels(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model: the name of its folder or run if all names differ, else its path."""
    last = [model_name(Path(model)) for model in models]
    return dict(zip(models, last if len(set(last)) == len(last) else models, strict=True))


def _renamed(by_model: dict[str, Any], label: dict[str, str]) -> dict[str, Any]:
    return {label[model]: value for model, value in by_model.items()}


def _means(scores: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float | None]:
    """The means over the benchmarks. Bits per byte cannot be averaged with them, so they count only if they
    are alone.
    """
    plain = {}
    for task, by_language in scores.items():
        plain[task] = {code: score["score"] for code, score in by_language.items()}
    benchmarks = {task: values for task, values in plain.items() if task != BITS_PER_BYTE}
    return means_of(benchmarks or plain)


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Writes the files of an evaluation."""
    # Our model comes first in every table and plot.
    by_model, differences_of = {result["model"]: result["tasks"]}, {}
    for name, baseline in result.get("baselines", {}).items():
        by_model[name] = baseline["tasks"]
        differences_of[name] = baseline["differences"]
    label = _labels(list(by_model))
    changes = _renamed(differences_of, label)
    scores = _renamed(by_model, label)
    write_text(out / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    write_text(out / "scores.csv", as_csv(scores, changes))
    write_text(out / "tables.md", result["summary"] + "\n")
    write_text(out / "evaluation.html", evaluation_page(scores, changes))
    for task in result["tasks"]:
        plot_task(out / f"{task.replace(':', '-')}.png", task, scores)
    means = _renamed({model: _means(by_task) for model, by_task in by_model.items()}, label)
    is_bits = list(result["tasks"]) == [BITS_PER_BYTE]
    plot_means(out / "means.png", means, "bits per byte" if is_bits else "mean score of the tasks, %")
