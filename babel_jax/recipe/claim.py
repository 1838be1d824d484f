"""The config of a run folder, and the settings that may change when the run is started again."""

import contextlib
import json
import sys
from pathlib import Path

from babel_jax.claims import changes, is_begun
from babel_jax.config import CHANGEABLE, Config
from babel_jax.config.file import parse_settings, read_toml
from babel_jax.distributed.agreement import agreed, first_text, same_on_all
from babel_jax.errors import BadInput
from babel_jax.files import remove_left_files
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
        if changed := changes(first, mine):
            keys = ", ".join(change.key for change in changed)
            raise BadInput(
                f"the processes were started with different configs: not as in process 0 is {keys}; give all "
                "the same"
            )


def claim(run_folder: Path, config: Config) -> None:
    """Writes the resolved config into the run folder, or checks it against the one that is there.

    An earlier config is replaced if nothing was computed with it yet (as after a mistake in it), if it
    differs in deepenings that the run has not reached, or in settings that may change.
    """
    path = run_folder / "config.toml"
    if is_begun(run_folder, path.name, "a run folder", "out"):
        # Not below data/: prepared data may be in the run folder, and another process may be writing it.
        with contextlib.suppress(OSError):
            remove_left_files([*run_folder.iterdir(), *run_folder.glob("evaluation/*")])
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
        changed = changes(before.model_dump(mode="json"), config.model_dump(mode="json"))
        keys = [change.key for change in changed if not change.key.startswith(may_change)]
        raise BadInput(
            f"{run_folder}: begun with another {', '.join(keys)}; give another out, or the settings of {path}"
        )


def _until(config: Config, step: int) -> Config:
    """The config without the deepenings after `step`, and without the settings that may change between two
    starts.
    """
    training = config.training.model_copy(update=dict.fromkeys(CHANGEABLE))
    deepen = tuple(deepening for deepening in config.deepen if deepening.step < step)
    return config.model_copy(update={"training": training, "deepen": deepen})
