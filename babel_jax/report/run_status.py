"""How far a run is: finished, or after how many steps."""

from pathlib import Path
from typing import Any

from babel_jax.places import pull, url_of
from babel_jax.run_files import StepLine, Summary, read_as, read_lines

_METRICS, _SUMMARY = "metrics.jsonl", "summary.json"


def run_status(run_folder: Path) -> dict[str, Any]:
    """{"out", "finished", "steps", "summary"} of a run folder, on disk or in a bucket.

    `steps` counts the steps that metrics.jsonl has. In a bucket it has those up to the newest checkpoint.
    The summary begins with `finished` or `not finished`: the scripts for pods read it. Raises BadInput
    where the bucket cannot be read, or summary.json is damaged.
    """
    pull(run_folder, lambda name: name in (_METRICS, _SUMMARY))
    lines = read_lines(run_folder / _METRICS, StepLine)
    steps = max((line["step"] + 1 for line in lines), default=0)
    try:
        read_as(run_folder / _SUMMARY, Summary)
        finished = True
    except FileNotFoundError:
        finished = False
    where = url_of(run_folder) or run_folder
    if finished:
        told = f"finished: {steps:,} steps in {where}"
    else:
        told = (
            f"not finished: {steps:,} steps in {where}" if lines else f"not finished: no step in {where} yet"
        )
    return {"out": str(where), "finished": finished, "steps": steps, "summary": told}
