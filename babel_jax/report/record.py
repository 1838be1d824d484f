"""The content of a run folder, read once for all reports.

A run that is not finished has only some of it.
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
from babel_jax.evaluation.items import Measured
from babel_jax.evaluation.points import point_names, read_items, read_points
from babel_jax.evaluation.suite import Results
from babel_jax.expansion.card import plans_of
from babel_jax.expansion.plan import ExpansionPlan
from babel_jax.languages import LANGUAGES, in_order
from babel_jax.model_files import CONFIG
from babel_jax.places import pull
from babel_jax.run_files import (
    Best,
    DuringLine,
    Evaluation,
    GoodputFile,
    Sample,
    StageMixture,
    StepLine,
    Summary,
    is_beside_checkpoints,
    read_as,
    read_lines,
)
from babel_jax.training.watch import BEST, DURING

SAMPLES, PARENT_SAMPLES = "samples.json", "samples-parent.json"
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
    """A run folder.

    - points: results, and items: scored items, by point
    - steps: the lines of metrics.jsonl
    - during: the lines of evaluation/during.jsonl; best: the best of them
    - mixtures: by stage
    - plans: the expansions, each with the name of its source model
    - samples, and parent_samples of the model that the run began with: {language: {"prompt", "text"}}
    - goodput: seconds by use; until: seconds since 1970 at its last line
    """

    folder: Path
    config: Config
    points: dict[str, Results]
    items: dict[str, Measured]
    steps: list[dict[str, Any]]
    during: list[dict[str, Any]]
    best: dict[str, Any]
    mixtures: dict[str, dict[str, Any]]
    plans: list[tuple[str, ExpansionPlan]]
    samples: dict[str, dict[str, str]]
    parent_samples: dict[str, dict[str, str]]
    goodput: dict[str, float]
    until: float | None
    summary: dict[str, Any]

    @property
    def own_points(self) -> list[str]:
        """The points of the run itself that have been evaluated, in order; `points` also has other models."""
        return [name for name in point_names(self.config) if name in self.points]

    @property
    def languages(self) -> list[str]:
        """The languages of its training and evaluation, in the registry's order."""
        codes: set[str] = set()
        for mixture in self.mixtures.values():
            codes.update(row["language"] for row in mixture["rows"])
        for results in self.points.values():
            codes.update(*results.values())
        return in_order(codes)


def run_name(run_folder: Path) -> str:
    """The name of a run for readers: its folder's; for the `run` in a demo's folder, that of the demo."""
    folder = run_folder.resolve()
    return folder.parent.name if folder.name == "run" else folder.name


def run_folder_of(path: Path | str) -> Path:
    """The run folder itself, or the one in a demo's folder. Raises BadInput for any other folder."""
    path = Path(path)
    pull(path, is_beside_checkpoints)
    for folder in (path, path / "run"):
        if (folder / "config.toml").is_file():
            return folder
    raise BadInput(f"{path}: not a run folder (it has no config.toml), nor a demo's; name the `out` of a run")


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder. Raises BadInput for a config that cannot be read."""
    config = load_config(folder / "config.toml")
    run_points = read_points(folder, point_names(config))
    points = dict(run_points)
    # Also the results of `babel evaluate` in this folder: of the model, and of baselines.
    for path in sorted((folder / "evaluation").glob("*.json")):
        if path.stem in run_points or "tasks" not in _object(path, Any):
            continue
        # An evaluation has its own model and the models that it was compared with.
        evaluation = read_as(path, Evaluation)
        models = {evaluation.get("model", path.stem): evaluation, **evaluation.get("baselines", {})}
        for name, results in models.items():
            if name not in run_points:
                points[name] = {**points.get(name, {}), **results["tasks"]}
    # A folder from elsewhere may have languages that nobody declared here: they have no name to show.
    for name, results in points.items():
        points[name] = _of_known_languages(results)
    goodput = _object(folder / "goodput.json", GoodputFile)
    return RunRecord(
        folder,
        config,
        points,
        read_items(folder, point_names(config)),
        read_lines(folder / "metrics.jsonl", StepLine),
        read_lines(folder / "evaluation" / DURING, DuringLine),
        _object(folder / "evaluation" / BEST, Best),
        _object(folder / "mixture.json", dict[str, StageMixture]),
        plans_of(_object(folder / "hf" / CONFIG, dict[str, Any])),
        _object(folder / SAMPLES, dict[str, Sample]),
        _object(folder / PARENT_SAMPLES, dict[str, Sample]),
        goodput.get("seconds", {}),
        goodput.get("until"),
        _object(folder / "summary.json", Summary),
    )


def _of_known_languages(results: Results) -> Results:
    """Results without languages that neither the registry nor the run's config has."""
    known: dict[str, Any] = {}
    for task, by_language in results.items():
        known[task] = {code: score for code, score in by_language.items() if code in LANGUAGES}
    return known


def versions() -> dict[str, str]:
    """The versions of packages, and the devices of this process."""
    by_package = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        **by_package,
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "processes": str(jax.process_count()),
    }


def _object(path: Path, kind: Any) -> dict[str, Any]:
    """The object in a file; empty if the file does not exist, as in an unfinished run.

    Raises BadInput for a damaged file.
    """
    try:
        values = read_as(path, kind)
    except FileNotFoundError:
        return {}
    return values if isinstance(values, dict) else {}
