"""Model folders on object storage (gs://, s3://, ...), read in place through fsspec, for any file system that
fsspec supports.

A local folder stands in for the remote one, so that all other code works with files: small files are copies;
a safetensors file is its header, followed by a hole as large as the values. Only this process knows the URL
of the values, because it opened the folder: `StoredTensors` reads byte ranges there. No file of a folder can
name a URL.
"""

import atexit
import contextlib
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from babel_jax.buckets import SCHEMES, explain, tried, without_secrets
from babel_jax.errors import BadInput, show_as
from babel_jax.model_files import FOLDERS_BESIDE, MOST_BESIDE_BYTES, WEIGHT_SUFFIXES
from babel_jax.model_folders.safetensors_header import MOST_HEADER_BYTES
from babel_jax.places import UNFINISHED, place, pull

_SHARD, _INDEX = ".safetensors", ".safetensors.index.json"
_PARAMS = "params"  # of an Orbax folder
_VALUES = "/d/"  # within it, where TensorStore's files of values are
_URLS: dict[Path, str] = {}  # the URL of each local folder that stands in for a remote one


def stand_in(url: str) -> Path:
    """A local folder for the model folder at `url`; it is removed when the program ends.

    Raises BadInput if the folder is missing, incomplete or unreadable, or fsspec lacks the package for such
    URLs.
    """
    # Imported where it is used: it takes as long as the rest of a short command on local folders.
    import fsspec

    url = url.rstrip("/")
    with explain(url):
        system, root = tried(lambda: fsspec.core.url_to_fs(url))
        if not tried(lambda: system.isdir(root)):
            with contextlib.suppress(FileNotFoundError):
                # Raises the true error if the folder may not be read: `isdir` returns False then.
                tried(lambda: system.ls(root))
            raise BadInput(f"{without_secrets(url)}: no such model folder")
        entries = _entries(system, root, url)
        # An Orbax folder is read by TensorStore itself, so only its small files are copied.
        if not any(name.endswith(_SHARD) for name in entries):
            if _PARAMS in entries and url.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
                return _copy_without_values(url)
            raise BadInput(
                f"{without_secrets(url)}: holds no safetensors files; Orbax folders can be read on "
                f"{' and '.join(f'{scheme}://' for scheme in SCHEMES)} alone, so convert the model first"
            )
        # Inside a folder of its own the copy can have the model's name, which tables show.
        parent = Path(tempfile.mkdtemp(prefix="babel-"))
        atexit.register(shutil.rmtree, parent, ignore_errors=True)
        local = parent / (url.rsplit("/", 1)[-1].strip(".") or "model")
        local.mkdir()
        _copy_small_files(system, entries, local, url)
        _make_shards(system, entries, local, url)
    _URLS[local.resolve()] = url
    show_as(str(local), without_secrets(url))
    return local


def _entries(system: Any, root: str, url: str) -> dict[str, Mapping[str, Any]]:
    """The files and folders of a remote model folder by name. Raises BadInput for one that is not whole."""
    entries = {_file_name(entry): entry for entry in tried(lambda: system.ls(root, detail=True))}
    entries.pop("", None)
    if UNFINISHED in entries:
        raise BadInput(
            f"{without_secrets(url)}: not whole: a command is writing it, or was killed as it did; run "
            "that command again"
        )
    return entries


def _copy_small_files(system: Any, entries: Mapping[str, Mapping[str, Any]], local: Path, url: str) -> None:
    """Copies all that is beside the parameters."""
    for name, entry in entries.items():
        if entry["type"] == "directory":
            if name in FOLDERS_BESIDE:
                (local / name).mkdir()
                for below in system.ls(entry["name"], detail=True):
                    if below["type"] == "file" and _file_name(below):
                        _fetch(system, below, local / name / _file_name(below), url)
        elif not name.endswith(WEIGHT_SUFFIXES) or name.endswith(_INDEX):
            _fetch(system, entry, local / name, url)


def _make_shards(system: Any, entries: Mapping[str, Mapping[str, Any]], local: Path, url: str) -> None:
    """Makes each safetensors file: its header, followed by a hole as large as the values."""
    shards: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    for name, entry in entries.items():
        if entry["type"] != "directory" and name.endswith(_SHARD):
            shards[str(entry["name"])] = local / name
            sizes[str(entry["name"])] = int(entry["size"])

    # The header of each shard: first its length, from the first 8 bytes, then the rest.
    starts = tried(lambda: system.cat_ranges(list(shards), 0, 8, on_error="raise"))
    lengths = [struct.unpack("<Q", data)[0] for data in starts]
    for (name, file), length in zip(shards.items(), lengths, strict=True):
        if 8 + length > sizes[name] or length > MOST_HEADER_BYTES:
            raise BadInput(
                f"{without_secrets(url)}/{file.name}: truncated or damaged, or not a safetensors file; "
                "copy it there again"
            )
    ends = [8 + length for length in lengths]
    headers = tried(lambda: system.cat_ranges(list(shards), 0, ends, on_error="raise"))
    for (name, file), header in zip(shards.items(), headers, strict=True):
        with open(file, "wb") as handle:
            handle.write(header)
            # A hole: the file has the size that its header says, and takes no room on the disk.
            handle.truncate(sizes[name])


def _copy_without_values(url: str) -> Path:
    folder = place(url)
    pull(folder, lambda name: not (name.startswith(f"{_PARAMS}/") and _VALUES in name))
    return folder


def _file_name(entry: Mapping[str, Any]) -> str:
    """The last part of a remote name; empty for one that would lead out of a local folder."""
    name = str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
    return "" if name in (".", "..") or "\0" in name else name


def _fetch(system: Any, entry: Mapping[str, Any], file: Path, url: str) -> None:
    if int(entry["size"]) > MOST_BESIDE_BYTES:
        raise BadInput(
            f"{without_secrets(url)}/{file.name}: larger than the {MOST_BESIDE_BYTES:,} bytes that a file "
            "beside the parameters may have"
        )
    tried(lambda: system.get_file(str(entry["name"]), str(file)))


class RemoteFiles:
    """The remote files that a local folder stands in for. Threads may share it."""

    def __init__(self, url: str):
        import fsspec

        self.url = url
        with explain(url):
            self._system, self._root = fsspec.core.url_to_fs(url)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes `start` to `stop` of a file."""
        with explain(f"{self.url}/{name}"):
            data = tried(lambda: self._system.cat_file(f"{self._root}/{name}", start=start, end=stop))
            # A file that was replaced by a shorter one gives fewer bytes without an error.
            if len(data) != stop - start:
                raise BadInput(
                    f"{without_secrets(self.url)}/{name}: shorter than when it was opened; run the command "
                    "again when nothing writes there"
                )
        result: bytes = data
        return result


def remote_of(folder: Path) -> RemoteFiles | None:
    """The remote files of a local folder that stands in for them; None for any other folder."""
    url = _URLS.get(folder.resolve())
    return None if url is None else RemoteFiles(url)
