"""Compiles the programs of a run in a process of its own, and reads its measurements."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from babel_jax.config import Config
from babel_jax.errors import BadInput
from babel_jax.progress import Work
from babel_jax.tpu.shapes import Base
from babel_jax.workers import send

log = logging.getLogger("babel")


class Which(StrEnum):
    """The programs to compile: all of `babel train` (or sft), its last train step alone, all but train steps,
    or those of `babel evaluate`.
    """

    TRAIN = "train"
    STEP = "step"
    REST = "rest"
    EVALUATE = "evaluate"


# libtpu must not ask for its host's name, and the plugin for CUDA must not look for a card.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
}

# In libtpu's warning about an option that is not for the chip; "incorrect results, hang, SDC" come after it.
_UNSAFE = "not supported/recommended"


def compiled_programs(
    config: Config, base: Base, target: str, request: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The measurements of each program by `tpu.worker`, in the order of the run.

    The compiler runs in a separate process, which needs neither an accelerator nor a network. target: the
    name of the machine, for the log. request: the keys of the worker's request beside the model and the
    config. Raises BadInput for what the worker refuses.
    """
    log.info("compiling for %s; a program of a large model takes minutes", target)
    request = {
        "config": json.loads(config.model_dump_json(exclude_none=True)),
        "base": base.to_json(),
        **request,
    }
    # The worker must import this package, also if it is not installed.
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "babel_jax.tpu.worker"]
    measurements: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as logs,
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            env=environment | {"TPU_LOG_DIR": logs},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C must reach only the parent process
        ) as worker,
        Work[Any]("compiling", unit="programs") as progress,
    ):
        assert worker.stdout is not None
        try:
            send(worker, request)
            for line in worker.stdout:
                message = json.loads(line)
                if "bad_input" in message:
                    raise BadInput(message["bad_input"])
                # The first message is the list of programs, which gives the progress its total.
                if "programs" in message:
                    progress.total = len(message["programs"])
                    continue
                measurements.append(message)
                progress.note(message["name"])
                progress.update()
        finally:
            # It is finished, or its results are no longer needed.
            worker.kill()
        worker.wait()
        _tell_warnings(Path(logs))
        if not measurements or len(measurements) != progress.total:
            errors.seek(0)
            raise RuntimeError(
                f"the compiler stopped with status {worker.returncode}:\n{errors.read()[-4000:]}"
            )
    return measurements


def _tell_warnings(logs: Path) -> None:
    """Logs the warnings of libtpu about options that are unsafe on the chip, each once."""
    warnings: dict[str, None] = {}
    for path in sorted(logs.glob("*.log.WARNING.*")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if _UNSAFE in line:
                warnings[line.partition("] ")[2]] = None
    for warning in warnings:
        log.warning("the compiler warns (its options: training.compiler_options): %s", warning)
