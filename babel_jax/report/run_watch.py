"""`babel watch`: a run on the terminal, as far as it is."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from babel_jax.config.file import load_config
from babel_jax.distributed.signals import interruptible
from babel_jax.errors import BadInput
from babel_jax.evaluation.points import point_file, point_names, read_points
from babel_jax.lease import seems_held
from babel_jax.places import pull, url_of
from babel_jax.progress import interval
from babel_jax.report.page import PAGE, write_report
from babel_jax.report.run_status import run_status
from babel_jax.run_files import DuringLine, StepLine, read_last_lines
from babel_jax.training.watch import DURING

_METRICS = "metrics.jsonl"
_MEAN_OF = 20  # steps, for figures that vary from step to step
_CLEAR = "\x1b[H\x1b[2J"  # a terminal: to the first line, and all erased


def watch_run(
    run_folder: Path,
    every: float,
    show: Callable[[str], object] | None,
    wait: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Shows the state of a run every so many seconds until it is finished or Ctrl-C comes, or once where
    `show` is None; returns the last state, with `summary`.

    If there is no such folder yet, waits for it. Raises BadInput for a folder that is none of a run, and
    without `show` for one that is not there.
    """
    while True:
        if show is not None and url_of(run_folder) is None and not run_folder.exists():
            state = _not_begun(run_folder)
        else:
            state = run_state(run_folder)
        if show is None or state["finished"]:
            return state
        show(state["summary"])
        try:
            with interruptible("leaving; the run continues"):
                wait(every)
        except KeyboardInterrupt:
            return state


def _not_begun(run_folder: Path) -> dict[str, Any]:
    summary = f"{run_folder}: no such folder yet; waiting for a run with this `out` to begin"
    return {"out": str(run_folder), "finished": False, "summary": summary}


def on_terminal(text: str) -> None:
    """Clears the terminal and shows a text."""
    sys.stdout.write(f"{_CLEAR}{text}\n(Ctrl-C leaves; the run continues)\n")
    sys.stdout.flush()


def with_page(
    run_folder: Path, every: float, show: Callable[[str], object] | None
) -> Callable[[str], object]:
    """Shows a text with `show`, and writes the run's page, which a browser loads again every so many
    seconds.
    """

    def shown(text: str) -> None:
        if run_folder.exists():
            write_report(run_folder, run_folder / PAGE, refresh=max(1, round(every)))
        if show is not None:
            show(text)

    return shown


def run_state(run_folder: Path) -> dict[str, Any]:
    """{"out", "finished", "stopped", "step", "total_steps", "stage", "loss", "rate", "gradient_norm",
    "tokens_per_second", "seconds_left", "languages", "summary"}; values of steps are absent before the first.

    stopped: True if no process seems to be at work in the folder of an unfinished run; None in a bucket.
    """
    # Of a run in a bucket, only these files are fetched: checkpoints are large.
    pull(run_folder, lambda name: name in (_METRICS, "config.toml") or name.startswith("evaluation/"))
    status = run_status(run_folder)
    lines = read_last_lines(run_folder / _METRICS, StepLine, _MEAN_OF)
    if not lines:
        if not run_folder.is_dir():
            raise BadInput(f"{run_folder}: no such run folder; give the `out` of its config")
        return {"out": status["out"], "finished": status["finished"], "summary": status["summary"]}
    last, recent = lines[-1], lines
    step, total = last["step"] + 1, last.get("total_steps")
    # The time left follows from the last steps: earlier ones may be of another stage or machine.
    seconds = _mean(recent, "seconds")
    left = None if total is None or seconds is None else seconds * (total - step)
    state: dict[str, Any] = {
        "out": status["out"],
        "finished": status["finished"],
        "stopped": None if url_of(run_folder) else not (status["finished"] or seems_held(run_folder)),
        "step": step,
        "total_steps": total,
        "stage": last["stage"],
        "loss": _mean(recent, "loss"),
        "rate": last.get("rate"),
        "gradient_norm": _mean(recent, "gradient_norm"),
        "tokens_per_second": _mean(recent, "tokens_per_second"),
        "seconds_left": left,
        "languages": _languages(run_folder, last, recent),
    }
    return state | {"summary": "\n".join(_text(state))}


def _languages(
    run_folder: Path, last: dict[str, Any], recent: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """For each language the loss, the tokens, the passes over its text, and the last bits per byte."""
    scores = _newest_scores(run_folder)
    languages: dict[str, dict[str, Any]] = {}
    for code, tokens in last.get("tokens_by_language", {}).items():
        # A small batch has no window of some languages.
        known = []
        for line in recent:
            loss = line.get("loss_by_language", {}).get(code)
            if loss is not None:
                known.append(loss)
        languages[code] = {
            "loss": sum(known) / len(known) if known else None,
            "tokens": tokens,
            "passes": last.get("epochs_by_language", {}).get(code),
            "bits_per_byte": scores[code]["score"] if code in scores else None,
        }
    return languages


def _newest_scores(run_folder: Path) -> Mapping[str, Any]:
    """The last measured bits per byte by language: between steps, or at a point of the run."""
    # By the time of writing: the file of a point does not say at which step it was measured.
    measured: list[tuple[float, Mapping[str, Any]]] = []
    between = run_folder / "evaluation" / DURING
    if lines := read_last_lines(between, DuringLine, 1):
        measured.append((between.stat().st_mtime, lines[-1]["tasks"].get("bits_per_byte", {})))
    # A run that has just begun has no config yet, and no point.
    if (run_folder / "config.toml").is_file():
        names = point_names(load_config(run_folder / "config.toml"))
        for name, results in read_points(run_folder, names).items():
            written = point_file(run_folder, name).stat().st_mtime
            measured.append((written, results.get("bits_per_byte", {})))
    return max(measured, key=lambda pair: pair[0])[1] if measured else {}


def _mean(lines: list[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return sum(values) / len(values) if values else None


def _text(state: dict[str, Any]) -> Iterator[str]:
    left = "time left unknown"
    if state["finished"]:
        left = "finished"
    elif state["stopped"]:
        left = "stopped: no process is at work in it; the command that began it resumes"
    elif state["seconds_left"] is not None:
        left = f"{interval(state['seconds_left'])} left"
    of = "" if state["total_steps"] is None else f" of {state['total_steps']:,}"
    yield f"{state['out']}: step {state['step']:,}{of}, stage {state['stage']}, {left}"
    yield (
        f"loss {_shown(state['loss'], '.4f')} nats/token, rate {_shown(state['rate'], '.2e')}, gradient norm "
        f"{_shown(state['gradient_norm'], '.2f')}, {_shown(state['tokens_per_second'], ',.0f')} tokens/s "
        f"(means of {_MEAN_OF} steps)"
    )
    yield f"{'language':<9} {'nats/token':>10} {'tokens':>15} {'passes':>7} {'bits/byte':>10}"
    for code, row in state["languages"].items():
        loss, passes, bits = row["loss"], row["passes"], row["bits_per_byte"]
        yield (
            f"{code:<9} {_shown(loss, '.4f'):>10} {row['tokens']:>15,} {_shown(passes, '.2f'):>7} "
            f"{_shown(bits, '.4f'):>10}"
        )
    install = "" if importlib.util.find_spec("tensorboard") else " (after pip install tensorboard)"
    yield f"curves: tensorboard --logdir {state['out']}/tensorboard{install}"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
