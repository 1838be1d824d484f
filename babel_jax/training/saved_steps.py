"""The folder of one checkpoint: the note beside the state, and the digests of its files.

STEP/_CHECKPOINT_METADATA    Orbax's; under custom_metadata the stage, the model and a digest of both
STEP/default/                the state, with SHA256SUMS and SHA256SUMS.process_N
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from babel_jax.digests import SUMS, Checked, check_sums, lists_below, unlisted
from babel_jax.errors import BadInput
from babel_jax.files import read_json
from babel_jax.languages import BABEL

STATE, METADATA, SUCCESS = "default", "_CHECKPOINT_METADATA", "commit_success.txt"  # Orbax's names
_NOTED_SUM = "sha256"  # the key of the digest of the other entries
_NOTED_BEFORE = {"stage", "model"}  # the keys in notes of versions without digests


def is_note(name: str) -> bool:
    """True for a file that this module reads, and not Orbax; by its path within the step."""
    return name == METADATA or name.rpartition("/")[2].startswith(SUMS)


class Note(NamedTuple):
    """The note beside a state: the stage, the model's config as JSON values, and the languages of the run in
    the order of the state's counts.
    """

    stage: str
    model: dict[str, Any]
    languages: tuple[str, ...]


def to_note(stage: str, model: Mapping[str, Any], languages: Sequence[str]) -> dict[str, Any]:
    """The note beside a state, with its digest."""
    noted = {"stage": stage, "model": model, "languages": list(languages)}
    return {**noted, _NOTED_SUM: _sum_of(noted)}


def noted_in(step: Path) -> Note:
    """The note of a step. Raises BadInput if it cannot be read or does not match its digest."""
    noted = dict(_noted(step))
    found_sum = noted.pop(_NOTED_SUM, None)
    stage, model = noted.get("stage"), noted.get("model", {})
    if not isinstance(stage, str) or not isinstance(model, dict):
        raise BadInput(
            f"{step / METADATA}: missing, damaged or of another version: it does not name the stage and the "
            "model"
        )
    # A note without a digest is taken only in the exact form of earlier versions: else damage could hide so.
    is_old = found_sum is None and noted.keys() == _NOTED_BEFORE
    if not is_old and found_sum != _sum_of(noted):
        raise BadInput(f"{step / METADATA}: not as it was written")
    # Earlier versions counted the 25 languages of the report.
    languages = noted.get("languages", BABEL)
    return Note(stage, model, tuple(map(str, languages)))


def check_state(
    step: Path, mine: Callable[[Mapping[Path, int]], Iterable[Path]] | None = None
) -> Checked | None:
    """Reads the files of the state (or those that `mine` picks) and compares them with their digests.

    A file without a digest counts as damaged. Returns None for a step of a version that wrote no digests.
    """
    folder = step / STATE
    lists = lists_below(folder)
    # Versions that write digests always leave lists, so without lists the note must be of an earlier version.
    if not lists:
        return (
            Checked(0, 0, {folder: "the digests of its files are missing"})
            if _noted(step).keys() != _NOTED_BEFORE
            else None
        )
    checked = check_sums(lists, folder, mine)
    if checked.damaged:
        return checked
    # Orbax adds its mark of success last, when the lists are written.
    more = [path for path in unlisted(folder, lists) if path.name != SUCCESS]
    return Checked(checked.files, checked.bytes, dict.fromkeys(more, "in no list of digests"))


def _noted(step: Path) -> dict[str, Any]:
    """The note as JSON; empty if it cannot be read."""
    try:
        noted = read_json(step / METADATA)["custom_metadata"]
    except (OSError, BadInput, KeyError, TypeError):
        noted = None
    return noted if isinstance(noted, dict) else {}


def _sum_of(noted: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(noted, sort_keys=True).encode()).hexdigest()
