"""The measurements of `babel tune` as text."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from babel_jax.config import Config
from babel_jax.tuning.verdict import LEAST_GAIN, MeasuredCandidate, Verdict


def table_of(found: Sequence[MeasuredCandidate], config: Config) -> str:
    """A line for each candidate: today's settings, then the others, the fastest first, then candidates that
    did not run.
    """
    tokens = config.training.global_batch_size * config.data.seq_len
    # found[0] is the config as it is.
    ran = [one for one in found[1:] if one.seconds is not None]
    ran.sort(key=lambda one: one.seconds or 0.0)
    failed = [one for one in found[1:] if one.seconds is None]
    columns = ("s a step", "spread", "tokens/s", "compile s", "GiB", "forecast", "bound")
    lines = [" ".join(f"{name:>9}" for name in columns) + "  settings"]
    for one in (found[0], *ran, *failed):
        if one.seconds is None:
            lines.append(f"{'-':>9} {'':>59}  {one.candidate.name}: {one.failure or 'not measured'}")
            continue
        cells = (
            f"{one.seconds:.4g}",
            f"{one.spread:.1%}",
            f"{tokens / one.seconds:,.0f}",
            _number(one.compile_seconds, ".1f"),
            _number(one.program_gib, ".2f"),
            _number(one.forecast_seconds, ".4g"),
            _number(one.bound_seconds, ".4g"),
        )
        lines.append(" ".join(f"{cell:>9}" for cell in cells) + f"  {one.candidate.name}")
    lines.append(
        "s a step: the median; spread: between visits; GiB: memory of the program on a device; forecast: "
        "seconds as the compiler expects them; bound: the least seconds at the published rates"
    )
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def verdict_lines(
    verdict: Verdict, about: Mapping[str, Any], options: Sequence[str], config_name: str
) -> list[str]:
    """The lines of the verdict: the gain, and the command to use it. options: the arguments of --set for the
    chosen candidate.
    """
    device, fastest = about["device"], verdict.fastest
    lines = [f"{device['devices']} x {device['kind']}, stage {about['step']['stage']}"]
    if verdict.gain is None:
        lines.append(f"today's settings did not run; the fastest is {fastest.candidate.name}")
    elif not fastest.candidate.changes:
        lines.append("today's settings are the fastest; keep them")
    elif verdict.chosen is fastest:
        lines.append(
            f"{fastest.candidate.name}: {verdict.gain:.1%} faster than today's settings "
            f"(spread {verdict.spread:.1%})"
        )
    else:
        limit = max(verdict.spread, LEAST_GAIN)
        lines.append(
            f"keep today's settings: {fastest.candidate.name} is {verdict.gain:.1%} faster, which is within "
            f"the spread of {limit:.1%}"
        )
    if options:
        sets = " ".join(f"--set {shlex.quote(option)}" for option in options)
        lines.append(f"to use it: babel train {config_name} {sets}")
    if fastest.forecast_seconds is None:
        lines.append("no forecast: only the compiler for TPUs gives one")
    return lines
