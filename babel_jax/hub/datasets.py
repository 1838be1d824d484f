"""Data sets on the hub as lists of files: one listing of each folder, of a fixed commit, kept on disk.

A file is named hf://datasets/OWNER/NAME@COMMIT/PATH, so that each process can read it without another
listing.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from babel_jax.hub.names import is_commit
from babel_jax.hub.patience import explained, patiently
from babel_jax.hub.ranges import WebFile, scratch
from babel_jax.places import PARTIAL

_PATH = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?/(?P<path>.+)"
)
_LISTINGS = "listings"  # of the scratch space
_OF_GLOB = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_MAGIC = re.compile(r"[*?[]")


class HubPath(NamedTuple):
    """A path or glob in a data set on the hub. revision: None for the branch main."""

    repo: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{urllib.parse.quote(self.revision, safe='')}"
        return f"hf://datasets/{self.repo}{at}/{self.path}"


def hub_path(text: str) -> HubPath | None:
    """The parts of hf://datasets/OWNER/NAME@REVISION/PATH; None for any other path."""
    match = _PATH.fullmatch(text)
    if match is None:
        return None
    revision = None if match["revision"] is None else urllib.parse.unquote(match["revision"])
    return HubPath(match["repo"], revision, match["path"])


@functools.cache
def dataset_commit(repo: str, revision: str | None = None) -> str:
    """The commit of a revision of a data set. In one process it stays the same.

    Raises BadInput for an unknown data set or revision.
    """
    if revision is not None and is_commit(revision):
        return revision
    from huggingface_hub import HfApi

    with explained(repo, "dataset", revision):
        info = patiently(lambda: HfApi().dataset_info(repo, revision=revision), repo)
    assert info.sha is not None
    return info.sha


def list_files(path: HubPath) -> list[str]:
    """The files that match a path or glob, as hf://datasets/OWNER/NAME@COMMIT/PATH, sorted by name."""
    commit = dataset_commit(path.repo, path.revision)
    # The folders before the first star, so that only one folder of a large data set is listed.
    parts = path.path.split("/")
    fixed = 0
    while fixed < len(parts) - 1 and not _MAGIC.search(parts[fixed]):
        fixed += 1
    # A star in a folder's name needs the listing of all folders below.
    is_deep = len(parts) - fixed > 1
    listing = _listing(path.repo, commit, "/".join(parts[:fixed]), is_deep)
    pattern = _pattern(path.path)
    return [str(HubPath(path.repo, commit, name)) for name in sorted(listing) if pattern.fullmatch(name)]


def list_folders(path: HubPath, folder: str) -> list[str]:
    """The names of the folders in a folder of a data set; empty if there is no such folder."""
    return [name[:-1] for name in names_in(path, folder) if name.endswith("/")]


def names_in(path: HubPath, folder: str) -> list[str]:
    """The names of files, and of folders with a slash at their ends, in a folder of a data set; empty if
    there is no such folder.
    """
    commit = dataset_commit(path.repo, path.revision)
    names: list[str] = kept_or_made(
        f"names {_key(path.repo, commit, folder, False)}", lambda: _names(path.repo, commit, folder)
    )
    return names


def _names(repo: str, commit: str, folder: str) -> list[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    def ask() -> list[Any]:
        return list(HfApi().list_repo_tree(repo, folder or None, revision=commit, repo_type="dataset"))

    with explained(repo, "dataset", commit):
        try:
            tree = patiently(ask, repo)
        except EntryNotFoundError:
            return []
    names = []
    for entry in tree:
        name = entry.path.rpartition("/")[2]
        names.append(name if hasattr(entry, "size") else f"{name}/")
    return names


def hub_file(path: HubPath) -> WebFile:
    """The address, size and version of a file of a data set.

    Raises FileNotFoundError if the commit has no such file.
    """
    from huggingface_hub import hf_hub_url

    commit = dataset_commit(path.repo, path.revision)
    folder = path.path.rpartition("/")[0]
    entry = None
    # A listing of a folder above it may be known already.
    for above, is_deep in [(folder, False), *((part, True) for part in _above(folder))]:
        kept = _kept(_key(path.repo, commit, above, is_deep))
        if kept is not None and path.path in kept:
            entry = kept[path.path]
            break
    if entry is None:
        entry = _listing(path.repo, commit, folder, False).get(path.path)
    if entry is None:
        raise FileNotFoundError(str(path))
    size, version = entry
    address = hf_hub_url(path.repo, path.path, repo_type="dataset", revision=commit)
    return WebFile(address, size, version, path.repo)


def _above(folder: str) -> list[str]:
    """A folder and all folders above it."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _pattern(glob: str) -> re.Pattern[str]:
    """A glob in which a star does not match a slash, and ** matches any number of folders."""
    parts = []
    for match in re.finditer(r"\*\*/|\*\*|\*|\?|\[[^]/]+\]|.", glob, re.DOTALL):
        # The longest signs come first in the expression: **/ before ** before *.
        part = match[0]
        if part.startswith("[") and len(part) > 1:
            parts.append(part.replace("[!", "[^", 1))
        else:
            parts.append(_OF_GLOB.get(part, re.escape(part)))
    return re.compile("".join(parts))


# {path: [size, version]}
Listing = dict[str, list[Any]]


@functools.lru_cache(maxsize=256)
def _listing(repo: str, commit: str, folder: str, is_deep: bool) -> Listing:
    """The files of a folder, with those of folders below if `is_deep`."""
    key = _key(repo, commit, folder, is_deep)
    listing: Listing = kept_or_made(key, lambda: _listed(repo, commit, folder, is_deep))
    return listing


def _listed(repo: str, commit: str, folder: str, is_deep: bool) -> Listing:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def ask() -> list[Any]:
        tree = HfApi().list_repo_tree(
            repo, folder or None, recursive=is_deep, revision=commit, repo_type="dataset"
        )
        return list(tree)

    with explained(repo, "dataset", commit):
        try:
            entries = patiently(ask, repo)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            entries = []
    listing: Listing = {}
    for entry in entries:
        if hasattr(entry, "size"):
            large = entry.lfs is not None
            listing[entry.path] = [entry.size, entry.lfs.sha256 if large else entry.blob_id]
    return listing


def _key(repo: str, commit: str, folder: str, is_deep: bool) -> str:
    return f"{repo} {commit} {folder} {is_deep}"


def _kept(key: str) -> Any:
    try:
        return json.loads(_kept_file(key).read_bytes())
    except (OSError, ValueError):
        return None


def kept_or_made(key: str, make: Callable[[], Any]) -> Any:
    """A JSON value that never changes, such as the listing of a commit. It is kept in the scratch space under
    a key, for other processes and later starts.
    """
    kept = _kept(key)
    if kept is not None:
        return kept
    value, path = make(), _kept_file(key)
    # Without a place to keep it, each process asks the hub.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, because several processes may write the same listing.
        partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
        partial.write_text(json.dumps(value), encoding="utf-8")
        os.replace(partial, path)
    return value


def _kept_file(key: str) -> Path:
    from huggingface_hub import constants

    digest = hashlib.sha256(f"{constants.ENDPOINT} {key}".encode()).hexdigest()
    return scratch() / _LISTINGS / f"{digest[:32]}.json"
