"""Tables, CSV and plots of scores by task and language, for a model and the models that it is compared
with.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.evaluation.benchmarks.datasets import DATASETS, REPORTED, of_babel
from babel_jax.evaluation.items import BITS_PER_BYTE, GROUPS, means_of
from babel_jax.languages import (
    LANGUAGES,
    Resource,
    groups_with_means,
    in_order,
    is_of,
)
from babel_jax.plots import saved_figure

TITLES = {
    "mmmlu": "MMMLU", "m3exam": "M3Exam", "xcopa": "XCOPA", "mgsm": "MGSM", "xnli": "XNLI",
    "flores200": "Flores-200", "belebele": "Belebele", "sib200": "SIB-200", "global_mmlu": "Global-MMLU",
    "include": "INCLUDE", "mmlu_prox": "MMLU-ProX",
    BITS_PER_BYTE: "bits per byte",
}  # fmt: skip
# Means of the technical report (arXiv 2503.00865, table of models of about 10B): accuracy in percent, and
# chrF++ for Flores-200.
PUBLISHED = {
    "Babel-9B": dict(zip(REPORTED, (59.4, 61.3, 89.2, 43.4, 71.9, 55.1), strict=True)),
    "Qwen2.5-7B": dict(zip(REPORTED, (56.7, 58.8, 81.1, 41.1, 70.3, 45.5), strict=True)),
}
TOO_FEW = "too few items"

# {model: {task: {language: {score, stderr, n}}}}, and {model: {task: {language or group: {difference, low,
# high, n}}}}
Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
Differences = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float | None]]]]


def report_text(
    scores: Scores,
    differences: Differences,
    missing: Mapping[str, Sequence[str]],
    notes: Sequence[str],
    fertility: Mapping[str, Mapping[str, float]],
) -> str:
    """Markdown: the means of the tasks by model, then a table for each task, and the languages without data.
    The first model is ours.

    fertility: tokens per byte, by model and language; shown beside bits per byte.
    """
    tasks = list(next(iter(scores.values())))
    lines: list[str] = []
    if any(task != BITS_PER_BYTE for task in tasks):
        lines += ["# Means by task", "", *overview(scores), ""]
    for task in tasks:
        is_bits = task == BITS_PER_BYTE
        title = "Bits per byte (lower is better)" if is_bits else f"{title_of(task)} ({metric_label(task)})"
        table = task_table(task, scores, differences, fertility if is_bits else {})
        lines += [f"# {title}", "", *table, ""]
        if missing.get(task):
            lines += [f"No data for {', '.join(missing[task])}.", ""]
    return "\n".join([*lines, *notes]).rstrip()


def title_of(task: str) -> str:
    """The name of a task for readers; a task of the harness keeps its own."""
    return TITLES.get(task, task)


def metric_label(task: str) -> str:
    """The metric of a task for titles and axes."""
    if task == BITS_PER_BYTE:
        return "bits per byte"
    return "chrF++" if task == "flores200" else "accuracy, %"


def overview(scores: Scores) -> list[str]:
    """A row for each model and group of languages, and for the number of items; a column for each benchmark.

    A published mean is shown if our mean is over the same languages: all of the benchmark.
    """
    tasks = [task for task in next(iter(scores.values())) if task != BITS_PER_BYTE]
    lines = [
        f"| model | mean over | {' | '.join(title_of(task) for task in tasks)} | mean |",
        "| --- | --- |" + " ---: |" * (len(tasks) + 1),
    ]
    for model, by_task in scores.items():
        plain = {task: _plain(by_task.get(task, {})) for task in tasks}
        for group, label in _group_labels(plain).items():
            # The mean of each task over its languages, then the mean over tasks.
            cells = []
            for task in tasks:
                cells.append(_cell(means_of({task: plain[task]})[group], 1))
            cells.append(_cell(means_of(plain)[group], 1))
            lines.append(f"| {model} | {label} | {' | '.join(cells)} |")
    ours = next(iter(scores.values()))
    counts = []
    for task in tasks:
        items = sum(score["n"] for score in ours[task].values())
        counts.append(f"{items:,}")
    lines.append(f"| items | | {' | '.join(counts)} | |")

    # The published means are over Babel's languages, no others.
    reported = [task for task in tasks if task in REPORTED]
    complete = [task for task in reported if set(of_babel(task)) == ours[task].keys()]
    lines += _published_rows(tasks, complete)
    if len(complete) < len(reported):
        lines += ["", _NOT_PUBLISHED]
    return lines


def _published_rows(tasks: Sequence[str], complete: Sequence[str]) -> list[str]:
    """The rows of the published means; they are shown for the tasks in `complete`."""
    if not complete:
        return []
    rows = []
    for model, means in PUBLISHED.items():
        # Means over different tasks cannot be compared.
        is_whole = len(complete) == len(means) == len(tasks)
        mean = _cell(sum(means.values()) / len(means), 1) if is_whole else ""
        cells = [_cell(means[task], 1) if task in complete else "" for task in tasks]
        rows.append(f"| {model} (published) | all | {' | '.join(cells)} | {mean} |")
    return rows


_NOT_PUBLISHED = (
    "The published means of Babel-9B and Qwen2.5-7B (arXiv 2503.00865) are over all languages of a "
    "benchmark; they are shown for benchmarks that were evaluated in all of them."
)


def _group_labels(scores: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """{group: label} of the groups that have scores, once for each set of languages. The label has the number
    of languages if some of the benchmarks' were not evaluated: their mean is not that over all.
    """
    labels: dict[str, str] = {}
    every = set[str]().union(*scores.values())
    for group in GROUPS:
        evaluated, covered = set[str](), set[str]()
        is_complete = True
        for task, by_language in scores.items():
            of_task = set(_of_group(_languages_of(task, by_language), group))
            evaluated |= set(_of_group(by_language, group))
            covered |= of_task
            is_complete = is_complete and of_task == set(_of_group(by_language, group))
        # A group with the same languages as all would repeat the row of all.
        if not evaluated or (group != "all" and evaluated == every):
            continue
        kind = "" if group == "all" else f"{group}-resource "
        if is_complete:
            labels[group] = group
        elif len(evaluated) == 1:
            labels[group] = f"{LANGUAGES[min(evaluated)].name} alone"
        else:
            labels[group] = f"{len(evaluated)} of {len(covered | evaluated)} {kind}languages"
    return labels


def _languages_of(task: str, evaluated: Iterable[str]) -> Iterable[str]:
    """The languages of Babel's 25 that a benchmark has; the evaluated ones for a task of the harness."""
    return of_babel(task) if task in DATASETS else evaluated


def _of_group(codes: Iterable[str], group: str) -> list[str]:
    return [code for code in codes if group == "all" or is_of(code, Resource(group))]


def task_table(
    task: str, scores: Scores, differences: Differences, fertility: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """A row for each language and for the means; columns: each model, ours minus each other model with its
    95% interval, and tokens per byte.
    """
    # Bits per byte are near 1, other scores from 0 to 100.
    digits = 3 if task == BITS_PER_BYTE else 1
    plain = {model: _plain(by_task.get(task, {})) for model, by_task in scores.items()}
    others = list(differences)
    more = [f"against {other} [95%]" for other in others]
    more += [f"tokens a byte, {model}" for model in fertility]
    lines = [
        f"| language | class | items | {' | '.join([*plain, *more])} |",
        "| --- | --- | ---: |" + " ---: |" * (len(plain) + len(more)),
    ]
    codes = in_order(set[str]().union(*plain.values()))
    items = next(iter(scores.values()))[task]
    rows: list[tuple[str, str, str, str]] = []
    for code in codes:
        number = str(items[code]["n"]) if code in items else ""
        rows.append((code, f"{LANGUAGES[code].name} ({code})", str(LANGUAGES[code].resource), number))
    # Rows of means have no number of items: it differs from language to language.
    for group, label in groups_with_means(codes).items():
        rows.append((group, f"**mean of {label}**", "", ""))

    values = [_with_means(task, by_language) for by_language in plain.values()]
    changes = [differences[other].get(task, {}) for other in others]
    fertilities = [_with_means(task, by_language) for by_language in fertility.values()]
    for key, label, resource, number in rows:
        cells = [_cell(of_model.get(key), digits) for of_model in values]
        cells += [_difference(of_other.get(key), digits) for of_other in changes]
        cells += [_cell(of_model.get(key), 3) for of_model in fertilities]
        lines.append(f"| {label} | {resource} | {number} | {' | '.join(cells)} |")
    return lines


def _with_means(task: str, by_language: Mapping[str, float]) -> dict[str, float | None]:
    """Values by language and, below the names of the groups, their means: all rows are made in one way."""
    return {**by_language, **means_of({task: by_language})}


def as_csv(scores: Scores, differences: Differences) -> str:
    """A row for each task, language and model; ours, the first model, has a row for each other model."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["task", "language", "class", "model", "score", "stderr", "n", "against", "difference", "low", "high"]
    )
    for number, (model, by_task) in enumerate(scores.items()):
        for task, by_language in by_task.items():
            for code, score in by_language.items():
                figures = [score["score"], score["stderr"], score["n"]]
                row = [task, code, LANGUAGES[code].resource, model, *figures]
                # Only ours is compared with the others.
                if number != 0 or not differences:
                    writer.writerow([*row, "", "", "", ""])
                    continue
                for other, changes in differences.items():
                    change = changes.get(task, {}).get(code)
                    bounds = [change["difference"], change["low"], change["high"]] if change else ["", "", ""]
                    writer.writerow([*row, other, *bounds])
    return out.getvalue()


def plot_task(path: Path, task: str, scores: Scores) -> None:
    """A PNG: for each model, bars of the score by language with standard errors; high-resource languages come
    first.
    """
    plain = {model: by_task.get(task, {}) for model, by_task in scores.items()}
    codes = in_order(set[str]().union(*plain.values()))
    codes.sort(key=lambda code: LANGUAGES[code].resource is Resource.LOW)
    width = 0.8 / len(plain)
    with saved_figure(path, 1, (max(5.0, 2 + 0.5 * len(codes)), 4.5)) as axes:
        for index, (model, values) in enumerate(plain.items()):
            # The bars of a language are side by side, centered on its tick.
            offset = (index - (len(plain) - 1) / 2) * width
            centers, heights, errors = [], [], []
            for number, code in enumerate(codes):
                score = values.get(code, {})
                centers.append(number + offset)
                heights.append(score.get("score", float("nan")))
                errors.append(score.get("stderr") or 0.0)
            axes.bar(
                centers, heights, width, yerr=errors, capsize=2, error_kw={"linewidth": 0.8}, label=model
            )
        names = []
        for code in codes:
            language = LANGUAGES[code]
            names.append(language.name + (" *" if language.resource is Resource.LOW else ""))
        axes.set_xticks(range(len(codes)), names, rotation=45, ha="right")
        axes.set_ylabel(metric_label(task))
        axes.set_title(f"{title_of(task)} by language (* low-resource)")
        axes.legend()


def plot_means(path: Path, means: Mapping[str, Mapping[str, float | None]], what: str) -> None:
    """A PNG: for high-resource, low-resource and all languages, a bar with its value for the mean of each
    model.
    """
    width = 0.8 / len(means)
    with saved_figure(path, 1, (7.0, 4.5)) as axes:
        for index, (model, values) in enumerate(means.items()):
            centers, heights = [], []
            for number, group in enumerate(("high", "low", "all")):
                if values[group] is not None:
                    centers.append(number + (index - (len(means) - 1) / 2) * width)
                    heights.append(values[group])
            axes.bar_label(axes.bar(centers, heights, width, label=model), fmt="%.2f", fontsize=8)
        axes.set_xticks(range(3), ["high-resource", "low-resource", "all"])
        axes.set_ylabel(what)
        axes.set_title("Means over languages")
        axes.legend()


def _plain(by_language: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {code: score["score"] for code, score in by_language.items()}


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _difference(change: Mapping[str, float | None] | None, digits: int) -> str:
    if change is None:
        return ""
    difference = f"{change['difference']:+.{digits}f}"
    if change["low"] is None or change["high"] is None:
        return f"{difference} [{TOO_FEW}]"
    return f"{difference} [{change['low']:+.{digits}f}, {change['high']:+.{digits}f}]"
