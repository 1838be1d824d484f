"""Tensors by name in the safetensors files of a folder: one file, or shards with an index in the form of
Hugging Face.
"""

import json
import math
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np

from babel_jax.errors import BadInput
from babel_jax.files import (
    link_file,
    open_to_write,
    preallocate,
    share_file,
    sync_file,
    write_text,
)
from babel_jax.model_files import INDEX
from babel_jax.model_folders.object_storage import remote_of
from babel_jax.model_folders.safetensors_header import (
    DTYPES,
    FORMAT,
    METADATA,
    Header,
    explain_damage,
    read_header,
)
from babel_jax.model_folders.safetensors_index import SINGLE, read_index, single_file

# The default of transformers and huggingface_hub: large enough for few files, small enough to fetch again
# after a broken download.
SHARD_BYTES = 5_000_000_000
# For larger writes, Linux puts larger pages into its cache. A virtual machine may have to get these from its
# host: 2 MiB pages are 10 times as slow, and writes of 128 KiB to 1 MiB 1.3 to 3 times (0.3 s for 1 GB in
# writes of 64 KiB).
_WRITE_BYTES = 2**16
_READ_BYTES = 2**18  # at a time, of what is copied: a buffer that stays in the processor's cache

Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]
# The beginnings of names in a model that was saved without its output layer, and the prefix that they lack.
_BARE, _PREFIX = ("embed_tokens.", "layers.", "norm."), "model."
_COMPARED_BYTES = 2**24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensors:
    """The tensors of a folder's safetensors files: names, shapes and dtypes at once, values on request.
    Threads may share it.

    Names are those of the whole model. (In a model that was saved without its output layer, the files lack
    the prefix `model.`.) `bytes_read` counts the bytes of values that were read.
    """

    def __init__(self, folder: Path):
        """Reads the header of every file. Raises BadInput for files that are missing, damaged, or differ from
        the index, and for a tensor with different values in two files.
        """
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self.bytes_read = 0
        self._counting = threading.Lock()
        self._remote = remote_of(folder)
        self._headers: dict[Path, Header] = {}

        index = read_index(folder)
        for file in sorted({folder / name for name in index.values()}) if index else [single_file(folder)]:
            self._headers[file] = read_header(file, folder)
            for name in self._headers[file].tensors:
                # A tensor in two files is accepted only if both copies are equal.
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

        # Some folders are of the base model alone, whose names lack the prefix.
        has_bare = any(name.startswith(_BARE) for name in self.file_of)
        has_prefix = any(name.startswith(_PREFIX) for name in self.file_of)
        if has_bare and not has_prefix:
            self.file_of = {_whole_name(name): file for name, file in self.file_of.items()}
            self._tensors = {_whole_name(name): tensor for name, tensor in self._tensors.items()}

    def _check_same(self, name: str, first_file: Path, second_file: Path) -> None:
        """Raises BadInput unless a tensor is the same in both files: readers differ in the file that they
        use.
        """
        first, second = self._headers[first_file].tensors[name], self._headers[second_file].tensors[name]
        same = (first.dtype, first.shape) == (second.dtype, second.shape)
        # In pieces, because a tensor may have gigabytes.
        for start in range(0, first.size if same else 0, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, first.size - start)
            left, right = bytearray(count), bytearray(count)
            self._read_bytes(memoryview(left), first_file, first.begin + start)
            self._read_bytes(memoryview(right), second_file, second.begin + start)
            same = same and left == right
        if not same:
            files = f"{first_file.name} and {second_file.name}"
            raise BadInput(
                f"{self.folder}: {files} both hold {name}, with different values; remove the one that does "
                "not count"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor. Raises BadInput for a type that models of the supported families do not
        have.
        """
        stored = self._tensors[name].dtype
        if stored not in DTYPES:
            raise BadInput(
                f"{self.file_of[name]}: tensor {name} has type {stored}; supported: {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor. The file is not mapped, so memory holds only these rows."""
        shape, dtype = self.shape(name), self.dtype(name)
        values = np.empty((stop - start, *shape[1:]), dtype)
        offset = self._tensors[name].begin + start * math.prod(shape[1:]) * dtype.itemsize
        self._read_bytes(values.reshape(-1).view(np.uint8).data, self.file_of[name], offset)
        with self._counting:
            self.bytes_read += values.nbytes
        return values

    def read_blocks(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes of rows `start` to `stop` of a tensor, in blocks. A block is overwritten by the next."""
        if self._remote is not None:
            yield self.read_rows(name, start, stop).reshape(-1).view(np.uint8).data
            return
        # One small buffer for the whole range: it stays in the processor's cache.
        file, row_bytes = self.file_of[name], math.prod(self.shape(name)[1:]) * self.dtype(name).itemsize
        offset = self._tensors[name].begin + start * row_bytes
        end = offset + (stop - start) * row_bytes
        buffer = memoryview(bytearray(_READ_BYTES))
        with open(self._headers[file].path, "rb", buffering=0) as handle:
            handle.seek(offset)
            while offset < end:
                block = buffer[: min(len(buffer), end - offset)]
                with explain_damage(file):
                    _fill(block, handle)
                yield block
                offset += len(block)
        with self._counting:
            self.bytes_read += (stop - start) * row_bytes

    def _read_bytes(self, data: memoryview, file: Path, offset: int) -> None:
        with explain_damage(file):
            if self._remote is not None:
                data[:] = self._remote.read(file.name, offset, offset + len(data))
            else:
                _read_into(data, self._headers[file].path, offset)

    def whole_files(self, kept: Callable[[str], bool]) -> dict[Path, list[str]]:
        """The local files whose tensors are all `kept`, with the names of their tensors; transformers can
        read each unchanged.
        """
        names: dict[Path, list[str]] = {}
        for name, file in self.file_of.items():
            names.setdefault(file, []).append(name)
        whole = {}
        for file, header in self._headers.items():
            # A file is not complete if a tensor counts in another file, or is stored without its prefix.
            complete = header.tensors.keys() == set(names.get(file, ()))
            if self._remote is None and header.has_format and complete and all(map(kept, names[file])):
                whole[file] = names[file]
        return whole


def _whole_name(name: str) -> str:
    return _PREFIX + name if name.startswith(_BARE) else name


class TensorFiles:
    """Safetensors files being written: first every header, then the values of any tensor, in any order and in
    pieces.

    Format: https://huggingface.co/docs/safetensors. A little-endian u64 with the length of the header, a JSON
    header, and the bytes of the tensors.
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
        written: Callable[[Path, int, int], None] = lambda file, start, stop: None,
    ):
        """Plans shards of at most `shard_bytes` for the tensors of `specs`, in order, and writes their
        headers. Files of an interrupted run are continued. A tensor larger than `shard_bytes` gets its own
        shard.

        whole_files: files of another folder that become shards of this one unchanged; see `share`.
        hard_links: they may become one file with the originals. owners: if several processes write one
        folder, the process of each tensor. No file has tensors of two processes; all processes plan the same
        files, and each writes its own. written: receives each file and the bytes of it that were just
        written, from `start` to before `stop`; several threads call it.
        """
        self._folder, self._specs, self._hard_links, self._written = folder, specs, hard_links, written
        owners = owners or dict.fromkeys(specs, 0)
        whole_files = whole_files or {}
        self._shards = _plan_shards(specs, shard_bytes, owners, list(whole_files.values()))
        self._files_of_process = [file for file, names in self._shards.items() if owners[names[0]] == process]
        self._whole = dict(zip(self._shards, whole_files, strict=False))
        # The file of each tensor, and the offset of its values.
        self._position: dict[str, tuple[Path, int]] = {}
        for file in self._files_of_process:
            if file not in self._whole:
                self._lay_out(folder / file, self._shards[file])

    def share(self, done: set[str]) -> list[str]:
        """Clones the whole files if the disk can, or makes hard links of them; the headers of the other files
        are written. done: the tensors that are on disk already. Returns the tensors that need no writing any
        more.
        """
        shared = []
        for file, source in self._whole.items():
            target, names = self._folder / file, self._shards[file]
            if done.issuperset(names) and target.is_file():
                continue
            # A link to the source must not be written to. After a kill, some of its tensors may be recorded.
            if done.isdisjoint(names) or (target.is_file() and target.samefile(source)):
                target.unlink(missing_ok=True)
                if share_file(source, target) or (self._hard_links and link_file(source, target)):
                    shared += names
                    continue
            self._lay_out(target, names)
        return shared

    def together(self, names: Iterable[str]) -> list[str]:
        """All tensors in one file with one of `names`: the whole file is written again, because its header
        may be wrong.
        """
        wanted = set(names)
        tensors: list[str] = []
        for names_of_file in self._shards.values():
            if not wanted.isdisjoint(names_of_file):
                tensors += names_of_file
        return tensors

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes rows of a tensor from row `start` on."""
        dtype = self._specs[name][1]
        assert values.dtype == dtype, (name, values.dtype, dtype)
        self.write_blocks(name, start, [np.ascontiguousarray(values).reshape(-1).view(np.uint8).data])

    def write_blocks(self, name: str, start: int, blocks: Iterable[memoryview]) -> None:
        """Writes the bytes of rows of a tensor from row `start` on."""
        file, offset = self._position[name]
        shape, dtype = self._specs[name]
        begin = end = offset + start * math.prod(shape[1:]) * dtype.itemsize
        with open_to_write(file, buffering=0) as handle:
            handle.seek(begin)
            for block in blocks:
                end += len(block)
                while block:
                    block = block[handle.write(block[:_WRITE_BYTES]) :]
        self._written(file, begin, end)

    def sync(self) -> None:
        """Returns when everything written is on disk."""
        for file in self._files_of_process:
            sync_file(self._folder / file)

    def close(self, shared: bool = True) -> None:
        """Writes the index if there are several files. Of several processes, one calls this after all have
        written and synced.

        Raises BadInput if a file of another process is missing, unless the processes have separate folders
        (`shared` False).
        """
        missing = [file for file in self._shards if shared and not (self._folder / file).is_file()]
        if missing:
            raise BadInput(
                f"{self._folder}: {missing[0]} is not there; give a folder on a disk that all processes share"
            )
        # A single file needs no index.
        if len(self._shards) > 1:
            weight_map: dict[str, str] = {}
            for file, names in self._shards.items():
                weight_map |= dict.fromkeys(names, file)
            index = {
                "metadata": {"total_size": sum(_size(*spec) for spec in self._specs.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_text(self._folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _lay_out(self, file: Path, names: list[str]) -> None:
        """Writes the header of a file and reserves the space of its tensors."""
        # Offsets count from the end of the header, tensor after tensor without a gap.
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
        # Spaces, so that the values are aligned to 8 bytes.
        text += b" " * (-len(text) % 8)
        with open_to_write(file) as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            handle.flush()
            preallocate(handle, 8 + len(text) + offset)
        self._written(file, 0, 8 + len(text))
        for name in names:
            self._position[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])


def _plan_shards(
    specs: Specs, shard_bytes: int, owners: Mapping[str, int], whole: list[list[str]]
) -> dict[str, list[str]]:
    """The tensors of each file; the files of `whole` come first."""
    shards = list(whole)
    planned = {name for names in whole for name in names}
    for owner in sorted(set(owners.values())):
        # The files of one process have no tensor of another, so a new file begins.
        filled = shard_bytes + 1
        for name in specs:
            if owners[name] != owner or name in planned:
                continue
            size = _size(*specs[name])
            if filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    files = {}
    for number, names in enumerate(shards, 1):
        files[f"model-{number:05d}-of-{len(shards):05d}.safetensors"] = names
    return files


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _read_into(data: memoryview, file: Path, offset: int) -> None:
    with open(file, "rb", buffering=0) as handle:
        handle.seek(offset)
        _fill(data, handle)


def _fill(data: memoryview, handle: RawIOBase) -> None:
    while data:
        count = handle.readinto(data)
        if not count:
            raise OSError("it ends too early")
        data = data[count:]
