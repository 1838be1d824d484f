"""measurements.jsonl: every visit of a candidate as a line, so that a stopped `babel tune` resumes after the
last one.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from babel_jax.config import BESIDE_THE_STEP, Config, Stage
from babel_jax.distributed.agreement import agreed, first_text
from babel_jax.files import open_to_append
from babel_jax.model.decoder import count_parameters
from babel_jax.run_files import TuneLine, read_lines
from babel_jax.tpu.programs import planned_languages
from babel_jax.training.deepening import Depth
from babel_jax.tuning.candidates import Candidate

MEASUREMENTS = "measurements.jsonl"
# Settings of `training` that do not change the program of a step.
_WITHOUT_EFFECT = ("max_skipped_steps", *BESIDE_THE_STEP)
_LIBRARIES = ("babel-jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


def described_device() -> dict[str, Any]:
    """The devices of the job, and the versions of the libraries that compile for them."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "kind": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": versions,
    }


def described_step(config: Config, stage: Stage, model: Depth) -> dict[str, Any]:
    """The sizes of a step."""
    shape = model.config
    return {
        "stage": stage.name,
        "parameters": count_parameters(shape),
        "layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "global_batch_size": config.training.global_batch_size,
        "seq_len": config.data.seq_len,
    }


def mark_of(config: Config, stage: Stage, model: Depth) -> str:
    """A digest of all that decides the programs of the candidates and their time: the settings of the step,
    the model, the devices and the versions.
    """
    # Paths and budgets are left out: with other text of the same shapes the step takes as long.
    training = json.loads(config.training.model_dump_json(exclude=set(_WITHOUT_EFFECT)))
    decides = {
        "training": training,
        "optimizer": json.loads(config.optimizer.model_dump_json()),
        "model": json.loads(model.config.model_dump_json()),
        "trained": [str(stage.train), model.new_layers, model.new_rows],
        "text": [config.data.seq_len, config.data.conversations, planned_languages(config)],
        "device": described_device(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """The visits of the candidates of one config on these devices, by (key of the candidate, visit).

    Process 0 reads and writes the file; all processes have the same visits.
    """

    def __init__(self, folder: Path, mark: str, about: Mapping[str, Any]):
        """about: what each line says beside the measurement."""
        self._path, self._mark, self._about = folder / MEASUREMENTS, mark, dict(about)
        self._visits: dict[tuple[str, int], dict[str, Any]] = {}
        text = ""
        with agreed():
            if jax.process_index() == 0:
                # Lines with another mark are of other settings, devices or versions; they stay in the file.
                before = [line for line in read_lines(self._path, TuneLine) if line["mark"] == mark]
                text = json.dumps(before)
        for line in json.loads(first_text(text)):
            self._visits[json.dumps(line["changes"], sort_keys=True), line["visit"]] = line

    def __len__(self) -> int:
        return len(self._visits)

    def get(self, candidate: Candidate, visit: int) -> dict[str, Any] | None:
        """The line of a visit; None before it."""
        return self._visits.get((candidate.key, visit))

    def of(self, candidate: Candidate) -> Iterator[dict[str, Any]]:
        """The lines of a candidate, in the order of its visits."""
        for key, visit in sorted(self._visits):
            if key == candidate.key:
                yield self._visits[key, visit]

    def failure(self, candidate: Candidate) -> str | None:
        """Why a candidate did not run; None if it ran, or was not visited."""
        return next((line["failure"] for line in self.of(candidate) if line["failure"]), None)

    def add(self, candidate: Candidate, visit: int, measured: Mapping[str, Any]) -> None:
        """Writes a line. The times are those of process 0."""
        line = {"mark": self._mark, "changes": dict(candidate.changes), "visit": visit, **measured}
        # The other processes decide with the same figures.
        line = json.loads(first_text(json.dumps(line)))
        self._visits[candidate.key, visit] = line
        with agreed():
            if jax.process_index() == 0:
                with open_to_append(self._path) as file:
                    file.write(json.dumps(line | self._about).encode() + b"\n")
