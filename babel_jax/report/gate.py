"""The regression gate: in which languages a run's model is worse than the parent that it grew from, and by
how much.
"""

import math
from collections.abc import Mapping
from typing import Any

from babel_jax.evaluation.points import BITS_PER_BYTE, LOWER_IS_BETTER, scores_of
from babel_jax.evaluation.suite import Results
from babel_jax.languages import CODES, LANGUAGES

PARENT = "base"


def regression_gate(
    points: Mapping[str, Results], model: str | None, tolerance: float = 0.0
) -> dict[str, Any] | None:
    """The point `model` against `base`; None where one of the two was not measured.

    {"parent", "model", "tolerance", "passed", "changes": {language: percent of bits per byte}, "worse": those
    above the tolerance, "tasks": {task: {language: change}}}. A task counts as worse in a language where its
    score fell by more than two standard errors of the difference; one without a standard error is not judged.
    """
    if model is None or model == PARENT or PARENT not in points or model not in points:
        return None
    before, after = scores_of(points[PARENT], BITS_PER_BYTE), scores_of(points[model], BITS_PER_BYTE)
    changes = {
        code: 100 * (after[code] / before[code] - 1) for code in CODES if code in before and code in after
    }
    worse = {
        code: change
        for code, change in sorted(changes.items(), key=lambda pair: -pair[1])
        if change > tolerance
    }
    tasks = {
        task: fallen for task in points[PARENT] if (fallen := _fallen(points[PARENT], points[model], task))
    }
    return {
        "parent": PARENT,
        "model": model,
        "tolerance": tolerance,
        "passed": not worse and not tasks,
        "changes": changes,
        "worse": worse,
        "tasks": tasks,
    }


def gate_words(gate: Mapping[str, Any] | None) -> str:
    """The gate in one line."""
    if gate is None:
        return "There is no parent model to compare with."
    worse = [f"{LANGUAGES[code].name} {change:+.1f}%" for code, change in gate["worse"].items()]
    tasks = [f"{LANGUAGES[code].name} in {task}" for task, fallen in gate["tasks"].items() for code in fallen]
    said = f"worse in bits per byte: {', '.join(worse) or 'none'}" + (
        f"; worse by two standard errors: {', '.join(tasks)}" if tasks else ""
    )
    return (
        f"Regression gate {'passed' if gate['passed'] else 'NOT passed'} ({gate['model']} against "
        f"{gate['parent']}): {said}."
    )


def _fallen(before: Results, after: Results, task: str) -> dict[str, float]:
    if task in LOWER_IS_BETTER:
        return {}
    found = {}
    for code, was in before[task].items():
        now = after.get(task, {}).get(code)
        if now is None or was["stderr"] is None or now["stderr"] is None:
            continue
        if was["score"] - now["score"] > 2 * math.hypot(was["stderr"], now["stderr"]):
            found[code] = now["score"] - was["score"]
    return found
