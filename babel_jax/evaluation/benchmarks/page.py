"""The page of an evaluation: for each task the scores of all models by language, with the difference of ours
from each other model.
"""

from typing import Any

from babel_jax.evaluation.benchmarks.tables import Differences, Scores, metric_label, title_of
from babel_jax.evaluation.items import BITS_PER_BYTE, means_of
from babel_jax.languages import LANGUAGES, groups_with_means, in_order
from babel_jax.pages.charts import Figure, Table, dots
from babel_jax.pages.document import Section, page_text


def evaluation_page(scores: Scores, differences: Differences) -> str:
    """One HTML page; the first model of `scores` is ours."""
    models = list(scores)
    figures = [_task_figure(task, scores, differences) for task in scores[models[0]]]
    facts = [f"against {', '.join(models[1:])}"] if len(models) > 1 else []
    facts.append(f"{len(figures)} task{'s' if len(figures) != 1 else ''}")
    return page_text("evaluation", models[0], facts, [Section("tasks", "Tasks", figures)])


def _task_figure(task: str, scores: Scores, differences: Differences) -> Figure:
    plain: list[dict[str, float]] = []
    for by_task in scores.values():
        by_language = by_task.get(task, {})
        plain.append({code: score["score"] for code, score in by_language.items()})
    codes = in_order(set[str]().union(*plain))
    means = [means_of({task: values}) for values in plain]
    is_bits = task == BITS_PER_BYTE
    digits = 3 if is_bits else 1

    groups: dict[str, dict[str, list[float | None]]] = {}
    rows: list[list[str]] = []
    tones: dict[int, str] = {}
    items = next(iter(scores.values()))[task]

    def add(title: str, label: str, key: str, values: list[float | None], count: str) -> None:
        groups.setdefault(title, {})[label] = values
        changes = [of_model.get(task, {}).get(key) for of_model in differences.values()]
        tone = "mean" if title == "Means" else ""
        if any(change is not None and _is_worse(change, is_bits) for change in changes):
            tone = f"{tone} bad".strip()
        if tone:
            tones[len(rows)] = tone
        cells = ["" if value is None else f"{value:.{digits}f}" for value in values]
        rows.append([label, *(_text(change, digits) for change in changes), *cells, count])

    for group, label in groups_with_means(codes).items():
        short = label.removesuffix(" languages").removesuffix("-resource")
        add("Means", short, group, [of_model[group] for of_model in means], "")
    for code in codes:
        language = LANGUAGES[code]
        title = f"{language.resource.capitalize()}-resource"
        count = f"{items[code]['n']:,}" if code in items else ""
        add(title, language.name, code, [values.get(code) for values in plain], count)

    better = "fewer are better" if is_bits else "more is better"
    sentence = f"By language; {better}."
    if differences:
        sentence += (
            " Differences of ours with their 95% intervals; a row is red if ours is worse with all of it."
        )
    series = {model: index for index, model in enumerate(scores)}
    # Ours has the colour of a trained model.
    series[next(iter(scores))] = 3
    heads = ["Language", *(f"Against {other} [95%]" for other in differences), *scores, "Items"]
    return Figure(
        task,
        "Bits per byte" if is_bits else title_of(task),
        sentence,
        [("", "", dots(groups, series, metric_label(task), {}))],
        Table(heads, rows, tones),
        series,
        open_table=True,
    )


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
