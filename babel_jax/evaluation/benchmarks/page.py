"""The page of an evaluation: for each task the scores of all models by language, with the difference of ours
from each other model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from babel_jax.evaluation.benchmarks.tables import Differences, Scores, metric_label, title_of
from babel_jax.evaluation.items import BITS_PER_BYTE, means_of
from babel_jax.languages import LANGUAGES, groups_with_means, in_order
from babel_jax.pages.charts import Figure, Table, dots
from babel_jax.pages.document import Section, page_text

_MEANS = "Means"


def evaluation_page(scores: Scores, differences: Differences) -> str:
    """One HTML page; the first model of `scores` is ours."""
    models = list(scores)
    figures = [_task_figure(task, scores, differences) for task in scores[models[0]]]
    facts = [f"against {', '.join(models[1:])}"] if len(models) > 1 else []
    facts.append(f"{len(figures)} task{'s' if len(figures) != 1 else ''}")
    return page_text("evaluation", models[0], facts, [Section("tasks", "Tasks", figures)])


class _Row(NamedTuple):
    """A row of a task: its group in the chart, its label, its key in the differences, the values by model,
    and the number of items as text.
    """

    group: str
    label: str
    key: str
    values: list[float | None]
    items: str


def _task_figure(task: str, scores: Scores, differences: Differences) -> Figure:
    is_bits = task == BITS_PER_BYTE
    task_rows = _task_rows(task, scores)
    groups: dict[str, dict[str, list[float | None]]] = {}
    for row in task_rows:
        groups.setdefault(row.group, {})[row.label] = row.values

    better = "fewer are better" if is_bits else "more is better"
    sentence = f"By language; {better}."
    if differences:
        sentence += (
            " Differences of ours with their 95% intervals; a row is red if ours is worse with all of it."
        )
    series = {model: index for index, model in enumerate(scores)}
    # Ours has the colour of a trained model.
    series[next(iter(scores))] = 3
    return Figure(
        task,
        "Bits per byte" if is_bits else title_of(task),
        sentence,
        [("", "", dots(groups, series, metric_label(task), {}))],
        _task_table(task, task_rows, list(scores), differences),
        series,
        open_table=True,
    )


def _task_rows(task: str, scores: Scores) -> list[_Row]:
    """The means, then the languages."""
    plain: list[dict[str, float]] = []
    for by_task in scores.values():
        by_language = by_task.get(task, {})
        plain.append({code: score["score"] for code, score in by_language.items()})
    codes = in_order(set[str]().union(*plain))
    means = [means_of({task: values}) for values in plain]
    rows = []
    for group, label in groups_with_means(codes).items():
        short = label.removesuffix(" languages").removesuffix("-resource")
        rows.append(_Row(_MEANS, short, group, [of_model[group] for of_model in means], ""))
    items = next(iter(scores.values()))[task]
    for code in codes:
        language = LANGUAGES[code]
        title = f"{language.resource.capitalize()}-resource"
        count = f"{items[code]['n']:,}" if code in items else ""
        rows.append(_Row(title, language.name, code, [values.get(code) for values in plain], count))
    return rows


def _task_table(
    task: str, task_rows: Sequence[_Row], models: Sequence[str], differences: Differences
) -> Table:
    """The differences come before the scores: a phone shows the first columns."""
    is_bits = task == BITS_PER_BYTE
    digits = 3 if is_bits else 1
    rows: list[list[str]] = []
    tones: dict[int, str] = {}
    for number, row in enumerate(task_rows):
        is_worse = False
        cells = [row.label]
        # One comparison in which ours is worse marks the whole row.
        for of_model in differences.values():
            change = of_model.get(task, {}).get(row.key)
            is_worse = is_worse or (change is not None and _is_worse(change, is_bits))
            cells.append(_text(change, digits))
        for value in row.values:
            cells.append("" if value is None else f"{value:.{digits}f}")
        rows.append([*cells, row.items])
        tone = "mean" if row.group == _MEANS else ""
        if is_worse:
            tone = f"{tone} bad".strip()
        if tone:
            tones[number] = tone
    heads = ["Language", *(f"Against {other} [95%]" for other in differences), *models, "Items"]
    return Table(heads, rows, tones)


def _is_worse(change: Any, is_bits: bool) -> bool:
    if change["low"] is None or change["high"] is None:
        return False
    return bool(change["low"] > 0 if is_bits else change["high"] < 0)


def _text(change: Any, digits: int) -> str:
    if change is None:
        return ""
    if change["low"] is None or change["high"] is None:
        return f"{change['difference']:+.{digits}f} [?]"
    return f"{change['difference']:+.{digits}f} [{change['low']:+.{digits}f}, {change['high']:+.{digits}f}]"
