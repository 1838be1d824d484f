"""Tables and plots of scores by language at several points of the recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.suite import CHANCE, CHOICE_TASKS, TRANSLATION_TASKS
from babel_jax.languages import LANGUAGES, in_order
from babel_jax.plots import saved_figure

Points = Mapping[str, Mapping[str, float]]


def points_table(points: Points) -> str:
    """A Markdown table: a row for each language and each mean, a column for each point, and the change from
    first to last.
    """
    names = list(points)
    if not names:
        return "Nothing was measured."
    codes = in_order(code for values in points.values() for code in values)
    rows: list[tuple[str, str, list[float | None]]] = []
    for code in codes:
        language = LANGUAGES[code]
        rows.append(
            (f"{language.name} ({code})", language.resource, [points[name].get(code) for name in names])
        )

    # Means come last.
    means = [class_means(points[name]) for name in names]
    labels = {"high": "mean, high-resource", "low": "mean, low-resource", "all": "mean, all"}
    for group, label in labels.items():
        rows.append((f"**{label}**", "", [of_point[group] for of_point in means]))

    lines = [
        "| language | class | " + " | ".join(names) + " | change |",
        "| --- | --- |" + " ---: |" * (len(names) + 1),
    ]
    for label, resource, values in rows:
        first, last = values[0], values[-1]
        change = "" if first is None or last is None else f"{100 * (last / first - 1):+.1f}%"
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {label} | {resource} | " + " | ".join(cells) + f" | {change} |")
    return "\n".join(lines)


def findings(points: Points) -> list[str]:
    """The claims of the recipe about the points `base`, `expanded`, the first stage and the last one, each
    with "shown" or "NOT shown".

    Empty if a point is missing: base, expanded, or any stage.
    """
    if [*points][:2] != ["base", "expanded"] or len(points) < 3 or not points["base"]:
        return []
    recovered, last = [*points][2], [*points][-1]
    means = {name: class_means(values) for name, values in points.items()}

    def change(since: str, until: str, group: str) -> float:
        first, second = means[since][group], means[until][group]
        return float("nan") if first is None or second is None else 100 * (second / first - 1)

    lines = []

    def claim(is_shown: bool, text: str) -> None:
        lines.append(f"- {'shown' if is_shown else 'NOT shown'}: {text}")

    # The recipe's claims, in the order of its stages.
    cost, recovery = change("base", "expanded", "all"), change("base", recovered, "high")
    claim(cost < 5, f"Expansion costs little: {cost:+.1f}% bits per byte over all languages.")
    claim(
        recovery <= 0,
        f"Recovery wins it back where the base was strong: {recovered} {recovery:+.1f}% against base over "
        "high-resource languages.",
    )
    low, high = change("base", last, "low"), change("base", last, "high")
    claim(
        low < high,
        f"Low-resource languages gain most: {last} {low:+.1f}% against base, high-resource {high:+.1f}%.",
    )
    if len(points) > 3:
        low, high = change(recovered, last, "low"), change(recovered, last, "high")
        claim(
            low < high,
            f"The last stage helps them most: low-resource {low:+.1f}% against {recovered}, "
            f"high-resource {high:+.1f}%.",
        )
    worse = []
    for code, value in points["base"].items():
        if points[last][code] > value:
            worse.append(f"{LANGUAGES[code].name} {100 * (points[last][code] / value - 1):+.1f}%")
    claim(not worse, f"No language ends worse than it began: {', '.join(worse) or 'none'}.")
    return lines


def suite_table(results: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> list[str]:
    """Markdown lines: the mean of each task of the offline suite at each point, for both resource classes;
    empty if the suite was not run.
    """
    run = set().union(*results.values())
    tasks = [task for task in (*CHOICE_TASKS, *TRANSLATION_TASKS) if task in run]
    if not tasks:
        return []

    lines = [
        "# Offline suite on held-out text (higher is better)",
        "",
        "| task | class | items | " + " | ".join(results) + " |",
    ]
    lines.append("| --- | --- | ---: |" + " ---: |" * len(results))
    for task in tasks:
        name = task.replace("_", " ") + (", accuracy %" if task in CHOICE_TASKS else ", chrF++")
        chance = f" (chance {CHANCE[task]:.0f})" if task in CHANCE else ""
        means = []
        items = None  # the number of items, from the first point that has the task
        for of_point in results.values():
            values = of_point.get(task, {})
            means.append(class_means({code: value["score"] for code, value in values.items()}))
            if items is None and task in of_point:
                items = sum(value["n"] for value in values.values())
        for group in ("high", "low", "all"):
            group_means = [of_point[group] for of_point in means]
            cells = ["" if mean is None else f"{mean:.1f}" for mean in group_means]
            number = items if group == "all" else ""
            lines.append(f"| {name}{chance} | {group} | {number} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot_points(path: Path, points: Points, losses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """A PNG: above, bars of the score by language at each point; below, the training loss by step and
    stage.
    """
    codes = in_order(code for values in points.values() for code in values)
    width = 0.8 / max(1, len(points))
    with saved_figure(path, 2, (13, 8.5)) as (bars, curves):
        for index, (name, values) in enumerate(points.items()):
            # The bars of a language are side by side, centered on its tick.
            offset = (index - (len(points) - 1) / 2) * width
            centers = [number + offset for number in range(len(codes))]
            bars.bar(centers, [values.get(code, float("nan")) for code in codes], width, label=name)
        languages = [LANGUAGES[code] for code in codes]
        names = [f"{language.name}{'' if language.resource == 'high' else ' *'}" for language in languages]
        bars.set_xticks(range(len(codes)), names, rotation=45, ha="right")
        bars.set_ylabel("bits per byte, held out")
        bars.set_title("Bits per byte by language at each point of the recipe (* low-resource)")
        if points:
            bars.legend(ncols=len(points))
        for name, curve in losses.items():
            curves.plot([step for step, _ in curve], [loss for _, loss in curve], label=name, linewidth=1)
        curves.set_xlabel("step of the run")
        curves.set_ylabel("loss, nats per token")
        curves.set_title("Training loss by stage")
        if losses:
            curves.legend()
