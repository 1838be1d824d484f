"""The config of a run folder, and the settings that may change when the run is started again."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from babel_jax.config import CHANGEABLE, Config
from babel_jax.config.file import parse_settings, read_toml
from babel_jax.distributed.agreement import agreed, first_text, same_on_all
from babel_jax.errors import BadInput
from babel_jax.files import remove_left_files
from babel_jax.lease import NAME as LEASE
from babel_jax.places import PARTIAL
from babel_jax.training.run_state import newest_step


def check_same(config: Config) -> None:
    """Raises BadInput on all processes if one was started with another config than process 0: they would wait
    for ever.
    """
    mine = config.model_dump(mode="json")
    if same_on_all(json.dumps(mine)):
        return
    first = json.loads(first_text(json.dumps(mine)))
    with agreed():
        if changed := _differences(first, mine):
            raise BadInput(
                "the processes were started with different configs: not as in process 0 is "
                f"{', '.join(changed)}; give all the same"
            )


def claim(run_folder: Path, config: Config) -> None:
    """Writes the resolved config into the run folder, or checks it against the one that is there.

    An earlier config is replaced if nothing was computed with it yet (as after a mistake in it), if it
    differs in deepenings that the run has not reached, or in settings that may change.
    """
    path = run_folder / "config.toml"
    if path.is_file():
        # Not below data/: prepared data may be in the run folder, and another process may be writing it.
        with contextlib.suppress(OSError):
            remove_left_files([*run_folder.iterdir(), *run_folder.glob("evaluation/*")])
    elif any(not file.name.endswith((PARTIAL, LEASE)) for file in run_folder.iterdir()):
        raise BadInput(
            f"{run_folder}: not empty and not a run folder (it has no config.toml); give another out"
        )
    if not any((run_folder / name).exists() for name in ("evaluation", "metrics.jsonl", "summary.json")):
        config.save(path)
        return
    before = parse_settings(Config, {**read_toml(path), "out": config.out}, str(path))
    finished = (run_folder / "summary.json").is_file()
    steps = sys.maxsize if finished else newest_step(run_folder / "checkpoints")
    if _until(before, steps) == _until(config, steps):
        if before != config and not finished:
            config.save(path)
    else:
        may_change = tuple(f"training.{name}" for name in CHANGEABLE)
        changed = _differences(before.model_dump(mode="json"), config.model_dump(mode="json"))
        changed = [name for name in changed if not name.startswith(may_change)]
        raise BadInput(
            f"{run_folder}: begun with another {', '.join(changed)}; give another out, or the settings of "
            f"{path}"
        )


def _until(config: Config, step: int) -> Config:
    """The config without the deepenings after `step`, and without the settings that may change between two
    starts.
    """
    training = config.training.model_copy(update=dict.fromkeys(CHANGEABLE))
    deepen = tuple(deepening for deepening in config.deepen if deepening.step < step)
    return config.model_copy(update={"training": training, "deepen": deepen})


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """The keys of the settings that differ, such as "stages.0.steps"."""
    keys: list[str] = []
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            keys += _differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        return keys
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (left, right) in enumerate(zip(before, now, strict=True)):
            keys += _differences(left, right, f"{key}.{number}")
        return keys
    return [] if before == now else [key]
