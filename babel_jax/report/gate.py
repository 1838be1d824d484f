"""The regression gate: the languages in which a run's model is worse than its parent, and by how much."""

from collections.abc import Mapping
from typing import Any

from babel_jax.evaluation.items import BITS_PER_BYTE, differences
from babel_jax.evaluation.points import LOWER_IS_BETTER, scores_of
from babel_jax.evaluation.suite import Results
from babel_jax.evaluation.tables import TOO_LITTLE, PointItems, changes_between, percent_text
from babel_jax.languages import LANGUAGES, in_order

PARENT_POINT = "base"
PASSED, FAILED = "passed", "NOT passed"  # the third verdict is TOO_LITTLE


def regression_gate(
    points: Mapping[str, Results], items: PointItems, model: str | None, tolerance: float = 0.0
) -> dict[str, Any] | None:
    """The point `model` compared with `base`; None if one of them was not evaluated.

    {"parent", "model", "tolerance", "verdict", "passed", "changes": {language: percent of bits per byte},
    "intervals": {language: {low, high, n}} of the changes, "worse", "unclear", "unknown", "tasks": {task:
    {language: change}}}. `worse` are the changes whose whole 95% interval (paired bootstrap over documents)
    is above the tolerance, `unclear` those whose interval has values on both sides, and `unknown` the
    languages with too little text for an interval; `unmeasured` languages have no figure of the parent. A
    task is worse in a language if the whole interval is below zero. The verdict is "NOT passed" if anything
    is worse, else "not enough text to tell" if a language is unknown, else "passed".
    """
    if model is None or model == PARENT_POINT or PARENT_POINT not in points or model not in points:
        return None

    # Bits per byte by language, where both points have them.
    before, after = scores_of(points[PARENT_POINT], BITS_PER_BYTE), scores_of(points[model], BITS_PER_BYTE)
    intervals = changes_between(items, PARENT_POINT, model)
    changes: dict[str, float] = {}
    worse: dict[str, float] = {}
    unclear: dict[str, float] = {}
    unknown = []
    for code in in_order(before.keys() & after.keys()):
        change = changes[code] = 100 * (after[code] / before[code] - 1)
        interval = intervals.get(code)
        if interval is None or interval["low"] is None or interval["high"] is None:
            unknown.append(code)
        elif interval["low"] > tolerance:
            worse[code] = change
        elif interval["high"] > tolerance:
            unclear[code] = change

    # A language that is surely worse decides, whatever is unknown about others.
    tasks = _worse_tasks(items, model)
    verdict = FAILED if worse or tasks else TOO_LITTLE if unknown else PASSED
    return {
        "parent": PARENT_POINT,
        "model": model,
        "tolerance": tolerance,
        "verdict": verdict,
        "passed": verdict == PASSED,
        "changes": changes,
        "intervals": {code: intervals[code] for code in changes if code in intervals},
        "worse": _worst_first(worse),
        "unclear": _worst_first(unclear),
        "unknown": unknown,
        "unmeasured": [code for code in in_order(after) if code not in before],
        "tasks": tasks,
    }


def gate_text(gate: Mapping[str, Any] | None) -> str:
    """The gate in one line."""
    if gate is None:
        return "There is no parent model to compare with."
    # Parts of the sentence that have nothing to say are left out, except the first.
    details = [f"worse in bits per byte: {', '.join(_changes(gate, 'worse')) or 'none'}"]
    if gate["tasks"]:
        tasks = []
        for task, fallen in gate["tasks"].items():
            tasks += [f"{LANGUAGES[code].name} in {task}" for code in fallen]
        details.append(f"worse: {', '.join(tasks)}")
    if gate["unclear"]:
        details.append(f"may be worse or better: {', '.join(_changes(gate, 'unclear'))}")
    if gate.get("unmeasured"):
        names = ", ".join(LANGUAGES[code].name for code in gate["unmeasured"])
        details.append(f"not measured at {gate['parent']}: {names}")
    if gate["unknown"]:
        names = ", ".join(LANGUAGES[code].name for code in gate["unknown"])
        details.append(f"{TOO_LITTLE} in {names}")
    return (
        f"Regression gate: {gate['verdict']} ({gate['model']} against {gate['parent']}): "
        f"{'; '.join(details)}."
    )


def _changes(gate: Mapping[str, Any], name: str) -> list[str]:
    changes = []
    for code, change in gate[name].items():
        interval = gate["intervals"].get(code)
        changes.append(f"{LANGUAGES[code].name} {percent_text(change, interval)}")
    return changes


def _worst_first(changes: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(changes.items(), key=lambda pair: -pair[1]))


def _worse_tasks(items: PointItems, model: str) -> dict[str, dict[str, float]]:
    """The change of each task's score in the languages in which the whole interval is below zero."""
    if PARENT_POINT not in items or model not in items:
        return {}
    tasks: dict[str, dict[str, float]] = {}
    for task, intervals in differences(items[model], items[PARENT_POINT]).items():
        if task in LOWER_IS_BETTER:
            continue
        for code, interval in intervals.items():
            # `intervals` also has groups of languages, which are not named.
            high, change = interval["high"], interval["difference"]
            if code in LANGUAGES and high is not None and change is not None and high < 0:
                tasks.setdefault(task, {})[code] = change
    return tasks
