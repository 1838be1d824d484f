"""`babel verify`: whether the files of a folder are, to the bit, as this program wrote them."""

import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from babel_jax.digests import Checked, check_sums, files_below, lists_below, read_sums
from babel_jax.errors import BadInput
from babel_jax.places import listing, pull
from babel_jax.training.saved_steps import METADATA, check_state, is_note, noted_in

_TOLD = 5  # damaged files that a message names


def verify_folder(folder: Path) -> dict[str, Any]:
    """Compares all files of a folder that have digests with them: a run folder, prepared data, a model
    folder, or any folder of such.

    Returns {"folder", "files" and "bytes" read, "seconds", "without_digests": [files and checkpoints that
    cannot be checked], "summary"}. Raises BadInput, which names the damaged files, where there are any, and
    for a folder without digests.
    """
    there = listing(folder)
    if not there and not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    start = time.monotonic()
    steps = sorted(path.parent for path in there if path.name == METADATA and path.parent.name.isdecimal())
    lists = [path for path in lists_below(folder) if not any(path.is_relative_to(step) for step in steps)]
    without: list[Path] = []
    with tqdm(desc="verify", unit="B", unit_scale=True, disable=None) as progress:
        found = [check_sums(lists, folder, seen=progress.update)]
        for step in steps:
            checked = _check_step(step)
            if checked is None:
                without.append(step)
            else:
                found.append(checked)
                progress.update(checked.bytes)
    damaged = {path: reason for one in found for path, reason in one.damaged.items()}
    files, size = sum(one.files for one in found), sum(one.bytes for one in found)
    if damaged:
        named = ", ".join(
            f"{path.relative_to(folder)} ({reason})" for path, reason in list(damaged.items())[:_TOLD]
        )
        more = f" and {len(damaged) - _TOLD} more" if len(damaged) > _TOLD else ""
        raise BadInput(
            f"{folder}: {len(damaged)} damaged: {named}{more}; fetch the folder again, or make it anew"
        )
    if not files:
        raise BadInput(
            f"{folder}: nothing in it has digests (SHA256SUMS): it is of an earlier version or of another "
            "program"
        )
    without += _without_digests(folder, steps)
    seconds = time.monotonic() - start
    summary = f"{folder}: {files:,} files of {size:,} bytes are as they were written ({seconds:.1f} s)"
    if without:
        names = [str(path.relative_to(folder)) for path in without]
        summary += (
            f"; {len(without)} without digests: "
            f"{', '.join(names[:_TOLD])}{' ...' if len(names) > _TOLD else ''}"
        )
    return {
        "folder": str(folder),
        "files": files,
        "bytes": size,
        "seconds": seconds,
        "without_digests": [str(path.relative_to(folder)) for path in without],
        "summary": summary,
    }


def _check_step(step: Path) -> Checked | None:
    pull(step, is_note)
    try:
        noted_in(step)
    except BadInput as problem:
        return Checked(0, 0, {step: str(problem)})
    return check_state(step)


def _without_digests(folder: Path, steps: list[Path]) -> list[Path]:
    """Files that no list has: added since, written by another program, or such as change while a run goes on
    (metrics.jsonl).

    Of a checkpoint the state has lists, and what is noted beside it a digest of its own; what else Orbax
    writes there is not named.
    """
    listed = {path for one in lists_below(folder) for path in read_sums(one)}
    files = (path for path in files_below(folder) if path not in listed)
    return [path for path in files if not any(path.is_relative_to(step) for step in steps)]
