"""Tables and plots of scores by language at several points of the recipe."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.evaluation.bits_per_byte import class_means, common_to
from babel_jax.evaluation.items import BITS_PER_BYTE, FEWEST_ITEMS, Measured, change_between_groups, changes
from babel_jax.evaluation.suite import CHANCE, CHOICE_TASKS, TRANSLATION_TASKS
from babel_jax.languages import LANGUAGES, Resource, groups_with_means, in_order
from babel_jax.plots import saved_figure

# Scores by point and language; results by point, task and language; scored items by point.
Points = Mapping[str, Mapping[str, float]]
PointResults = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
PointItems = Mapping[str, Measured]
Interval = Mapping[str, float | None]

TOO_LITTLE = "not enough text to tell"
_UNKNOWN = "[?]"  # in cells of tables, which have no room for TOO_LITTLE
_CHEAP = 5.0  # percent: an expansion that costs less is said to cost little


def points_table(results: PointResults, items: PointItems) -> str:
    """A Markdown table of bits per byte: a row for each language and each mean; a column for each point, for
    the change from first to last with its 95% interval, and for the held-out text.
    """
    points = bits_of(results)
    names = list(points)
    if not names:
        return "Nothing was measured."
    # The change is from the first point to the last, over the same documents.
    changed = changes_between(items, names[0], names[-1])
    codes = in_order(set[str]().union(*points.values()))
    measured = results[names[-1]][BITS_PER_BYTE]
    lines = [
        "| language | class | " + " | ".join(names) + " | change, % [95%] | documents | bytes |",
        "| --- | --- |" + " ---: |" * (len(names) + 3),
    ]
    for code in codes:
        language = LANGUAGES[code]
        values = [points[name].get(code) for name in names]
        size = measured.get(code, {})
        cells = [*_cells(values, changed.get(code)), f"{size.get('n', 0):,}", _bytes(size.get("bytes"))]
        lines.append(f"| {language.name} ({code}) | {language.resource} | {' | '.join(cells)} |")

    # Means come last.
    common = common_to(points)
    means = [class_means(common[name]) for name in names]
    for group, label in groups_with_means(common[names[-1]]).items():
        cells = _cells([of_point[group] for of_point in means], changed.get(group))
        lines.append(f"| **mean of {label}** | | {' | '.join(cells)} | | |")
    if len(common[names[-1]]) < len(codes):
        lines += ["", "Means are over the languages that all points have."]
    if any(_UNKNOWN in line for line in lines):
        lines += [
            "",
            f"{_UNKNOWN}: {TOO_LITTLE}; an interval needs {FEWEST_ITEMS} documents that were scored.",
        ]
    return "\n".join(lines)


def bits_of(results: PointResults) -> dict[str, dict[str, float]]:
    """Bits per byte by point and language; points without any are left out."""
    points = {}
    for name, of_point in results.items():
        if scores := of_point.get(BITS_PER_BYTE):
            points[name] = {code: score["score"] for code, score in scores.items()}
    return points


def changes_between(items: PointItems, first: str, last: str) -> Mapping[str, Interval]:
    """The changes of bits per byte, in percent, by language and group (see `items.changes`); empty if a point
    has no items.
    """
    if first == last or first not in items or last not in items:
        return {}
    return changes(BITS_PER_BYTE, items[last], items[first])


def percent_text(change: float, interval: Interval | None, unit: str = "%") -> str:
    """A change with its interval: "-3.9% [-4.4, -3.3]"; without one "-3.9% [not enough text to tell]"."""
    if interval is None or interval["low"] is None or interval["high"] is None:
        return f"{change:+.1f}{unit} [{TOO_LITTLE}]"
    return f"{change:+.1f}{unit} [{interval['low']:+.1f}, {interval['high']:+.1f}]"


def _cells(values: Sequence[float | None], interval: Interval | None) -> list[str]:
    """The cells of a row: its values, and the change from the first to the last."""
    first, last = values[0], values[-1]
    change = ""
    if len(values) > 1 and first and last is not None:
        change = percent_text(100 * (last / first - 1), interval).replace(f"[{TOO_LITTLE}]", _UNKNOWN)
    return ["" if value is None else f"{value:.3f}" for value in values] + [change]


def _bytes(size: int | None) -> str:
    return "" if size is None else f"{size:,}"


def findings(results: PointResults, items: PointItems) -> list[str]:
    """The claims of the recipe about the points `base`, `expanded`, the first stage and the last one, each
    with "shown", "NOT shown" or "not enough text to tell".

    A claim is shown if its whole 95% interval (paired bootstrap over held-out documents) agrees with it.
    Empty if a point is missing: base, expanded, or any stage.
    """
    points = bits_of(results)
    points.pop("extended", None)
    if [*points][:2] != ["base", "expanded"] or len(points) < 3:
        return []
    # The recipe's points in order: base, expanded, then the result of each stage.
    recovered, last = [*points][2], [*points][-1]
    mean_changes = _MeanChanges(points, items)
    labels = groups_with_means(points["base"])
    every = labels.get("all", "its one language")
    strong = labels.get("high", "high-resource languages")

    # The recipe's claims, in the order of its stages.
    lines = _claim(
        f"Expansion costs less than {_CHEAP:g}% bits per byte over {every}:",
        mean_changes.of_group("base", "expanded", "all"),
        _CHEAP,
    )
    lines += _claim(
        f"Recovery wins it back where the base was strong: {recovered} against base over {strong}:",
        mean_changes.of_group("base", recovered, "high"),
    )
    lines += _claim(
        f"Low-resource languages gain most: {last} against base, their change minus that of high-resource "
        "ones:",
        mean_changes.of_low_minus_high("base", last),
    )
    # A run of one stage has no stage after its recovery.
    if len(points) > 3:
        lines += _claim(
            f"The last stage helps them most: {last} against {recovered}, their change minus that of "
            "high-resource ones:",
            mean_changes.of_low_minus_high(recovered, last),
        )
    return [*lines, _no_language_is_worse(points, last, changes_between(items, "base", last))]


@dataclasses.dataclass(frozen=True)
class _MeanChanges:
    """Changes of the means of bits per byte between two points, in percent; None if a group has no language.

    Points without items give a change without an interval.
    """

    points: Points
    items: PointItems

    def of_group(self, since: str, until: str, group: str) -> Interval | None:
        """The change of the mean of a group of languages."""
        measured = changes_between(self.items, since, until)
        if group in measured:
            return measured[group]
        # Means are compared over the same languages only.
        common = common_to({name: self.points[name] for name in (since, until)})
        before, after = class_means(common[since])[group], class_means(common[until])[group]
        if before is None or after is None:
            return None
        return {"difference": 100 * (after / before - 1), "low": None, "high": None}

    def of_low_minus_high(self, since: str, until: str) -> Interval | None:
        """The change over low-resource languages minus that over high-resource ones."""
        # The interval of a difference is not the difference of intervals: both are drawn together.
        if since in self.items and until in self.items:
            return change_between_groups(BITS_PER_BYTE, self.items[until], self.items[since], "low", "high")
        low, high = self.of_group(since, until, "low"), self.of_group(since, until, "high")
        if low is None or high is None or low["difference"] is None or high["difference"] is None:
            return None
        return {"difference": low["difference"] - high["difference"], "low": None, "high": None}


def _claim(text: str, interval: Interval | None, below: float = 0.0) -> list[str]:
    """The line of a claim that a change is below a bound; empty if the change is not known."""
    if interval is None or interval["difference"] is None:
        return []
    # The whole interval must agree, so its upper end decides.
    high, verdict = interval["high"], TOO_LITTLE
    if high is not None:
        verdict = "shown" if high < below else "NOT shown"
    return [f"- {verdict}: {text} {percent_text(interval['difference'], interval)}."]


def _no_language_is_worse(points: Points, last: str, changed: Mapping[str, Interval]) -> str:
    """The claim that no language ends worse than it began."""
    # The claim is shown only if the whole interval of every language is at or below zero.
    worse, untold = [], []
    for code, before in points["base"].items():
        if code not in points[last]:
            continue
        interval = changed.get(code)
        change = 100 * (points[last][code] / before - 1)
        if interval is None or interval["low"] is None or interval["high"] is None:
            untold.append(LANGUAGES[code].name)
        elif interval["high"] > 0:
            worse.append(f"{LANGUAGES[code].name} {percent_text(change, interval)}")
    text = "No language ends worse than it began"
    if worse:
        return f"- NOT shown: {text}: {', '.join(worse)}."
    if untold:
        return f"- {TOO_LITTLE}: {text}: {', '.join(untold)}."
    return f"- shown: {text}."


def suite_table(results: PointResults) -> list[str]:
    """Markdown lines: the mean of each task of the offline suite at each point, over groups of languages;
    empty if the suite was not run.
    """
    run = set().union(*results.values())
    tasks = [task for task in (*CHOICE_TASKS, *TRANSLATION_TASKS) if task in run]
    if not tasks:
        return []

    lines = [
        "# Offline suite on held-out text (higher is better)",
        "",
        "| task | mean of | items | " + " | ".join(results) + " |",
    ]
    lines.append("| --- | --- | ---: |" + " ---: |" * len(results))
    for task in tasks:
        lines += _suite_rows(task, [of_point.get(task, {}) for of_point in results.values()])
    return [*lines, ""]


def _suite_rows(task: str, by_point: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The rows of a task, one for each group of languages. by_point: the results by language."""
    name = task.replace("_", " ") + (", accuracy %" if task in CHOICE_TASKS else ", chrF++")
    chance = f" (chance {CHANCE[task]:.0f})" if task in CHANCE else ""
    scores = {}
    for number, by_language in enumerate(by_point):
        scores[str(number)] = {code: value["score"] for code, value in by_language.items()}
    # Points are compared over the languages that all of them have.
    common = list(common_to(scores).values())
    codes = in_order(set[str]().union(*common))
    if not codes:
        return []

    # The number of items is that of the first point that has the task.
    counts = next(by_language for by_language in by_point if by_language)
    labels = groups_with_means(codes) or {"all": LANGUAGES[codes[0]].name}
    rows = []
    for group, label in labels.items():
        cells = []
        for values in common:
            mean = class_means(values)[group]
            cells.append("" if mean is None else f"{mean:.1f}")
        items = sum(counts[code]["n"] for code in codes if _is_in(code, group))
        rows.append(f"| {name}{chance} | {label} | {items} | {' | '.join(cells)} |")
    return rows


def _is_in(code: str, group: str) -> bool:
    return group == "all" or LANGUAGES[code].resource is Resource(group)


def plot_points(path: Path, points: Points, losses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """A PNG: above, bars of the score by language at each point; below, the training loss by step and
    stage.
    """
    codes = in_order(set[str]().union(*points.values()))
    # The bars of a language fill four fifths of its room.
    width = 0.8 / max(1, len(points))
    with saved_figure(path, 2, (13, 8.5)) as (bars, curves):
        for index, (name, values) in enumerate(points.items()):
            # The bars of a language are side by side, centered on its tick.
            offset = (index - (len(points) - 1) / 2) * width
            centers, heights = [], []
            for number, code in enumerate(codes):
                centers.append(number + offset)
                heights.append(values.get(code, float("nan")))
            bars.bar(centers, heights, width, label=name)
        names = []
        for code in codes:
            language = LANGUAGES[code]
            names.append(language.name if language.resource == "high" else f"{language.name} *")
        bars.set_xticks(range(len(codes)), names, rotation=45, ha="right")
        bars.set_ylabel("bits per byte, held out")
        bars.set_title("Bits per byte by language at each point of the recipe (* low-resource)")
        if points:
            bars.legend(ncols=len(points))
        for name, curve in losses.items():
            steps, losses_by_step = zip(*curve, strict=True) if curve else ((), ())
            curves.plot(steps, losses_by_step, label=name, linewidth=1)
        curves.set_xlabel("step of the run")
        curves.set_ylabel("loss, nats per token")
        curves.set_title("Training loss by stage")
        if losses:
            curves.legend()
