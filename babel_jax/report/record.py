"""What stands in a run folder, read once for all that is said about it.

A run that is under way has less of it.
"""

import dataclasses
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax

from babel_jax.config import Config
from babel_jax.config.file import load_config
from babel_jax.errors import BadInput
from babel_jax.evaluation.points import point_names, read_points
from babel_jax.evaluation.suite import Results
from babel_jax.expansion.card import plans_of
from babel_jax.expansion.plan import ExpansionPlan
from babel_jax.languages import CODES
from babel_jax.model_folders.folder import CONFIG
from babel_jax.places import pull
from babel_jax.run_files import (
    Best,
    DuringLine,
    Evaluation,
    GoodputFile,
    Mixture,
    Sample,
    StepLine,
    Summary,
    is_beside_checkpoints,
    read_as,
    read_lines,
)
from babel_jax.training.watch import BEST, DURING

SAMPLES = "samples.json"
_PACKAGES = (
    "babel-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tokenizers",
    "numpy",
)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run folder. `steps` are the lines of metrics.jsonl, `during` those of evaluation/during.jsonl, `best`
    the best of these.

    `mixtures` are by stage, `plans` the expansions with what each was made from, `samples` {language:
    {"prompt", "text"}}, `goodput` seconds by what they went to.
    """

    folder: Path
    config: Config
    points: dict[str, Results]
    steps: list[dict[str, Any]]
    during: list[dict[str, Any]]
    best: dict[str, Any]
    mixtures: dict[str, dict[str, Any]]
    plans: list[tuple[str, ExpansionPlan]]
    samples: dict[str, dict[str, str]]
    goodput: dict[str, float]
    summary: dict[str, Any]

    @property
    def languages(self) -> list[str]:
        """The languages that it was trained or measured in, in the report's order."""
        trained = {row["language"] for mixture in self.mixtures.values() for row in mixture["rows"]}
        measured = {
            code for results in self.points.values() for scores in results.values() for code in scores
        }
        return [code for code in CODES if code in trained | measured]


def run_folder_of(path: Path | str) -> Path:
    """The run folder itself, or the one in a demo's folder. Raises BadInput for anything else."""
    path = Path(path)
    pull(path, is_beside_checkpoints)
    for folder in (path, path / "run"):
        if (folder / "config.toml").is_file():
            return folder
    raise BadInput(f"{path}: not a run folder (it has no config.toml), nor a demo's; name the `out` of a run")


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder. Raises BadInput for a config that cannot be read."""
    config = load_config(folder / "config.toml")
    own = read_points(folder, point_names(config))
    points = dict(own)
    # Beside the run's own points, any other file of that form: benchmarks that `babel evaluate` wrote there,
    # with those of baselines.
    for path in sorted((folder / "evaluation").glob("*.json")):
        if path.stem in own:
            continue
        found = _object(path, Any)
        if "tasks" in found:
            found = read_as(path, Evaluation)
            others = {found.get("model", path.stem): found, **found.get("baselines", {})}
            points |= {
                name: {**points.get(name, {}), **other["tasks"]}
                for name, other in others.items()
                if name not in own
            }
    return RunRecord(
        folder,
        config,
        points,
        read_lines(folder / "metrics.jsonl", StepLine),
        read_lines(folder / "evaluation" / DURING, DuringLine),
        _object(folder / "evaluation" / BEST, Best),
        _object(folder / "mixture.json", dict[str, Mixture]),
        plans_of(_object(folder / "hf" / CONFIG, dict[str, Any])),
        _object(folder / SAMPLES, dict[str, Sample]),
        _object(folder / "goodput.json", GoodputFile).get("seconds", {}),
        _object(folder / "summary.json", Summary),
    )


def versions() -> dict[str, str]:
    """What this process runs on: versions of packages, and the devices."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        **found,
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "processes": str(jax.process_count()),
    }


def _object(path: Path, kind: Any) -> dict[str, Any]:
    """The object in a file; empty where there is none, as in a run that is under way.

    Raises BadInput for a damaged file.
    """
    try:
        found = read_as(path, kind)
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}
