"""The settings that a folder was begun with: a later call with other settings is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from babel_jax.disk_errors import explain_os_errors
from babel_jax.errors import BadInput
from babel_jax.lease import NAME as LEASE
from babel_jax.places import PARTIAL


class Change(NamedTuple):
    """A setting that differs, such as `Change("stages.0.steps", 40, 80)`."""

    key: str
    before: Any
    now: Any


def is_begun(folder: Path, settings: str, kind: str, option: str) -> bool:
    """True if `folder` has the file `settings`. Raises BadInput if it has other files only: the folder is
    someone's, and not a folder of this kind ("a run folder"). option: the option or key that names `folder`.
    """
    if (folder / settings).is_file():
        return True
    with explain_os_errors(folder):
        others = folder.iterdir() if folder.is_dir() else ()
        # A process that was stopped while it began the folder may have left these.
        if any(not file.name.endswith((PARTIAL, LEASE)) for file in others):
            raise BadInput(
                f"{folder}: not empty and not {kind} (it has no {settings}); give another {option}, or "
                "remove this one"
            )
    return False


def changes(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[Change]:
    """The settings that differ, in the order of `now`; settings that only `before` has come last.

    A table in both is entered, and so is a list of as many tables; other values are compared whole.
    """
    found: list[Change] = []
    for name in dict.fromkeys([*now, *before]):
        found += _changes_of_value(before.get(name), now.get(name), f"{within}{name}")
    return found


def _changes_of_value(before: Any, now: Any, key: str) -> list[Change]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return changes(before, now, f"{key}.")
    # Lists of another length have no pairs to compare, so they are named as a whole.
    if _are_tables(before) and _are_tables(now) and len(before) == len(now):
        found: list[Change] = []
        for number, (left, right) in enumerate(zip(before, now, strict=True)):
            found += changes(left, right, f"{key}.{number}.")
        return found
    return [] if before == now else [Change(key, before, now)]


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
