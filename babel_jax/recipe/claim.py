"""The config of a run folder, and the settings that may change when the run is started again."""

import contextlib
import json
import logging
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from babel_jax.claims import changes, is_begun
from babel_jax.config import CHANGEABLE, Config
from babel_jax.config.file import parse_settings, read_toml
from babel_jax.distributed.agreement import agreed, first_text, same_on_all
from babel_jax.errors import BadInput
from babel_jax.files import remove_left_files
from babel_jax.hub.models import pinned
from babel_jax.hub.names import HubName, hub_name
from babel_jax.languages import LANGUAGES, with_order
from babel_jax.training.run_state import newest_step

log = logging.getLogger("babel")


def check_same(config: Config) -> None:
    """Raises BadInput on all processes if one was started with another config than process 0: they would wait
    for ever.
    """
    mine = config.model_dump(mode="json")
    if same_on_all(json.dumps(mine)):
        return
    # Only now, since it is seldom needed: the whole config of process 0, to name the keys that differ.
    first = json.loads(first_text(json.dumps(mine)))
    with agreed():
        if changed := changes(first, mine):
            keys = ", ".join(change.key for change in changed)
            raise BadInput(
                f"the processes were started with different configs: not as in process 0 is {keys}; give all "
                "the same"
            )


def claim(run_folder: Path, config: Config) -> Config:
    """Writes the resolved config into the run folder, or checks it against the one that is there. Returns the
    config with the run's order of languages.

    An earlier config is replaced if nothing was computed with it yet (as after a mistake in it), if it
    differs in deepenings that the run has not reached, in languages that were added with their text, or in
    settings that may change.
    """
    path = run_folder / "config.toml"
    if is_begun(run_folder, path.name, "a run folder", "out"):
        # Not below data/: prepared data may be in the run folder, and another process may be writing it.
        with contextlib.suppress(OSError):
            remove_left_files([*run_folder.iterdir(), *run_folder.glob("evaluation/*")])
    # Nothing was computed with an earlier config, so the new one takes its place.
    if not any((run_folder / name).exists() for name in ("evaluation", "metrics.jsonl", "summary.json")):
        config = config.in_order(config.order)
        config.save(path)
        return config
    before = parse_settings(Config, {**read_toml(path), "out": config.out}, str(path))
    finished = (run_folder / "summary.json").is_file()
    steps = sys.maxsize if finished else newest_step(run_folder / "checkpoints")
    # The order of the run stays; new languages come after it.
    config = config.in_order(with_order(before.order, config.order))
    before = before.in_order(before.order)
    added = config.order[len(before.order) :]
    if added and finished:
        raise BadInput(
            f"{run_folder}: the run is finished, and a finished run takes no new language "
            f"({', '.join(added)}); give another out, and {run_folder / 'hf'} as model.folder"
        )
    # Compared without the added languages: all else must be as it was.
    as_before = without_languages(config, added, before)
    if _until(before, steps) == _until(as_before, steps):
        if added:
            names = ", ".join(f"{LANGUAGES[code].name} ({code})" for code in added)
            log.info("the run was begun with %d languages, and now %s too", len(before.order), names)
        if before != config and not finished:
            config.save(path)
    else:
        may_change = tuple(f"training.{name}" for name in CHANGEABLE)
        changed = changes(before.model_dump(mode="json"), as_before.model_dump(mode="json"))
        keys = [change.key for change in changed if not change.key.startswith(may_change)]
        raise BadInput(
            f"{run_folder}: begun with another {', '.join(keys)}; give another out, or the settings of {path}"
        )
    return config


def without_languages(config: Config, added: Collection[str], before: Config) -> Config:
    """The config as it was before languages were added: without their entries, sources and shares. Their text
    needs another folder of prepared data, so with added languages that folder may differ.
    """
    if not added:
        return config
    stages = []
    for stage in config.stages:
        mixture = stage.mixture
        # A language may be named in any of these four settings of a mixture.
        kept: dict[str, Any] = {"languages": tuple(code for code in mixture.languages if code not in added)}
        for name in ("weights", "curated", "curated_extra"):
            shares = getattr(mixture, name)
            kept[name] = {code: share for code, share in shares.items() if code not in added}
        stages.append(stage.model_copy(update={"mixture": mixture.model_copy(update=kept)}))
    sources = tuple(source for source in config.data.sources if source.language not in added)
    data = config.data.model_copy(update={"sources": sources, "folder": before.data.folder})
    languages = tuple(one for one in config.languages if one.code not in added)
    return config.model_copy(update={"data": data, "stages": tuple(stages), "languages": languages})


def with_commit(config: Config, run_folder: Path) -> Config:
    """The config with the commit of its model, if this is a model on the hub: the one that the run folder was
    begun with, unless the settings name a revision. All processes get the same.
    """
    name = hub_name(config.model.folder) if config.model.folder is not None else None
    if name is None or name.is_pinned:
        return config
    text = ""
    with agreed():
        if jax.process_index() == 0:
            text = str(_begun_with(name, run_folder) or pinned(name))
    model = config.model.model_copy(update={"folder": first_text(text)})
    return config.model_copy(update={"model": model})


def _begun_with(name: HubName, run_folder: Path) -> HubName | None:
    """The model on the hub that a run folder was begun with; None if that is another one."""
    path = run_folder / "config.toml"
    if name.revision is not None or not path.is_file():
        return None
    folder = read_toml(path).get("model", {}).get("folder")
    before = hub_name(folder) if isinstance(folder, str) else None
    return before if before is not None and before.repo == name.repo and before.is_pinned else None


def _until(config: Config, step: int) -> Config:
    """The config without the deepenings after `step`, and without the settings that may change between two
    starts.
    """
    training = config.training.model_copy(update=dict.fromkeys(CHANGEABLE))
    deepen = tuple(deepening for deepening in config.deepen if deepening.step < step)
    return config.model_copy(update={"training": training, "deepen": deepen})
