"""`babel verify`: checks that the files of a folder are, to the bit, as this program wrote them."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from babel_jax.digests import Checked, check_sums, files_below, lists_below, read_sums
from babel_jax.errors import BadInput
from babel_jax.places import listing, pull
from babel_jax.progress import Work
from babel_jax.training.saved_steps import METADATA, check_state, is_note, noted_in

_NAMED = 5  # damaged files in a message


def verify_folder(folder: Path) -> dict[str, Any]:
    """Compares all files of a folder with their digests: a run folder, prepared data, a model folder, or a
    folder of several such.

    Returns {"folder", "files" and "bytes" read, "seconds", "without_digests": [files and checkpoints that
    cannot be checked], "summary"}. Raises BadInput that names the damaged files, and for a folder without
    digests.
    """
    files_present = listing(folder)
    if not files_present and not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    start = time.monotonic()

    steps = _steps_in(files_present)
    results, without = _checked(folder, steps)
    damaged: dict[Path, str] = {}
    for result in results:
        damaged |= result.damaged
    files, size = sum(result.files for result in results), sum(result.bytes for result in results)
    if damaged:
        raise BadInput(_damage(folder, damaged))
    if not files:
        raise BadInput(
            f"{folder}: nothing in it has digests (SHA256SUMS): it is of an earlier version or of another "
            "program"
        )

    without += _without_digests(folder, steps)
    seconds = time.monotonic() - start
    summary = f"{folder}: {files:,} files of {size:,} bytes are as they were written ({seconds:.1f} s)"
    if without:
        names = _by_folder(folder, without)
        more = " ..." if len(names) > _NAMED else ""
        summary += f"; {len(without)} without digests: {', '.join(names[:_NAMED])}{more}"
    return {
        "folder": str(folder),
        "files": files,
        "bytes": size,
        "seconds": seconds,
        "without_digests": [str(path.relative_to(folder)) for path in without],
        "summary": summary,
    }


def _steps_in(files: Iterable[Path]) -> list[Path]:
    """The folders of checkpoints among these files."""
    metadata = [path for path in files if path.name == METADATA]
    return sorted(path.parent for path in metadata if path.parent.name.isdecimal())


def _checked(folder: Path, steps: list[Path]) -> tuple[list[Checked], list[Path]]:
    """The checks of all lists of digests, and the checkpoints that have none."""
    # Checkpoints are checked as wholes, all other lists of digests file by file.
    lists = []
    for path in lists_below(folder):
        if not any(path.is_relative_to(step) for step in steps):
            lists.append(path)
    without: list[Path] = []
    with Work[Any]("verify", unit="B", keep=True) as progress:
        results = [check_sums(lists, folder, seen=progress.update)]
        # A damaged note or list of a checkpoint counts as damage, and stops no other check.
        for step in steps:
            checked = _check_step(step)
            if checked is None:
                without.append(step)
            else:
                results.append(checked)
                progress.update(checked.bytes)
    return results, without


def _damage(folder: Path, damaged: Mapping[Path, str]) -> str:
    """A line about damaged files, which names the first ones with the reasons."""
    named = []
    for path, reason in list(damaged.items())[:_NAMED]:
        named.append(f"{path.relative_to(folder)} ({reason})")
    more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
    return (
        f"{folder}: {len(damaged)} damaged: {', '.join(named)}{more}; fetch the folder again, or make it anew"
    )


def _by_folder(folder: Path, paths: list[Path]) -> list[str]:
    """The names of files for a line of text: many in one folder are the folder, with their number."""
    below: dict[Path, list[Path]] = {}
    for path in paths:
        below.setdefault(path.parent, []).append(path)
    names = []
    for parent, files in below.items():
        if parent != folder and len(files) > 1:
            names.append(f"{parent.relative_to(folder)}/ ({len(files)} files)")
        else:
            names += [str(path.relative_to(folder)) for path in files]
    return names


def _check_step(step: Path) -> Checked | None:
    """The check of one checkpoint; None if it has no digests."""
    pull(step, is_note)
    try:
        noted_in(step)
    except BadInput as problem:
        return Checked(0, 0, {step: str(problem)})
    return check_state(step)


def _without_digests(folder: Path, steps: list[Path]) -> list[Path]:
    """Files that no list has: added later, written by another program, or changing during a run
    (metrics.jsonl).

    Files within a checkpoint are not named: its state has lists, the note beside it has a digest, and Orbax
    writes the rest.
    """
    listed: set[Path] = set()
    for sums in lists_below(folder):
        listed.update(read_sums(sums))
    without = []
    for path in files_below(folder):
        if path not in listed and not any(path.is_relative_to(step) for step in steps):
            without.append(path)
    return without
