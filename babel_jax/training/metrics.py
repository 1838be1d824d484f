"""The metrics of each step: to JSON lines, to TensorBoard and to the terminal."""

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from babel_jax.config import ModelConfig
from babel_jax.files import write_text
from babel_jax.hardware import peak_flops
from babel_jax.model.flops import model_flops_per_token
from babel_jax.progress import Work
from babel_jax.run_files import StepLine, read_lines
from babel_jax.sending import push, settle
from babel_jax.training.board import Board
from babel_jax.training.goodput import Goodput, Spent

_SECONDS_BETWEEN_SAVES = 30.0  # of goodput
_STEPS_BETWEEN_COMPARISONS = 100


class Metrics:
    """Writes `metrics.jsonl` and `tensorboard/` in a run folder, and shows progress.

    The values of a step are fetched during the next step, so that the device never waits for the host.
    """

    def __init__(
        self,
        folder: Path,
        seq_len: int,
        available: Mapping[str, int],
        start_step: int,
        total_steps: int,
        goodput: Goodput,
        languages: Sequence[str],
    ):
        """`available`: tokens of prepared text by language; `languages`: the order of the run. Lines from
        `start_step` on come from the interrupted run; they are deleted.
        """
        self._path, self._goodput = folder / "metrics.jsonl", goodput
        lines: list[dict[str, Any]] = []
        self._writes = writes = jax.process_index() == 0  # all processes see the same values
        if writes:
            lines = read_lines(self._path, StepLine)
            again = {line["step"]: line.get("seconds", 0.0) for line in lines if line["step"] >= start_step}
            if again:
                goodput.lose(again)
                # Before these lines are deleted: only they show what was lost.
                goodput.save(start_step - 1)
            # Steps after the checkpoint are taken again, and write their lines again.
            lines = [line for line in lines if line["step"] < start_step]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        # close() closes the file.
        self._file = open(self._path if writes else os.devnull, "a", encoding="utf-8")  # noqa: SIM115
        self._board = Board(folder / "tensorboard", start_step, writes)
        self._work = Work[Any](
            "train", total=total_steps, unit="steps", initial=start_step, keep=True, shown=writes
        )
        self._languages = tuple(languages)
        self._seq_len, self._available, self._total_steps = seq_len, available, total_steps
        # The counts of tokens resume from the last line that is kept.
        self._tokens: Counter[str] = Counter(lines[-1].get("tokens_by_language", {}) if lines else {})
        # `of` sets the FLOPs before the first step.
        self._flops, self._peak = 0.0, peak_flops(jax.devices()[0].device_kind, jax.device_count())
        self._waiting: tuple[dict[str, Any], dict[str, Array]] | None = None
        self._skipped = 0  # updates in a row, up to the last written step
        self._last_time = time.monotonic()
        self._own_seconds, self._own_steps = 0.0, 0

    def __enter__(self) -> "Metrics":
        self._work.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, config: ModelConfig) -> None:
        """Sets the model of the following steps, for its FLOPs."""
        self.flush()
        self._flops = model_flops_per_token(config, self._seq_len)

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the time of the next step."""
        self._last_time = time.monotonic()

    @contextlib.contextmanager
    def aside(self, on: Spent) -> Iterator[None]:
        """The time of the block goes to `on`, and is left out of the time of the next step."""
        with self._goodput.spent(on):
            yield
        self.restart_clock()

    def log(self, step: int, stage: str, rate: float, values: dict[str, Array]) -> int:
        """Keeps the metrics of a step, and writes those of the step before. Returns how many updates in a row
        were skipped up to the step before.
        """
        skipped = self.flush()
        self._waiting = ({"step": step, "stage": stage, "rate": rate}, values)
        return skipped

    def flush(self) -> int:
        """Writes the metrics that wait. Returns how many updates in a row were skipped up to the last written
        step.
        """
        if self._waiting is None:
            return self._skipped
        line, values = self._waiting
        self._waiting = None
        asked = time.monotonic()
        # Waits until the devices have finished the step.
        host = jax.device_get(values)
        now = time.monotonic()
        # Up to `asked` this process worked; after that it waited for devices, and so for the slowest process.
        self._own_seconds, self._own_steps = self._own_seconds + asked - self._last_time, self._own_steps + 1
        seconds, self._last_time = now - self._last_time, now
        # What the step returns is written only if it is named here.
        line |= {
            "loss": float(host["loss"]),
            "gradient_norm": float(host["gradient_norm"]),
            "skipped": int(host["skipped"]),
        }
        line |= self._speed(host["tokens"], seconds)
        line |= _device_memory() | self._stragglers(line["step"])
        line |= self._by_language(host)
        self._write(line)
        self._skipped = int(line["skipped"])
        return self._skipped

    def _speed(self, tokens: np.ndarray, seconds: float) -> dict[str, Any]:
        """Tokens, time and goodput of a step. tokens: int32[languages], without padding, summed over all
        processes.
        """
        of_step = int(tokens.sum(dtype=np.int64))
        speed = {
            "tokens": of_step,
            "total_steps": self._total_steps,
            "seconds": seconds,
            "tokens_per_second": of_step / seconds,
            "goodput": self._goodput.fraction(),
            "time_spent": {str(on): round(spent, 3) for on, spent in self._goodput.seconds.items()},
        }
        # Utilization of the model's FLOPs (MFU): what is computed again in the backward pass does not count.
        if self._peak is not None:
            speed["model_flop_utilization"] = of_step / seconds * self._flops / self._peak
        return speed

    def _by_language(self, host: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """The losses of a step by language; tokens and epochs since the start of the run."""
        losses: dict[str, float] = {}
        tokens: dict[str, float] = {}
        epochs: dict[str, float] = {}
        for index, code in enumerate(self._languages):
            self._tokens[code] += int(host["tokens"][index])
            # A batch may have windows of a language and no target of it.
            if host["targets"][index]:
                losses[code] = float(host["nats"][index] / host["targets"][index])
            if self._tokens[code]:
                tokens[code] = self._tokens[code]
                if code in self._available:
                    epochs[code] = self._tokens[code] / self._available[code]
        return {"loss_by_language": losses, "tokens_by_language": tokens, "epochs_by_language": epochs}

    def _write(self, line: dict[str, Any]) -> None:
        """Writes the line of a step everywhere."""
        # JSON knows no NaN: a loss that is not finite is null.
        self._file.write(json.dumps(_finite(line)) + "\n")
        self._file.flush()
        self._to_board(line)
        if self._writes:
            self._goodput.save(line["step"], at_most_every=_SECONDS_BETWEEN_SAVES)
        self._work.note(
            f"stage {line['stage']}, loss {line['loss']:.4f} nats/token, "
            f"{line['tokens_per_second']:,.0f} tokens/s"
        )
        self._work.update()

    def log_evaluation(self, step: int, results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Writes scores by task and language, after `step` steps, to TensorBoard."""
        for task, by_language in results.items():
            for code, result in by_language.items():
                self._board.add_scalar(f"evaluation/{task}/{code}", result["score"], step)
            if by_language:
                self._board.add_scalar(
                    f"evaluation/{task}/mean", fmean(result["score"] for result in by_language.values()), step
                )

    def sync(self) -> int:
        """As `flush`, and syncs to disk: a run that resumes at a checkpoint needs the lines of all steps
        before it.
        """
        last = None if self._waiting is None else self._waiting[0]["step"]
        skipped = self.flush()
        if self._writes and last is not None:
            # The lines reach the disk here, before the checkpoint that is saved after them.
            self._board.flush()
            os.fsync(self._file.fileno())
            push(self._path)
            settle(self._path.parent / "tensorboard")
            self._goodput.save(last)
        return skipped

    def _stragglers(self, step: int) -> dict[str, Any]:
        """With several processes, every 100 steps: the seconds of host work per step, in the slowest process
        and at the median.

        This shows slow hosts and disks. It does not show a slow device, because then all processes wait
        equally; use `--profile`.
        """
        if jax.process_count() == 1 or (step + 1) % _STEPS_BETWEEN_COMPARISONS:
            return {}
        # A collective: all processes come here after the same step.
        own = multihost_utils.process_allgather(np.float32(self._own_seconds / self._own_steps))
        self._own_seconds, self._own_steps = 0.0, 0
        return {
            "slowest_process": int(own.argmax()),
            "slowest_process_seconds": float(own.max()),
            "median_process_seconds": float(np.median(own)),
        }

    def close(self) -> None:
        """Writes the metrics that wait, and closes the files."""
        self.sync()
        self._file.close()
        self._board.close()
        self._work.close()

    def _to_board(self, line: dict[str, Any]) -> None:
        step = line["step"]
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(f"train/{name}", value, step)
            # For example: loss_by_language/sw.
            elif isinstance(value, dict):
                for code, one in value.items():
                    self._board.add_scalar(f"{name}/{code}", one, step)


def _device_memory() -> dict[str, float]:
    """Memory of the fullest device of this process, GiB. Empty if the backend reports no memory (CPU)."""
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {
        "bytes_in_use": "device_memory_gib",
        "peak_bytes_in_use": "device_memory_peak_gib",
        "bytes_limit": "device_memory_limit_gib",
    }
    memory = {}
    for theirs, ours in names.items():
        values = [stats[theirs] for stats in found if theirs in stats]
        # Only if every device reports: else the fullest one might be missing.
        if values and len(values) == len(found):
            memory[ours] = max(values) / 2**30
    return memory


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
