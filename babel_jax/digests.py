"""Lists of SHA-256 digests beside files: written when a folder is made, checked whenever its bits are in
doubt.

A list is a file SHA256SUMS (or SHA256SUMS.SOMETHING, of what one of several processes wrote) in the form of
sha256sum, so that `sha256sum -c SHA256SUMS` checks it too. It covers files of its own folder and of folders
below, but no hidden ones.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from babel_jax.errors import BadInput, one_line
from babel_jax.files import make_folder, open_regular, read_text, write_text
from babel_jax.new_folders import MARK
from babel_jax.places import UNFINISHED, listing, open_stored, pull, sizes_of, url_of

SUMS = "SHA256SUMS"
MOST_LIST_BYTES = 256 * 2**20  # some two million files
_THREADS = min(8, os.cpu_count() or 1)  # hashing leaves Python's lock, so threads share the cores
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")


@dataclasses.dataclass(frozen=True)
class Checked:
    """What became of the files of some lists: how many, their bytes, and those that are not as they were
    written, each with the reason.
    """

    files: int
    bytes: int
    damaged: Mapping[Path, str]


def file_sum(path: Path, below: Path | None = None, stored: bool = True) -> str:
    """The SHA-256 of a regular file, in hex; memory does not depend on its size. `below` is as for
    `open_regular`.

    Of a file in a bucket the bytes there are read, and with `stored` False those of the working copy.
    """
    with open_regular(path, below) if not stored or url_of(path) is None else open_stored(path) as file:
        # By its type a BinaryIO has no readinto; every file that is opened has.
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def is_list(path: Path) -> bool:
    """Whether a file is a list of digests, by its name."""
    return path.name == SUMS or path.name.startswith(f"{SUMS}.")


def files_below(folder: Path) -> list[Path]:
    """The files below a folder, without lists, hidden files and the mark of a folder that is being filled."""
    found = (path for path in listing(folder) if not path.name.startswith("."))
    return [path for path in found if not is_list(path) and path.name not in (MARK, UNFINISHED)]


def write_sums(folder: Path, files: Iterable[Path] | None = None, name: str = SUMS) -> None:
    """Writes the list `name` of some files below a folder; without `files`, of all."""
    chosen = sorted(files_below(folder) if files is None else files)
    make_folder(folder)  # the working copy of one that another library writes into a bucket
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(file_sum, chosen))
    write_text(
        folder / name,
        "".join(_line(found, path.relative_to(folder)) for path, found in zip(chosen, sums, strict=True)),
    )


def merge_sums(folder: Path) -> None:
    """Makes one list of the lists of a folder itself."""
    lists = sorted(folder.glob(f"{SUMS}.*"))
    found = {path: digest for one in lists for path, digest in read_sums(one).items()}
    write_text(
        folder / SUMS,
        "".join(_line(digest, path.relative_to(folder)) for path, digest in sorted(found.items())),
    )
    for one in lists:
        one.unlink()


def read_sums(path: Path) -> dict[Path, str]:
    """The digests of a list by the files' paths.

    Raises BadInput for a damaged list, and for a file outside of the list's folder.
    """
    found = {}
    for number, line in enumerate(read_text(path, most_bytes=MOST_LIST_BYTES).split("\n")[:-1], 1):
        match = _LINE.fullmatch(line)
        name = Path(_unescaped(match[3]) if match[1] else match[3]) if match else Path()
        if match is None or name.is_absolute() or ".." in name.parts:
            raise BadInput(
                f"{path}:{number}: no digest and name of a file below this folder; the list is damaged"
            )
        found[path.parent / name] = match[2]
    return found


def lists_below(folder: Path) -> list[Path]:
    """The lists in a folder and below."""
    pull(folder, lambda name: is_list(Path(name)))
    return [path for path in listing(folder) if is_list(path)]


def check_sums(
    lists: Sequence[Path],
    below: Path,
    mine: Callable[[Mapping[Path, int]], Iterable[Path]] | None = None,
    seen: Callable[[int], object] = lambda size: None,
    stored: bool = True,
) -> Checked:
    """Compares files with lists of them. Links that lead out of the folder `below` are not followed.

    `mine` picks, of all files with their sizes, the ones to read: several processes share them. `seen` is
    told the bytes of each file read. Of a folder in a bucket the files there are read, and with `stored`
    False those of the working copy.
    """
    wanted: dict[Path, str] = {}
    damaged: dict[Path, str] = {}
    for path in lists:
        try:
            wanted |= read_sums(path)
        except (BadInput, OSError) as error:
            damaged[path] = one_line(error)
    sizes = sizes_of(wanted, below, stored)
    damaged |= {path: "missing" for path in wanted if path not in sizes}
    chosen = list(sizes if mine is None else mine(sizes))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        reasons = pool.map(lambda path: _difference(path, wanted[path], below, stored), chosen)
        for path, reason in zip(chosen, reasons, strict=True):
            seen(sizes[path])
            if reason is not None:
                damaged[path] = reason
    return Checked(len(chosen), sum(sizes[path] for path in chosen), damaged)


def unlisted(folder: Path, lists: Sequence[Path]) -> list[Path]:
    """The files below a folder that none of the lists, which can be read, has."""
    listed = {path for one in lists for path in read_sums(one)}
    return [path for path in files_below(folder) if path not in listed]


def _difference(path: Path, wanted: str, below: Path, stored: bool) -> str | None:
    try:
        return None if file_sum(path, below, stored) == wanted else "not the bytes that were written"
    except Exception as error:  # also whatever the packages behind fsspec raise
        return one_line(error)


def _line(digest: str, name: Path) -> str:
    text = str(name)
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == text else chr(92)}{digest}  {escaped}\n"


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "r": "\r"}.get(match[1], match[1]), text)
