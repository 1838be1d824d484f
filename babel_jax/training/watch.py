"""Measuring a model while it is trained, and which of its states was best.

evaluation/during.jsonl  {"step", "tasks"} of every measurement; `step` is how many steps had been taken
evaluation/best.json     {"step", "bits_per_byte", "checkpoint"}: the one with the lowest mean of bits per
byte over the languages
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
# What the model scores after so many steps: {task: {language: {"score", ...}}}, with bits_per_byte among the
# tasks.
Measure = Callable[[int, ModelConfig, PyTree[Array]], dict[str, dict[str, dict[str, Any]]]]


class Watch:
    """Measures every so many steps.

    It knows the best step so far also after a restart: `resume_at` tells it where a run goes on.
    """

    def __init__(self, run_folder: Path, every: int | None, measure: Measure):
        self._folder, self._every, self._measure = run_folder / "evaluation", every, measure
        self._lines: list[dict[str, Any]] = []

    def resume_at(self, step: int) -> None:
        """Goes on with what was measured up to a step; what comes behind it is of a run that was cut off, and
        goes.
        """
        if self._every is not None:
            self._lines = [
                line for line in read_lines(self._folder / DURING, DuringLine) if line["step"] <= step
            ]
            self._write()

    def due(self, step: int) -> bool:
        """Whether to measure after so many steps."""
        return self._every is not None and step % self._every == 0

    def measured(
        self, step: int, config: ModelConfig, params: PyTree[Array]
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Measures, writes it down and gives it."""
        results = self._measure(step, config, params)
        self._lines.append({"step": step, "tasks": results})
        self._write()
        return results

    @property
    def best_step(self) -> int | None:
        """The step with the lowest mean of bits per byte so far; the first of equals."""
        means = {line["step"]: _mean(line) for line in self._lines if line["tasks"].get("bits_per_byte")}
        return min(means, key=lambda step: means[step], default=None)

    def _write(self) -> None:
        with agreed():
            if jax.process_index() != 0:
                return
            make_folder(self._folder)
            write_text(self._folder / DURING, "".join(json.dumps(line) + "\n" for line in self._lines))
            if (best := self.best_step) is not None:
                (mean,) = (_mean(line) for line in self._lines if line["step"] == best)
                found = {"step": best, "bits_per_byte": mean, "checkpoint": f"checkpoints/{best}"}
                write_text(self._folder / BEST, json.dumps(found, indent=2) + "\n")
            else:
                remove(self._folder / BEST)


def _mean(line: dict[str, Any]) -> float:
    return statistics.fmean(result["score"] for result in line["tasks"]["bits_per_byte"].values())
