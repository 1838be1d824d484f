"""`babel rehearse`: the whole run of a config on forced CPU devices, its mesh axes kept, its widths and
budgets scaled down.

One process begins the run on the pod's axes and is preempted; another resumes it on another mesh, is
preempted again, and resumes it on the pod's axes to its end. What ran is then read from the run folder, not
from what was meant to run.
"""

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from babel_jax.config import Config
from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.errors import BadInput
from babel_jax.evaluation.points import point_names, read_points
from babel_jax.files import make_folder
from babel_jax.model.parallel import RING
from babel_jax.model_folders.folder import open_folder
from babel_jax.recipe.rehearsal_config import (
    PREEMPTED_AFTER,
    SEQ_LEN,
    Mesh,
    check_divides,
    other_mesh,
    scaled_config,
    scaled_mesh,
    scaled_shape,
)
from babel_jax.recipe.rehearsal_text import write_model, write_sources, write_tokenizer
from babel_jax.run_files import DuringLine, StepLine, read_lines
from babel_jax.tpu.shapes import Base, expanded, made_up_base, trained_shape
from babel_jax.training.watch import DURING

log = logging.getLogger("babel")

# The programs are tiny and run a few times: LLVM is not to spend minutes on them.
_QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# A busy laptop gives one of sixteen devices its turn late: XLA ends a process after 40 s of waiting, here
# after 5 minutes.
_PATIENT = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=300"
)
_PREEMPTED = "preempted: "
_DATA = {"heldout_fraction": 0.25, "heldout_bytes": 400, "workers": 1, "engine": "local"}


class Point(NamedTuple):
    """A thing that a run does: whether it ran, and what shows so."""

    what: str
    ran: bool
    how: str


def rehearse(
    config: Config, devices: int = 16, slices: int = 1, configs: Path | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Rehearses a run in the folder `out`, or in one that is removed afterwards; `configs` as for `base_of`.

    Returns {"devices", "mesh", "other_mesh", "points": [{"what", "ran", "how"}], "seconds", "summary"}.
    Raises BadInput for a mesh that does not scale down to so many devices, for what the run itself refuses,
    and where anything of the run did not run.
    """
    start = time.monotonic()
    mesh = scaled_mesh(config.training.mesh, devices, slices)
    base, made_up = made_up_base(config, configs)
    check_divides(config, trained_shape(config, base.config))
    if out is not None and out.exists() and any(out.iterdir()):
        raise BadInput(f"{out}: not empty; give a new folder for the rehearsal")
    with _folder(out) as folder:
        scaled, small, text = _prepared(config, base, mesh, folder)
        if made_up:
            log.info(
                "%s: not there, so the rehearsal's model has the layers that the config needs, %d",
                config.model.folder,
                base.config.num_hidden_layers,
            )
        log.info("rehearsal on %s, resumed on %s", _words(mesh), _words(other_mesh(mesh)))
        told: list[str] = []
        seen = []
        first, second = PREEMPTED_AFTER
        begun: list[dict[str, Any]] = [{"mesh": mesh, "preempt_after": first}]
        resumed: list[dict[str, Any]] = [
            {"mesh": other_mesh(mesh), "preempt_after": second},
            {"mesh": mesh, "preempt_after": None},
        ]
        for number, own in enumerate([begun, resumed] if scaled.stages else [resumed[1:]]):
            seen.append(_run(scaled, small, own, folder / f"programs-{number}.json", devices, told))
        points = _points(config, scaled, small, mesh, told, seen, text)
    table = _table(points)
    if failed := [point for point in points if not point.ran]:
        log.info("%s", table)
        raise BadInput(
            f"the rehearsal did not pass: {failed[0].what}: {failed[0].how}"
            + (f"; and {len(failed) - 1} more" if failed[1:] else "")
        )
    seconds = time.monotonic() - start
    return {
        "devices": devices,
        "mesh": mesh,
        "other_mesh": other_mesh(mesh),
        "points": [point._asdict() for point in points],
        "seconds": seconds,
        "summary": (
            f"{table}\nall of it ran, on {devices} CPU devices in {seconds:.0f} s; memory on the pod: babel "
            "plan"
        ),
    }


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        make_folder(out)
        yield out.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="babel-rehearsal-") as folder:
        yield Path(folder)


def _prepared(config: Config, base: Base, mesh: Mesh, folder: Path) -> tuple[Config, Base, str]:
    """The scaled config and base, and what its text is; text, tokenizer and model are written into the
    folder.
    """
    sources, own = write_sources(config, folder / "text")
    corpus = embedded_corpus()
    tokenizer = folder / "tokenizer"
    entries = write_tokenizer(tokenizer, [row.text for rows in corpus.values() for row in rows])
    small = Base(scaled_shape(base.config, mesh, entries), base.new_layers)
    data = {
        **_DATA,
        "folder": str(folder / "data"),
        "seq_len": SEQ_LEN,
        "sources": sources,
        "tokenizer": str(tokenizer),
    }
    model: dict[str, Any] = {"shape": small.config.model_dump(mode="json", exclude_none=True)}
    if config.model.folder is not None:
        write_model(folder / "model", small.config, tokenizer)
        model = {"folder": str(folder / "model")}
    codes = ", ".join(dict.fromkeys(source["language"] for source in sources))
    text = f"{codes}; the package's own text" + (
        f", but of {', '.join(own)} the first rows of data.sources" if own else ""
    )
    return scaled_config(config, mesh, data, model, folder / "run"), small, text


def _run(
    config: Config, base: Base, runs: list[dict[str, Any]], seen: Path, devices: int, told: list[str]
) -> dict[str, Any]:
    """One process of the rehearsal; adds what it says of preemptions to `told`, and gives which programs it
    compiled.
    """
    request = {
        "config": json.loads(config.model_dump_json(exclude_none=True)),
        "runs": runs,
        "seen": str(seen),
    }
    request |= {
        "base": json.loads(base.config.model_dump_json(exclude_none=True)),
        "new_layers": list(base.new_layers),
    }
    package = str(Path(__file__).parents[2])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {_QUICK_TO_COMPILE} {_PATIENT}",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # see training.compilation.compiled_in
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    lines: list[str] = []
    command = [sys.executable, "-m", "babel_jax.recipe.rehearsal_worker"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stderr is not None
        try:
            worker.stdin.write(json.dumps(request))
            worker.stdin.close()
            for line in worker.stderr:
                lines.append(line.rstrip())
                log.info("  %s", line.rstrip())
        finally:
            if worker.poll() is None and sys.exc_info()[0] is not None:
                worker.kill()
    told += [line.removeprefix(_PREEMPTED) for line in lines if line.startswith(_PREEMPTED)]
    if worker.returncode == 0:
        found: dict[str, Any] = json.loads(seen.read_text())
        return found
    raise BadInput(f"the rehearsal stopped with status {worker.returncode}: {_said(lines)}")


def _said(lines: list[str]) -> str:
    """The line of a process that says why it ended: the project's own, or that of XLA about devices that
    waited for each other, or the last one."""
    own = [line.removeprefix("babel: ") for line in lines if line.startswith("babel: ")]
    waited = [line for line in lines if "Termination timeout" in line]
    if own:
        return own[-1]
    if waited:
        return (
            "devices waited for each other for minutes; if this machine is busy, give fewer --devices, else "
            "it is a bug of this program"
        )
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def _points(
    config: Config,
    scaled: Config,
    base: Base,
    mesh: Mesh,
    told: list[str],
    seen: list[dict[str, Any]],
    text: str,
) -> list[Point]:
    """What ran, read from the run folder."""
    out = Path(scaled.out)
    steps = {line["step"]: line for line in read_lines(out / "metrics.jsonl", StepLine)}
    points = [
        Point("text", (Path(scaled.data.folder)).is_dir(), f"{text}; windows of {scaled.data.seq_len} tokens")
    ]
    first, last = expanded(scaled, base.config), trained_shape(scaled, base.config)
    measured = read_points(out, point_names(scaled))
    before = (
        [] if scaled.model.folder is None else ["base"] if scaled.expansion is None else ["base", "expanded"]
    )
    if scaled.expansion is not None:
        layers = f"{base.config.num_hidden_layers} layers to {first.num_hidden_layers}"
        points.append(Point("expansion", "expanded" in measured or scaled.model.folder is None, layers))
    for number, stage in enumerate(scaled.stages):
        own = [
            steps[step]
            for step in range(number * stage_steps(scaled), (number + 1) * stage_steps(scaled))
            if step in steps
        ]
        finite = [line["loss"] for line in own if line["loss"] is not None and math.isfinite(line["loss"])]
        how = f"{len(own)} steps, {len(finite)} finite losses, training {stage.train.replace('_', ' ')}"
        points.append(Point(f"stage {stage.name}", len(finite) == stage_steps(scaled), how))
    for deepening in scaled.deepen:
        points.append(
            Point(
                f"deepening at step {deepening.step}",
                deepening.step in steps,
                f"to {last.num_hidden_layers} layers in the end",
            )
        )
    if scaled.stages:
        points.append(
            Point("preemption", bool(told), told[0] if told else "no SIGTERM came before the stage's end")
        )
        resumed = (
            f"{told[1]}, on {_words(other_mesh(mesh))}"
            if len(told) > 1
            else "the second preemption did not come"
        )
        points.append(Point("resumed on another mesh", len(told) > 1, resumed))
    for name in (*before, *(stage.result for stage in scaled.stages)):
        tasks = measured.get(name, {})
        counts = ", ".join(f"{task.replace('_', ' ')} of {len(own)}" for task, own in tasks.items())
        points.append(
            Point(f"evaluation {name}", bool(tasks.get("bits_per_byte")), counts and f"{counts} languages")
        )
    if scaled.evaluation.every is not None:
        during = read_lines(out / "evaluation" / DURING, DuringLine)
        points.append(
            Point(
                "evaluation between steps",
                bool(during),
                f"after {', '.join(str(line['step']) for line in during)} steps",
            )
        )
    hf = out / "hf"
    exported = open_folder(hf).config.num_hidden_layers if hf.is_dir() else 0
    points.append(
        Point("export", exported == last.num_hidden_layers, f"{exported} layers in {config.export_dtype}")
    )
    points.append(
        Point(
            "samples and report",
            (out / "samples.json").is_file() and (out / "report.html").is_file(),
            "samples.json, report.html",
        )
    )
    missing = list(dict.fromkeys(one for part in seen for one in part["missing"]))
    names = sorted({name for part in seen for name in part["programs"]})
    how = (
        f"{len(names)} kinds of programs, each in the list of babel plan"
        if not missing
        else f"not in the list of babel plan: {', '.join(missing)}"
    )
    points.append(Point("programs", not missing, how))
    return points


def stage_steps(config: Config) -> int:
    """The steps of each stage of a rehearsal."""
    return config.stages[0].steps or 0


def _table(points: list[Point]) -> str:
    width = max(len(point.what) for point in points)
    return "\n".join(
        f"{'ran' if point.ran else 'NOT':<4} {point.what:<{width}}  {point.how}" for point in points
    )


def _words(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1 or axis == RING)
