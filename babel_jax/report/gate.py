"""The regression gate: the languages in which a run's model is worse than its parent, and by how much."""

import math
from collections.abc import Mapping
from typing import Any

from babel_jax.evaluation.items import BITS_PER_BYTE
from babel_jax.evaluation.points import LOWER_IS_BETTER, scores_of
from babel_jax.evaluation.suite import Results
from babel_jax.languages import CODES, LANGUAGES

PARENT_POINT = "base"


def regression_gate(
    points: Mapping[str, Results], model: str | None, tolerance: float = 0.0
) -> dict[str, Any] | None:
    """The point `model` compared with `base`; None if one of them was not evaluated.

    {"parent", "model", "tolerance", "passed", "changes": {language: percent of bits per byte}, "worse": the
    changes above the tolerance, "tasks": {task: {language: change}}}. A task is worse in a language if its
    score fell by more than two standard errors of the difference; without standard errors it is not judged.
    """
    if model is None or model == PARENT_POINT or PARENT_POINT not in points or model not in points:
        return None
    parent = points[PARENT_POINT]

    # Bits per byte by language, where both points have them.
    before, after = scores_of(parent, BITS_PER_BYTE), scores_of(points[model], BITS_PER_BYTE)
    changes = {}
    for code in CODES:
        if code in before and code in after:
            changes[code] = 100 * (after[code] / before[code] - 1)

    worst_first = sorted(changes.items(), key=lambda pair: -pair[1])
    worse = {code: change for code, change in worst_first if change > tolerance}

    # A fall within two standard errors is no loss.
    tasks = {}
    for task in parent:
        if fallen := _fallen(parent, points[model], task):
            tasks[task] = fallen
    return {
        "parent": PARENT_POINT,
        "model": model,
        "tolerance": tolerance,
        "passed": not worse and not tasks,
        "changes": changes,
        "worse": worse,
        "tasks": tasks,
    }


def gate_text(gate: Mapping[str, Any] | None) -> str:
    """The gate in one line."""
    if gate is None:
        return "There is no parent model to compare with."
    worse = [f"{LANGUAGES[code].name} {change:+.1f}%" for code, change in gate["worse"].items()]
    tasks = []
    for task, fallen in gate["tasks"].items():
        tasks += [f"{LANGUAGES[code].name} in {task}" for code in fallen]
    details = f"worse in bits per byte: {', '.join(worse) or 'none'}"
    if tasks:
        details += f"; worse by two standard errors: {', '.join(tasks)}"
    return (
        f"Regression gate {'passed' if gate['passed'] else 'NOT passed'} ({gate['model']} against "
        f"{gate['parent']}): {details}."
    )


def _fallen(before: Results, after: Results, task: str) -> dict[str, float]:
    """The change of a task's score in each language where it fell by more than two standard errors."""
    if task in LOWER_IS_BETTER:
        return {}
    changes = {}
    for code, parent in before[task].items():
        model = after.get(task, {}).get(code)
        if model is None or parent["stderr"] is None or model["stderr"] is None:
            continue
        if parent["score"] - model["score"] > 2 * math.hypot(parent["stderr"], model["stderr"]):
            changes[code] = model["score"] - parent["score"]
    return changes
