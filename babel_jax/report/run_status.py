"""The status of a run: finished or not, and the number of its steps."""

from pathlib import Path
from typing import Any

from babel_jax.places import pull, url_of
from babel_jax.run_files import StepLine, Summary, read_as, read_last_lines

_METRICS, _SUMMARY = "metrics.jsonl", "summary.json"


def run_status(run_folder: Path) -> dict[str, Any]:
    """{"out", "finished", "steps", "summary"} of a run folder, on disk or in a bucket.

    `steps` counts the steps in metrics.jsonl; in a bucket, this file has the steps up to the newest
    checkpoint. `summary` begins with `finished` or `not finished`: the scripts for pods read it. Raises
    BadInput if the bucket cannot be read, or summary.json is damaged.
    """
    pull(run_folder, lambda name: name in (_METRICS, _SUMMARY))
    lines = read_last_lines(run_folder / _METRICS, StepLine, 1)
    steps = lines[-1]["step"] + 1 if lines else 0
    try:
        read_as(run_folder / _SUMMARY, Summary)
        finished = True
    except FileNotFoundError:
        finished = False
    location = url_of(run_folder) or run_folder
    if finished:
        summary = f"finished: {steps:,} steps in {location}"
    elif lines:
        summary = f"not finished: {steps:,} steps in {location}"
    else:
        summary = f"not finished: no step in {location} yet"
    return {"out": str(location), "finished": finished, "steps": steps, "summary": summary}
