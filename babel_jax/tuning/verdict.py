"""The verdict from the measurements: the fastest candidate, or that the difference is within the spread."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from babel_jax.config import Config
from babel_jax.tuning.candidates import Candidate
from babel_jax.tuning.journal import Journal

# A smaller gain is not worth other settings, whatever the spread.
LEAST_GAIN = 0.01


class MeasuredCandidate(NamedTuple):
    """A candidate with all of its visits. `seconds`: the median of its steps, None if it did not run.

    spread: the difference between the highest and the lowest median of its visits, divided by `seconds`.
    """

    candidate: Candidate
    step_seconds: list[list[float]]
    compile_seconds: float | None
    program_gib: float | None
    device_peak_gib: float | None
    forecast_seconds: float | None
    bound_seconds: float | None
    failure: str | None

    @property
    def seconds(self) -> float | None:
        """The median over all counted steps."""
        if self.failure is not None or not self.step_seconds:
            return None
        return statistics.median(itertools.chain.from_iterable(self.step_seconds))

    @property
    def spread(self) -> float:
        """The range of the medians of the visits over the median of all steps."""
        if self.seconds is None:
            return 0.0
        medians = [statistics.median(visit) for visit in self.step_seconds]
        return (max(medians) - min(medians)) / self.seconds

    def described(self, config: Config) -> dict[str, Any]:
        """The values of --json."""
        tokens = config.training.global_batch_size * config.data.seq_len
        return {
            "changes": {f"training.{name}": value for name, value in self.candidate.changes.items()},
            "seconds": self.seconds,
            "spread": self.spread,
            "tokens_per_second": None if self.seconds is None else tokens / self.seconds,
            "step_seconds": self.step_seconds,
            "compile_seconds": self.compile_seconds,
            "program_gib": self.program_gib,
            "device_peak_gib": self.device_peak_gib,
            "forecast_seconds": self.forecast_seconds,
            "bound_seconds": self.bound_seconds,
            "failure": self.failure,
        }


def measured(journal: Journal, candidate: Candidate, visits: range | None = None) -> MeasuredCandidate:
    """The candidate with its measurements in the journal; with `visits`, only with these visits."""
    lines = [line for line in journal.of(candidate) if visits is None or line["visit"] in visits]

    def largest(name: str, among: Sequence[dict[str, Any]]) -> float | None:
        return max((line[name] for line in among if line.get(name) is not None), default=None)

    # A program that came from the cache was compiled earlier: its seconds are only the time to read it.
    compiled = [line for line in lines if not line.get("compiled_before")]
    return MeasuredCandidate(
        candidate,
        [line["step_seconds"] for line in lines if line["step_seconds"]],
        largest("compile_seconds", compiled or lines),
        largest("program_gib", lines),
        largest("device_peak_gib", lines),
        largest("forecast_seconds", lines),
        largest("bound_seconds", lines),
        next((line["failure"] for line in lines if line["failure"]), None),
    )


class Verdict(NamedTuple):
    """The fastest candidate and the settings to take.

    - gain: the part of today's seconds that `fastest` saves; None if today's settings did not run
    - spread: the larger of the spreads of the two
    - chosen: `fastest`, or today's settings if the gain is not larger than the spread and LEAST_GAIN
    """

    fastest: MeasuredCandidate
    gain: float | None
    spread: float
    chosen: MeasuredCandidate


def verdict_of(today: MeasuredCandidate, others: Sequence[MeasuredCandidate]) -> Verdict | None:
    """The verdict; None if no candidate ran."""
    ran = [one for one in (today, *others) if one.seconds is not None]
    if not ran:
        return None
    fastest = min(ran, key=lambda one: one.seconds or 0.0)
    if today.seconds is None:
        return Verdict(fastest, None, fastest.spread, fastest)
    # A gain within the spread of either may be luck; then the user's settings stay.
    gain, spread = _gain(fastest, today), max(fastest.spread, today.spread)
    return Verdict(fastest, gain, spread, fastest if gain > max(spread, LEAST_GAIN) else today)


def winners_of(today: MeasuredCandidate, others: Sequence[MeasuredCandidate]) -> dict[str, Any]:
    """For each setting, the fastest value with which the step is faster than today's by more than the spread.
    Only candidates that change one setting count.
    """
    # Of several settings at once, nobody knows which one made the step faster.
    single: dict[str, list[MeasuredCandidate]] = {}
    for one in others:
        if len(one.candidate.changes) == 1:
            (name,) = one.candidate.changes
            single.setdefault(name, []).append(one)
    winners: dict[str, Any] = {}
    for name, of_setting in single.items():
        verdict = verdict_of(today, of_setting)
        if verdict is not None and verdict.chosen is not today:
            winners[name] = verdict.chosen.candidate.changes[name]
    return winners


def _gain(one: MeasuredCandidate, today: MeasuredCandidate) -> float:
    assert one.seconds is not None
    assert today.seconds is not None
    return 1.0 - one.seconds / today.seconds
