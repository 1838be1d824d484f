"""Tables and plots of a measure by language at several points of the recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.suite import CHANCE, CHOICE_TASKS, TRANSLATION_TASKS
from babel_jax.languages import LANGUAGES
from babel_jax.plots import saved_figure

Points = Mapping[str, Mapping[str, float]]


def points_table(points: Points) -> str:
    """Markdown: a row for each language and for the means, a column for each point, and the change from the
    first point to the last.
    """
    names = list(points)
    if not names:
        return "Nothing was measured."
    codes = [code for code in LANGUAGES if any(code in values for values in points.values())]
    rows: list[tuple[str, str, dict[str, float | None]]] = [
        (
            f"{LANGUAGES[code].name} ({code})",
            LANGUAGES[code].resource,
            {name: points[name].get(code) for name in names},
        )
        for code in codes
    ]
    means = {name: class_means(points[name]) for name in names}
    labels = {"high": "mean, high-resource", "low": "mean, low-resource", "all": "mean, all"}
    rows += [
        (f"**{label}**", "", {name: means[name][group] for name in names}) for group, label in labels.items()
    ]
    lines = [
        "| language | class | " + " | ".join(names) + " | change |",
        "| --- | --- |" + " ---: |" * (len(names) + 1),
    ]
    for label, resource, values in rows:
        first, last = values[names[0]], values[names[-1]]
        change = "" if first is None or last is None else f"{100 * (last / first - 1):+.1f}%"
        cells = ["" if values[name] is None else f"{values[name]:.3f}" for name in names]
        lines.append(f"| {label} | {resource} | " + " | ".join(cells) + f" | {change} |")
    return "\n".join(lines)


def findings(points: Points) -> list[str]:
    """What the recipe claims, from `base` over `expanded` and the first stage to the last one, and whether
    these points show it.

    Empty where there is no base, no expansion, no stage or nothing that was measured.
    """
    if [*points][:2] != ["base", "expanded"] or len(points) < 3 or not points["base"]:
        return []
    recovered, last = [*points][2], [*points][-1]
    means = {name: class_means(values) for name, values in points.items()}

    def change(since: str, until: str, group: str) -> float:
        first, second = means[since][group], means[until][group]
        return float("nan") if first is None or second is None else 100 * (second / first - 1)

    cost, kept = change("base", "expanded", "all"), change("base", recovered, "high")
    low, high = change("base", last, "low"), change("base", last, "high")
    worse = {
        code: 100 * (points[last][code] / value - 1)
        for code, value in points["base"].items()
        if points[last][code] > value
    }
    claims = [
        (cost < 5, f"Expansion costs little: {cost:+.1f}% bits per byte over all languages."),
        (
            kept <= 0,
            (
                f"Recovery wins it back where the base was strong: {recovered} {kept:+.1f}% against base "
                "over high-resource languages."
            ),
        ),
        (
            low < high,
            f"Low-resource languages gain most: {last} {low:+.1f}% against base, high-resource {high:+.1f}%.",
        ),
        (
            not worse,
            "No language ends worse than it began: "
            + (", ".join(f"{LANGUAGES[code].name} {more:+.1f}%" for code, more in worse.items()) or "none")
            + ".",
        ),
    ]
    if len(points) > 3:
        low, high = change(recovered, last, "low"), change(recovered, last, "high")
        claims.insert(
            3,
            (
                low < high,
                (
                    f"The last stage helps them most: low-resource {low:+.1f}% against {recovered}, "
                    f"high-resource {high:+.1f}%."
                ),
            ),
        )
    return [f"- {'shown' if true else 'NOT shown'}: {claim}" for true, claim in claims]


def suite_table(results: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> list[str]:
    """Markdown lines: means of each task of the offline suite at each point, over both resource classes; none
    where it was not run.
    """
    tasks = [
        task
        for task in (*CHOICE_TASKS, *TRANSLATION_TASKS)
        if any(task in of_point for of_point in results.values())
    ]
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
        scores = [
            {code: value["score"] for code, value in of_point.get(task, {}).items()}
            for of_point in results.values()
        ]
        items = sum(
            value["n"]
            for value in next(of_point[task] for of_point in results.values() if task in of_point).values()
        )
        for group in ("high", "low", "all"):
            means = [class_means(by_language)[group] for by_language in scores]
            cells = ["" if mean is None else f"{mean:.1f}" for mean in means]
            lines.append(
                f"| {name}{chance} | {group} | {items if group == 'all' else ''} | "
                + " | ".join(cells)
                + " |"
            )
    return [*lines, ""]


def plot_points(path: Path, points: Points, losses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """A PNG: bars of the measure by language at each point above, the training loss by
    step and stage below.
    """
    codes = [code for code in LANGUAGES if any(code in values for values in points.values())]
    width = 0.8 / max(1, len(points))
    with saved_figure(path, 2, (13, 8.5)) as (bars, curves):
        for place, (name, values) in enumerate(points.items()):
            centers = [number + (place - (len(points) - 1) / 2) * width for number in range(len(codes))]
            bars.bar(centers, [values.get(code, float("nan")) for code in codes], width, label=name)
        names = [
            f"{LANGUAGES[code].name}{'' if LANGUAGES[code].resource == 'high' else ' *'}" for code in codes
        ]
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
