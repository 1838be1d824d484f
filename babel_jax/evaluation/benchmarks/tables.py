"""Tables, CSV and plots of scores by task and language, for a model and those it is compared with."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.evaluation.benchmarks.data import BITS_PER_BYTE, SOURCES
from babel_jax.evaluation.items import GROUPS, means_of
from babel_jax.languages import CODES, LANGUAGES, Resource, codes_of
from babel_jax.plots import saved_figure

TITLES = {
    "mmmlu": "MMMLU", "m3exam": "M3Exam", "xcopa": "XCOPA", "mgsm": "MGSM", "xnli": "XNLI",
    "flores200": "Flores-200",
    BITS_PER_BYTE: "bits per byte",
}  # fmt: skip
# Means of the technical report (arXiv 2503.00865, the table of models around 10B), in percent: accuracy, and
# chrF++ for Flores-200.
PUBLISHED = {
    "Babel-9B": dict(zip(SOURCES, (59.4, 61.3, 89.2, 43.4, 71.9, 55.1), strict=True)),
    "Qwen2.5-7B": dict(zip(SOURCES, (56.7, 58.8, 81.1, 41.1, 70.3, 45.5), strict=True)),
}
LABELS = {"all": "mean, all", "high": "mean, high-resource", "low": "mean, low-resource"}

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
    """Markdown: the means of the tasks by model, then a table for each task, and which languages have no
    data. The first model is ours.

    `fertility` are tokens by the byte, by model and language; they stand beside bits per byte.
    """
    tasks = list(next(iter(scores.values())))
    lines: list[str] = []
    if any(task != BITS_PER_BYTE for task in tasks):
        lines += ["# Means by task", "", *overview(scores), ""]
    for task in tasks:
        measure = (
            "bits per byte, lower is better"
            if task == BITS_PER_BYTE
            else "chrF++"
            if task == "flores200"
            else "accuracy, %"
        )
        lines += [
            f"# {TITLES[task]} ({measure})" if task != BITS_PER_BYTE else "# Bits per byte (lower is better)",
            "",
        ]
        lines += [*task_table(task, scores, differences, fertility if task == BITS_PER_BYTE else {}), ""]
        if missing.get(task):
            lines += [f"No data for {', '.join(missing[task])}.", ""]
    return "\n".join([*lines, *notes]).rstrip()


def overview(scores: Scores) -> list[str]:
    """A row for each model and group of languages, and the published means where there are any; a column for
    each benchmark.
    """
    tasks = [task for task in next(iter(scores.values())) if task != BITS_PER_BYTE]
    lines = [
        f"| model | languages | {' | '.join(TITLES[task] for task in tasks)} | mean |",
        "| --- | --- |" + " ---: |" * (len(tasks) + 1),
    ]
    for model, by_task in scores.items():
        plain = {task: _plain(by_task.get(task, {})) for task in tasks}
        for group in GROUPS:
            cells = [_cell(means_of({task: plain[task]})[group], 1) for task in tasks]
            lines.append(
                f"| {model} | {_group_label(group, plain)} | {' | '.join(cells)} | "
                f"{_cell(means_of(plain)[group], 1)} |"
            )
    for model, means in PUBLISHED.items():
        mean = _cell(sum(means.values()) / len(means), 1) if len(tasks) == len(means) else ""
        lines.append(
            f"| {model} (published) | all | {' | '.join(_cell(means[task], 1) for task in tasks)} | {mean} |"
        )
    return lines


def _group_label(group: str, scores: Mapping[str, Mapping[str, float]]) -> str:
    """The group, with the number of its languages where not all languages of the tasks were measured: their
    mean is another figure than the mean over all, and than the published one."""
    own = set(CODES) if group == "all" else set(codes_of(Resource(group)))
    measured = {code for by_language in scores.values() for code in by_language} & own
    covered = {code for task in scores for code in SOURCES[task].configs} & own
    if all(set(SOURCES[task].configs) & own <= by_language.keys() for task, by_language in scores.items()):
        return group
    return f"{group}, {len(measured)} of {len(covered | measured)} languages"


def task_table(
    task: str, scores: Scores, differences: Differences, fertility: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """A row for each language and for the means, a column for each model, ours against each other one with
    its 95% interval, and tokens by the byte."""
    digits = 3 if task == BITS_PER_BYTE else 1
    plain = {model: _plain(by_task.get(task, {})) for model, by_task in scores.items()}
    others = list(differences)
    more = [
        *(f"against {other} [95%]" for other in others),
        *(f"tokens a byte, {model}" for model in fertility),
    ]
    lines = [
        f"| language | class | items | {' | '.join([*plain, *more])} |",
        "| --- | --- | ---: |" + " ---: |" * (len(plain) + len(more)),
    ]
    codes = [code for code in LANGUAGES if any(code in values for values in plain.values())]
    items = next(iter(scores.values()))[task]
    rows: list[tuple[str, str, str, str]] = [
        (
            code,
            f"{LANGUAGES[code].name} ({code})",
            str(LANGUAGES[code].resource),
            str(items[code]["n"]) if code in items else "",
        )
        for code in codes
    ]
    means, mean_fertility = (
        {model: means_of({task: own}) for model, own in values.items()} for values in (plain, fertility)
    )
    rows += [(group, f"**{LABELS[group]}**", "", "") for group in ("high", "low", "all")]
    for key, label, resource, number in rows:
        cells = [
            _cell(means[model][key] if key in LABELS else plain[model].get(key), digits) for model in plain
        ]
        cells += [_difference(differences[other].get(task, {}).get(key), digits) for other in others]
        cells += [
            _cell(mean_fertility[model][key] if key in LABELS else fertility[model].get(key), 3)
            for model in fertility
        ]
        lines.append(f"| {label} | {resource} | {number} | {' | '.join(cells)} |")
    return lines


def as_csv(scores: Scores, differences: Differences) -> str:
    """A row for each task, language and model; ours, the first model, has a row against each other one."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["task", "language", "class", "model", "score", "stderr", "n", "against", "difference", "low", "high"]
    )
    for place, (model, by_task) in enumerate(scores.items()):
        for task, by_language in by_task.items():
            for code, found in by_language.items():
                row = [
                    task,
                    code,
                    LANGUAGES[code].resource,
                    model,
                    found["score"],
                    found["stderr"],
                    found["n"],
                ]
                compared = (
                    [(other, by.get(task, {}).get(code)) for other, by in differences.items()]
                    if place == 0
                    else []
                )
                for other, change in compared or [("", None)]:
                    writer.writerow(
                        [
                            *row,
                            other,
                            *(
                                [change["difference"], change["low"], change["high"]]
                                if change
                                else ["", "", ""]
                            ),
                        ]
                    )
    return out.getvalue()


def plot_task(path: Path, task: str, scores: Scores) -> None:
    """A PNG: bars of the score by language, high-resource languages first, for each model, with the standard
    errors.
    """
    plain = {model: by_task.get(task, {}) for model, by_task in scores.items()}
    found = [code for code in LANGUAGES if any(code in values for values in plain.values())]
    codes = sorted(found, key=lambda code: LANGUAGES[code].resource is Resource.LOW)
    width = 0.8 / len(plain)
    with saved_figure(path, 1, (max(5.0, 2 + 0.5 * len(codes)), 4.5)) as axes:
        for place, (model, values) in enumerate(plain.items()):
            centers = [number + (place - (len(plain) - 1) / 2) * width for number in range(len(codes))]
            heights = [values.get(code, {}).get("score", float("nan")) for code in codes]
            errors = [values.get(code, {}).get("stderr", 0.0) for code in codes]
            axes.bar(
                centers, heights, width, yerr=errors, capsize=2, error_kw={"linewidth": 0.8}, label=model
            )
        names = [
            f"{LANGUAGES[code].name}{' *' if LANGUAGES[code].resource is Resource.LOW else ''}"
            for code in codes
        ]
        axes.set_xticks(range(len(codes)), names, rotation=45, ha="right")
        axes.set_ylabel(
            "bits per byte" if task == BITS_PER_BYTE else "chrF++" if task == "flores200" else "accuracy, %"
        )
        axes.set_title(f"{TITLES[task]} by language (* low-resource)")
        axes.legend()


def plot_means(path: Path, means: Mapping[str, Mapping[str, float | None]], what: str) -> None:
    """A PNG: for high-resource, low-resource and all languages a bar of each model's mean, with its value
    above.
    """
    width = 0.8 / len(means)
    with saved_figure(path, 1, (7.0, 4.5)) as axes:
        for place, (model, values) in enumerate(means.items()):
            found = [
                (number, values[group])
                for number, group in enumerate(("high", "low", "all"))
                if values[group] is not None
            ]
            centers = [number + (place - (len(means) - 1) / 2) * width for number, _ in found]
            axes.bar_label(
                axes.bar(centers, [value for _, value in found], width, label=model), fmt="%.2f", fontsize=8
            )
        axes.set_xticks(range(3), ["high-resource", "low-resource", "all"])
        axes.set_ylabel(what)
        axes.set_title("Means over languages")
        axes.legend()


def _plain(by_language: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {code: found["score"] for code, found in by_language.items()}


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _difference(change: Mapping[str, float | None] | None, digits: int) -> str:
    if change is None:
        return ""
    difference = f"{change['difference']:+.{digits}f}"
    if change["low"] is None or change["high"] is None:
        return f"{difference} [one item]"
    return f"{difference} [{change['low']:+.{digits}f}, {change['high']:+.{digits}f}]"
