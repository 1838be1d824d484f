"""`babel rehearse`: the whole run of a config on forced CPU devices, with the same mesh axes, and with widths
and budgets scaled down.

One process begins the run on the pod's axes and is preempted. Another process resumes it on another mesh, is
preempted again, and resumes it on the pod's axes to its end. The report is then read from the run folder:
from the parts that ran, not from those that were planned.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from babel_jax.config import Config, ModelConfig
from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.errors import BadInput
from babel_jax.evaluation.points import point_names, read_points
from babel_jax.files import make_folder
from babel_jax.model.parallel import RING
from babel_jax.model_folders.folder import open_folder
from babel_jax.recipe.rehearsal_config import (
    NEW_ROWS,
    PREEMPTED_AFTER,
    SEQ_LEN,
    Mesh,
    check_divides,
    other_mesh,
    scaled_config,
    scaled_mesh,
    scaled_shape,
    scaled_vocabulary,
)
from babel_jax.recipe.rehearsal_text import (
    write_model,
    write_sources,
    write_tokenizer,
    write_vocabulary_text,
)
from babel_jax.run_files import DuringLine, StepLine, read_lines
from babel_jax.tpu.shapes import Base, expanded, made_up_base, trained_shape
from babel_jax.training.watch import DURING
from babel_jax.workers import send

log = logging.getLogger("babel")

# The programs are tiny and run a few times, so LLVM should not spend minutes on them.
_QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# On a busy laptop, one of sixteen devices may run late. By default, XLA ends a process after 40 s of waiting;
# here after 5 minutes.
_PATIENT = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=300"
)
_PREEMPTED = "preempted: "
_DATA = {"heldout_fraction": 0.25, "heldout_bytes": 400, "workers": 1, "engine": "local"}


class Point(NamedTuple):
    """A part of a run, True if it ran, and the evidence."""

    what: str
    ran: bool
    how: str


def rehearse(
    config: Config, devices: int = 16, slices: int = 1, configs: Path | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Rehearses a run in the folder `out`, or in a temporary one; `configs` as for `base_of`.

    Returns {"devices", "mesh", "other_mesh", "points": [{"what", "ran", "how"}], "seconds", "summary"}.
    Raises BadInput for a mesh that cannot be scaled down to so many devices, for any error of the run, and if
    a part of the run did not run.
    """
    start = time.monotonic()
    mesh = scaled_mesh(config.training.mesh, devices, slices)
    base, made_up = made_up_base(config, configs)
    # The parent is on the mesh too, with the rows that it has.
    for shape in (base.config, trained_shape(config, base.config)):
        check_divides(config, shape)
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
        log.info("rehearsal on %s, resumed on %s", _mesh_text(mesh), _mesh_text(other_mesh(mesh)))

        # The runs of each process. Without stages nothing can be preempted.
        # One process begins. A second one resumes twice: on another mesh, and on the first mesh again.
        first, second = PREEMPTED_AFTER
        begun: list[dict[str, Any]] = [{"mesh": mesh, "preempt_after": first}]
        resumed: list[dict[str, Any]] = [
            {"mesh": other_mesh(mesh), "preempt_after": second},
            {"mesh": mesh, "preempt_after": None},
        ]
        processes = [begun, resumed] if scaled.stages else [resumed[1:]]
        preemptions: list[str] = []
        programs = []
        for number, runs in enumerate(processes):
            file = folder / f"programs-{number}.json"
            programs.append(_run(scaled, small, runs, file, devices, preemptions))
        points = _points(config, scaled, small, mesh, preemptions, programs, text)
    table = _table(points)
    if failed := [point for point in points if not point.ran]:
        log.info("%s", table)
        more = f"; and {len(failed) - 1} more" if failed[1:] else ""
        raise BadInput(f"the rehearsal did not pass: {failed[0].what}: {failed[0].how}{more}")
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
    """The scaled config and base, and a description of the text. Writes text, tokenizer and model into the
    folder.
    """
    sources, user_languages = write_sources(config, folder / "text")
    corpus = embedded_corpus()
    tokenizer = folder / "tokenizer"
    entries = write_tokenizer(tokenizer, [row.text for rows in corpus.values() for row in rows])
    rows = tuple(range(entries - NEW_ROWS, entries)) if base.new_rows else ()
    small = Base(scaled_shape(base.config, mesh, entries), base.new_layers, rows)

    # The rehearsal has its own text, tokenizer and window length; other settings of data stay.
    # The folders and sizes of the rehearsal replace those of the config.
    data = {
        **_DATA,
        "folder": str(folder / "data"),
        "seq_len": SEQ_LEN,
        "sources": sources,
        "tokenizer": str(tokenizer),
    }
    model: dict[str, Any] = {"shape": small.config.model_dump(mode="json", exclude_none=True)}
    if config.model.folder is not None:
        write_model(folder / "model", small, tokenizer)
        model = {"folder": str(folder / "model")}
    vocabulary = None
    if config.vocabulary is not None:
        write_vocabulary_text(config, sources, folder / "vocabulary-text")
        vocabulary = scaled_vocabulary(config, folder / "vocabulary-text", folder / "model")
    codes = ", ".join(dict.fromkeys(source["language"] for source in sources))
    text = f"{codes}; the package's own text"
    if user_languages:
        text += f", but of {', '.join(user_languages)} the first rows of data.sources"
    return scaled_config(config, mesh, data, model, vocabulary, folder / "run"), small, text


def _run(
    config: Config,
    base: Base,
    runs: list[dict[str, Any]],
    programs: Path,
    devices: int,
    preemptions: list[str],
) -> dict[str, Any]:
    """Runs one process of the rehearsal and returns the programs that it compiled, which it writes into the
    file `programs`. Its lines about preemptions are added to `preemptions`.
    """
    request = {
        "config": json.loads(config.model_dump_json(exclude_none=True)),
        "runs": runs,
        "seen": str(programs),
        "base": base.to_json(),
    }
    package = str(Path(__file__).parents[2])
    # The worker has a CPU with many devices, whatever this process uses.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    # As many CPU devices as asked for, in one process.
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {_QUICK_TO_COMPILE} {_PATIENT}",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # see training.compilation.compiled_in
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }

    # The worker's log is shown as it comes; its last lines name the reason of a failure.
    lines: list[str] = []
    command = [sys.executable, "-m", "babel_jax.recipe.rehearsal_worker"]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C must reach only the parent process
    ) as worker:
        assert worker.stderr is not None
        try:
            send(worker, request)
            for line in worker.stderr:
                lines.append(line.rstrip())
                log.info("  %s", line.rstrip())
            worker.wait()
        finally:
            if worker.poll() is None and sys.exc_info()[0] is not None:
                worker.kill()
    preemptions += [line.removeprefix(_PREEMPTED) for line in lines if line.startswith(_PREEMPTED)]
    if worker.returncode == 0:
        compiled: dict[str, Any] = json.loads(programs.read_text())
        return compiled
    raise BadInput(f"the rehearsal stopped with status {worker.returncode}: {_reason(lines)}")


def _reason(lines: list[str]) -> str:
    """The reason why a process ended: this project's error line, or XLA's line about devices that waited for
    each other, or else the last line.
    """
    # The last line of ours is the reason; lines before it may be warnings.
    errors = [line.removeprefix("babel: ") for line in lines if line.startswith("babel: ")]
    waited = [line for line in lines if "Termination timeout" in line]
    if errors:
        return errors[-1]
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
    preemptions: list[str],
    programs: list[dict[str, Any]],
    text: str,
) -> list[Point]:
    """The parts of the run, read from the run folder, with True for those that ran."""
    last = trained_shape(scaled, base.config)
    evaluated = read_points(Path(scaled.out), point_names(scaled))
    return [
        *_points_before_training(scaled, base, evaluated, text),
        *_training_points(scaled, last, mesh, preemptions),
        *_evaluation_points(scaled, evaluated),
        *_file_points(config, Path(scaled.out), last),
        _programs_point(programs),
    ]


def _points_before_training(
    scaled: Config, base: Base, evaluated: Mapping[str, Any], text: str
) -> list[Point]:
    """Text, vocabulary and expansion. evaluated: the results of the points of the run."""
    windows = f"{text}; windows of {scaled.data.seq_len} tokens"
    points = [Point("text", Path(scaled.data.folder).is_dir(), windows)]
    first = expanded(scaled, base.config)
    if scaled.vocabulary is not None:
        rows = f"{base.config.vocab_size:,} rows to {first.vocab_size:,}"
        how = f"{rows}, for {scaled.vocabulary.tokens} new tokens"
        points.append(Point("vocabulary", "extended" in evaluated, how))
    if scaled.expansion is not None:
        layers = f"{base.config.num_hidden_layers} layers to {first.num_hidden_layers}"
        # A model of random weights is made with all layers, and not evaluated before training.
        ran = "expanded" in evaluated or scaled.model.folder is None
        points.append(Point("expansion", ran, layers))
    return points


def _training_points(scaled: Config, last: ModelConfig, mesh: Mesh, preemptions: list[str]) -> list[Point]:
    """Stages, deepenings and preemptions. last: the model at the end."""
    points = []
    steps = {line["step"]: line for line in read_lines(Path(scaled.out) / "metrics.jsonl", StepLine)}
    for number, stage in enumerate(scaled.stages):
        # Every step of a stage must have left a line with a finite loss.
        numbers = range(number * stage_steps(scaled), (number + 1) * stage_steps(scaled))
        losses = [steps[step]["loss"] for step in numbers if step in steps]
        finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        how = f"{len(losses)} steps, {len(finite)} finite losses, training {stage.train.replace('_', ' ')}"
        points.append(Point(f"stage {stage.name}", len(finite) == stage_steps(scaled), how))
    for deepening in scaled.deepen:
        how = f"to {last.num_hidden_layers} layers in the end"
        points.append(Point(f"deepening at step {deepening.step}", deepening.step in steps, how))
    if scaled.stages:
        how = preemptions[0] if preemptions else "no SIGTERM came before the stage's end"
        points.append(Point("preemption", bool(preemptions), how))
        how = "the second preemption did not come"
        if len(preemptions) > 1:
            how = f"{preemptions[1]}, on {_mesh_text(other_mesh(mesh))}"
        points.append(Point("resumed on another mesh", len(preemptions) > 1, how))
    return points


def _evaluation_points(scaled: Config, evaluated: Mapping[str, Any]) -> list[Point]:
    """The evaluation at each point and between steps. evaluated: the results of the points of the run."""
    # A model of random weights has no points before training.
    before_training = []
    if scaled.model.folder is not None:
        before_training = ["base"]
        before_training += ["extended"] if scaled.vocabulary is not None else []
        before_training += ["expanded"] if scaled.expansion is not None else []
    points = []
    # A stage may have the result "base", as in tiny-base.toml.
    for name in [*before_training, *(stage.result for stage in scaled.stages)]:
        tasks = evaluated.get(name, {})
        counts = ", ".join(f"{task.replace('_', ' ')} of {len(by_code)}" for task, by_code in tasks.items())
        how = counts and f"{counts} languages"
        points.append(Point(f"evaluation {name}", bool(tasks.get("bits_per_byte")), how))
    if scaled.evaluation.every is not None:
        during = read_lines(Path(scaled.out) / "evaluation" / DURING, DuringLine)
        numbers_of_steps = ", ".join(str(line["step"]) for line in during)
        points.append(Point("evaluation between steps", bool(during), f"after {numbers_of_steps} steps"))
    return points


def _file_points(config: Config, out: Path, last: ModelConfig) -> list[Point]:
    """The files at the end: the export must have the depth and the rows of the last model."""
    depth = rows = 0
    hf = out / "hf"
    if hf.is_dir():
        exported = open_folder(hf).config
        depth, rows = exported.num_hidden_layers, exported.vocab_size
    is_whole = (depth, rows) == (last.num_hidden_layers, last.vocab_size)
    how = f"{depth} layers, {rows:,} rows, in {config.export_dtype}"
    has_files = (out / "samples.json").is_file() and (out / "report.html").is_file()
    return [
        Point("export", is_whole, how),
        Point("samples and report", has_files, "samples.json, report.html"),
    ]


def _programs_point(programs: list[dict[str, Any]]) -> Point:
    """Every program that ran must be in the list that `babel plan` compiles."""
    missing: dict[str, None] = {}  # a dict keeps the order
    names: set[str] = set()
    for of_process in programs:
        missing |= dict.fromkeys(of_process["missing"])
        names.update(of_process["programs"])
    how = f"{len(names)} kinds of programs, each in the list of babel plan"
    if missing:
        how = f"not in the list of babel plan: {', '.join(missing)}"
    return Point("programs", not missing, how)


def stage_steps(config: Config) -> int:
    """The steps of each stage of a rehearsal."""
    return config.stages[0].steps or 0


def _table(points: list[Point]) -> str:
    width = max(len(point.what) for point in points)
    lines = []
    for point in points:
        lines.append(f"{'ran' if point.ran else 'NOT':<4} {point.what:<{width}}  {point.how}")
    return "\n".join(lines)


def _mesh_text(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1 or axis == RING)
