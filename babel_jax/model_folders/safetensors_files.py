"""Tensors by name in the safetensors files of a folder: one file, or shards with an index as Hugging Face
writes them.
"""

import json
import math
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from babel_jax.errors import BadInput
from babel_jax.files import (
    link_file,
    open_to_write,
    preallocate,
    read_json,
    share_file,
    sync_file,
    write_text,
)
from babel_jax.model_folders.object_storage import remote_of
from babel_jax.model_folders.safetensors_header import (
    DTYPES,
    FORMAT,
    METADATA,
    Header,
    explain_damage,
    read_header,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The default of transformers and huggingface_hub: large enough for few files, small enough to fetch again
# after a broken download.
SHARD_BYTES = 5_000_000_000
# For more at once Linux puts pages of 2 MiB into its cache, which a virtual machine may have to fetch from
# its host: 10 times as slow.
_WRITE_BYTES = 2**20

Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]
# Names in the files of a model that was saved without its output layer, and what such names lack.
_BARE, _PREFIX = ("embed_tokens.", "layers.", "norm."), "model."
_COMPARED_BYTES = 2**24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensors:
    """The tensors of a folder's safetensors files: names, shapes and types at once, values when asked for.
    Threads may share it.

    Names are those of the whole model: the files of a model that was saved without its output layer lack
    `model.` before them. `bytes_read` counts the bytes of values that were read.
    """

    def __init__(self, folder: Path):
        """Reads the header of every file. Raises BadInput for files that are missing, damaged, or not as the
        index says, and for a tensor that two files hold with different values."""
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self.bytes_read = 0
        self._counting = threading.Lock()
        self._remote = remote_of(folder)
        self._headers: dict[Path, Header] = {}
        index = _read_index(folder)
        for file in sorted({folder / name for name in index.values()}) if index else [_single_file(folder)]:
            self._headers[file] = read_header(file, folder)
            for name in self._headers[file].tensors:
                if self.file_of.setdefault(name, file) != file:
                    self._check_same(name, self.file_of[name], file)
        for name, file_name in index.items():
            if name not in self._headers[folder / file_name].tensors:
                raise BadInput(
                    f"{folder / INDEX}: says that {name} is in {file_name}, and it is not there; fetch the "
                    "folder again"
                )
            self.file_of[name] = folder / file_name
        self._tensors = {name: self._headers[file].tensors[name] for name, file in self.file_of.items()}
        if any(name.startswith(_BARE) for name in self.file_of) and not any(
            name.startswith(_PREFIX) for name in self.file_of
        ):
            self.file_of = {_whole_name(name): file for name, file in self.file_of.items()}
            self._tensors = {_whole_name(name): tensor for name, tensor in self._tensors.items()}

    def _check_same(self, name: str, one: Path, other: Path) -> None:
        """Raises BadInput unless two files hold the same under a name: readers differ in which file they take
        it from.
        """
        first, second = self._headers[one].tensors[name], self._headers[other].tensors[name]
        same = (first.dtype, first.shape) == (second.dtype, second.shape)
        for start in range(0, first.size if same else 0, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, first.size - start)
            parts = [bytearray(count), bytearray(count)]
            for part, file, tensor in zip(parts, (one, other), (first, second), strict=True):
                self._read_bytes(memoryview(part), file, tensor.begin + start)
            same = same and parts[0] == parts[1]
        if not same:
            files = f"{one.name} and {other.name}"
            raise BadInput(
                f"{self.folder}: {files} both hold {name}, with different values; remove the one that does "
                "not count"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor. Raises BadInput for one that models of the supported families do not have."""
        stored = self._tensors[name].dtype
        if stored not in DTYPES:
            raise BadInput(
                f"{self.file_of[name]}: tensor {name} has type {stored}; supported: {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor, read without a map of the file, so that memory holds those rows
        and nothing else.
        """
        shape, dtype = self.shape(name), self.dtype(name)
        values = np.empty((stop - start, *shape[1:]), dtype)
        offset = self._tensors[name].begin + start * math.prod(shape[1:]) * dtype.itemsize
        self._read_bytes(values.reshape(-1).view(np.uint8).data, self.file_of[name], offset)
        with self._counting:
            self.bytes_read += values.nbytes
        return values

    def _read_bytes(self, data: memoryview, file: Path, offset: int) -> None:
        with explain_damage(file):
            if self._remote is not None:
                data[:] = self._remote.read(file.name, offset, offset + len(data))
            else:
                _read_into(data, self._headers[file].path, offset)

    def whole_files(self, kept: Callable[[str], bool]) -> dict[Path, list[str]]:
        """The local files all of whose tensors are `kept`, with these; transformers can
        read each as it is.
        """
        names: dict[Path, list[str]] = {}
        for name, file in self.file_of.items():
            names.setdefault(file, []).append(name)
        whole = {}
        for file, header in self._headers.items():
            # A tensor that counts in another file, or is stored without its prefix, is no part of the file as
            # it is.
            complete = header.tensors.keys() == set(names.get(file, ()))
            if self._remote is None and header.has_format and complete and all(map(kept, names[file])):
                whole[file] = names[file]
        return whole


def _whole_name(name: str) -> str:
    return _PREFIX + name if name.startswith(_BARE) else name


class TensorFiles:
    """Safetensors files being written: every header first, then the values of any tensor, in any order and in
    pieces.

    Format: https://huggingface.co/docs/safetensors, a little-endian u64 with the length of a JSON header, the
    header, the bytes.
    """

    def __init__(
        self,
        folder: Path,
        specs: Specs,
        shard_bytes: int = SHARD_BYTES,
        owners: Mapping[str, int] | None = None,
        process: int = 0,
        whole_files: Mapping[Path, list[str]] | None = None,
        hard_links: bool = False,
    ):
        """Plans shards of at most `shard_bytes` for the tensors of `specs`, in that order, and lays out their
        files; those that are there already, from a run that was cut off, are gone on with. A tensor larger
        than `shard_bytes` gets a shard of its own.

        `whole_files` are files of another folder that are to be shards of this one as they are: see `share`.
        With `hard_links` they may become one file with those. Where several processes write one folder,
        `owners` has the process of each tensor: no file has tensors of two, all processes plan the same
        files, and this one lays out and writes its own.
        """
        self._folder, self._specs, self._hard_links = folder, specs, hard_links
        owners = owners or dict.fromkeys(specs, 0)
        whole_files = whole_files or {}
        self._shards = _plan_shards(specs, shard_bytes, owners, list(whole_files.values()))
        self._own = [file for file, names in self._shards.items() if owners[names[0]] == process]
        self._whole = dict(zip(self._shards, whole_files, strict=False))
        self._place: dict[str, tuple[Path, int]] = {}
        for file in self._own:
            if file not in self._whole:
                self._lay_out(folder / file, self._shards[file])

    def share(self, done: set[str]) -> list[str]:
        """Clones the whole files, where the disk can, or makes hard links of them; the others are laid out to
        be written. `done` has the tensors that are on disk already. Gives the tensors that need no writing
        any more."""
        shared = []
        for file, source in self._whole.items():
            target, names = self._folder / file, self._shards[file]
            if done.issuperset(names) and target.is_file():
                continue
            # A link to the source must not be written to; a kill may have noted a part of its tensors.
            if done.isdisjoint(names) or (target.is_file() and target.samefile(source)):
                target.unlink(missing_ok=True)
                if share_file(source, target) or (self._hard_links and link_file(source, target)):
                    shared += names
                    continue
            self._lay_out(target, names)
        return shared

    def together(self, names: Iterable[str]) -> list[str]:
        """All tensors that are in one file with one of `names`: the whole file is written anew, as it may
        have the header of another.
        """
        wanted = set(names)
        return [name for own in self._shards.values() if not wanted.isdisjoint(own) for name in own]

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes rows of a tensor from the row `start` on."""
        file, offset = self._place[name]
        shape, dtype = self._specs[name]
        assert values.dtype == dtype, (name, values.dtype, dtype)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        offset += start * row_bytes
        with open_to_write(file, buffering=0) as handle:
            handle.seek(offset)
            while data:
                data = data[handle.write(data[:_WRITE_BYTES]) :]

    def sync(self) -> None:
        """Returns when all that was written is on disk."""
        for file in self._own:
            sync_file(self._folder / file)

    def close(self, shared: bool = True) -> None:
        """Writes the index, where there are several files; of several processes, one calls this, when all
        have written and synced.

        Raises BadInput when a file of another process is not there, unless the folder is not `shared` by
        them.
        """
        missing = [file for file in self._shards if shared and not (self._folder / file).is_file()]
        if missing:
            raise BadInput(
                f"{self._folder}: {missing[0]} is not there; give a folder on a disk that all processes share"
            )
        if len(self._shards) > 1:
            weight_map = {name: file for file, names in self._shards.items() for name in names}
            index = {
                "metadata": {"total_size": sum(_size(*spec) for spec in self._specs.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_text(self._folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _lay_out(self, file: Path, names: list[str]) -> None:
        header: dict[str, Any] = {METADATA: {"format": FORMAT}}
        offset = 0
        for name in names:
            shape, dtype = self._specs[name]
            size = _size(shape, dtype)
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # values begin aligned
        with open_to_write(file) as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            handle.flush()
            preallocate(handle, 8 + len(text) + offset)
        for name in names:
            self._place[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])


def _plan_shards(
    specs: Specs, shard_bytes: int, owners: Mapping[str, int], whole: list[list[str]]
) -> dict[str, list[str]]:
    """The tensors of each file; `whole` are the first ones."""
    shards = list(whole)
    planned = {name for names in whole for name in names}
    for owner in sorted(set(owners.values())):
        filled = shard_bytes + 1
        for name in (name for name in specs if owners[name] == owner and name not in planned):
            size = _size(*specs[name])
            if filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    return dict(zip(files, shards, strict=True))


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _read_index(folder: Path) -> dict[str, str]:
    """The index's map from tensor to file name, every file there; empty without an index."""
    path = folder / INDEX
    if not _is_there(path):
        return {}
    found = read_json(path, folder)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadInput(f"{path}: not a safetensors index (a JSON object with a weight_map); fetch it again")
    if not weight_map:
        raise BadInput(f"{path}: names no tensors")
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if Path(file).name != file or "\0" in file]
    if outside:
        raise BadInput(f"{path}: names files outside of the folder: {', '.join(outside)}")
    if _is_there(folder / SINGLE) and SINGLE not in files:
        # transformers reads the file, and vLLM what the index names.
        raise BadInput(
            f"{folder}: holds {SINGLE} and an index that does not name it; remove the one that does not count"
        )
    missing = [file for file in files if not _is_there(folder / file)]
    if missing:
        raise BadInput(
            f"{path}: names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing; "
            "fetch the folder again"
        )
    return weight_map


def _is_there(file: Path) -> bool:
    try:
        return file.exists() or file.is_symlink()
    except OSError:  # a name that the system cannot hold
        return False


def _single_file(folder: Path) -> Path:
    found = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise BadInput(
            f"{folder}: {len(found)} safetensors files and no {INDEX} that says which of them count; fetch "
            "the index too"
        )
    if not found:
        raise BadInput(
            f"{folder}: no safetensors files; other weight formats must be converted to safetensors first"
        )
    return found[0]


def _read_into(data: memoryview, file: Path, offset: int) -> None:
    with open(file, "rb", buffering=0) as handle:
        handle.seek(offset)
        while data:
            count = handle.readinto(data)
            if not count:
                raise OSError("it ends too early")
            data = data[count:]
