"""Evaluation between steps, and which state of the run was best.

evaluation/during.jsonl  {"step", "tasks"} of each evaluation; `step` is the number of steps taken
evaluation/best.json     {"step", "bits_per_byte", "checkpoint"} of the state with the lowest bits per byte,
                         the mean over languages
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, PyTree

from babel_jax.config import ModelConfig
from babel_jax.distributed.agreement import agreed
from babel_jax.files import make_folder, write_text
from babel_jax.run_files import DuringLine, read_lines
from babel_jax.sending import remove

DURING, BEST = "during.jsonl", "best.json"
# (steps taken, config, params) to {task: {language: {"score", ...}}}; bits_per_byte is one of the tasks.
Measure = Callable[[int, ModelConfig, PyTree[Array]], dict[str, dict[str, dict[str, Any]]]]


class Watch:
    """Evaluates every `every` steps; never, where `every` is None. Knows the best step so far, also of a
    resumed run (`resume_at`).
    """

    def __init__(self, run_folder: Path, every: int | None, measure: Measure):
        self._folder, self._every, self._measure = run_folder / "evaluation", every, measure
        self._lines: list[dict[str, Any]] = []

    def resume_at(self, step: int) -> None:
        """Reads the evaluations up to `step`. Later ones come from the interrupted run; they are deleted."""
        if self._every is not None:
            lines = read_lines(self._folder / DURING, DuringLine)
            self._lines = [line for line in lines if line["step"] <= step]
            self._write()

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps."""
        return self._every is not None and step % self._every == 0

    def evaluate(
        self, step: int, config: ModelConfig, params: PyTree[Array]
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Evaluates, writes the results to during.jsonl, and returns them."""
        results = self._measure(step, config, params)
        self._lines.append({"step": step, "tasks": results})
        self._write()
        return results

    @property
    def best_step(self) -> int | None:
        """The step with the lowest mean bits per byte so far; the first one, where several are equal."""
        means = {}
        for line in self._lines:
            # Without held-out text there is nothing to choose by.
            if line["tasks"].get("bits_per_byte"):
                means[line["step"]] = _mean(line)
        return min(means, key=lambda step: means[step], default=None)

    def _write(self) -> None:
        with agreed():
            if jax.process_index() != 0:
                return
            make_folder(self._folder)
            write_text(self._folder / DURING, "".join(json.dumps(line) + "\n" for line in self._lines))
            # A run that resumes before its best step has lost that step, so an older file must not stay.
            if (best := self.best_step) is not None:
                (mean,) = (_mean(line) for line in self._lines if line["step"] == best)
                found = {"step": best, "bits_per_byte": mean, "checkpoint": f"checkpoints/{best}"}
                write_text(self._folder / BEST, json.dumps(found, indent=2) + "\n")
            else:
                remove(self._folder / BEST)


def _mean(line: dict[str, Any]) -> float:
    return statistics.fmean(result["score"] for result in line["tasks"]["bits_per_byte"].values())
