"""Tensors by name in the safetensors files of a folder: one file, or shards with an index as Hugging Face writes them."""

import contextlib
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from babel_jax.checkpoints.object_storage import remote_of
from babel_jax.errors import BadInput
from babel_jax.files import share_file, sync_file, write_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The default of transformers and huggingface_hub: large enough for few files, small enough to fetch again after a broken download.
SHARD_BYTES = 5_000_000_000
# For more at once Linux puts pages of 2 MiB into its cache, which a virtual machine may have to fetch from its host: 10 times as slow.
_WRITE_BYTES = 2**20

Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]
DTYPES: dict[str, np.dtype] = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_FORMAT = "pt"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensors:
    """The tensors of a folder's safetensors files: names, shapes and types at once, values when asked for. Threads may share it.

    `bytes_read` counts the bytes of values that were read.
    """

    def __init__(self, folder: Path):
        """Opens every file and reads its header. Raises BadInput for files that are missing, damaged, or not as the index says."""
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self.bytes_read = 0
        self._counting = threading.Lock()
        self._open: dict[Path, Any] = {}
        self._begins: dict[Path, dict[str, int]] = {}
        self._remote = remote_of(folder)
        index = _read_index(folder)
        for file in sorted({folder / name for name in index.values()}) if index else [_single_file(folder)]:
            with _explain(file):
                self._open[file] = safe_open(file, framework="numpy")
                for name in self._open[file].keys():  # noqa: SIM118 (not a dict: it has no other way to list names)
                    self.file_of[name] = file
        for name, file_name in index.items():
            if self.file_of.get(name) != folder / file_name:
                raise BadInput(f"{folder / INDEX}: says that {name} is in {file_name}, and it is not there; fetch the folder again")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor. Raises BadInput for one that models of the supported families do not have."""
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise BadInput(f"{self.file_of[name]}: tensor {name} has type {stored}; supported: {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor, read without a map of the file, so that memory holds those rows and nothing else."""
        file = self.file_of[name]
        shape, dtype = self.shape(name), self.dtype(name)
        values = np.empty((stop - start, *shape[1:]), dtype)
        with _explain(file):
            offset = self._begin(file, name) + start * math.prod(shape[1:]) * dtype.itemsize
            data = values.reshape(-1).view(np.uint8).data
            if self._remote is not None:
                data[:] = self._remote.read(file.name, offset, offset + values.nbytes)
            else:
                _read_into(data, file, offset)
        with self._counting:
            self.bytes_read += values.nbytes
        return values

    def whole_files(self, kept: Callable[[str], bool]) -> dict[Path, list[str]]:
        """The local files all of whose tensors are `kept`, with these; transformers can read each as it is."""
        names: dict[Path, list[str]] = {}
        for name, file in self.file_of.items():
            names.setdefault(file, []).append(name)
        return {
            file: names[file]
            for file in names
            if self._remote is None and all(map(kept, names[file])) and (self._open[file].metadata() or {}).get("format") == _FORMAT
        }

    def _begin(self, file: Path, name: str) -> int:
        """The offset in `file` of a tensor's first byte."""
        if file not in self._begins:
            with open(file, "rb") as handle:
                (length,) = struct.unpack("<Q", handle.read(8))
                header = json.loads(handle.read(length))
            self._begins[file] = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if "dtype" in entry}
        return self._begins[file][name]

    def _slice(self, name: str) -> Any:
        return self._open[self.file_of[name]].get_slice(name)


class TensorFiles:
    """Safetensors files being written: every header first, then the values of any tensor, in any order and in pieces.

    Format: https://huggingface.co/docs/safetensors, a little-endian u64 with the length of a JSON header, the header, the bytes.
    """

    def __init__(
        self,
        folder: Path,
        specs: Specs,
        shard_bytes: int = SHARD_BYTES,
        owners: Mapping[str, int] | None = None,
        process: int = 0,
        whole_files: Mapping[Path, list[str]] | None = None,
    ):
        """Plans shards of at most `shard_bytes` for the tensors of `specs`, in that order, and lays out their files; those that are there
        already, from a run that was cut off, are gone on with. A tensor larger than `shard_bytes` gets a shard of its own.

        `whole_files` are files of another folder that are to be shards of this one as they are: see `share`.
        Where several processes write one folder, `owners` has the process of each tensor: no file has tensors of two, all processes plan
        the same files, and this one lays out and writes its own.
        """
        self._folder, self._specs = folder, specs
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
        """Clones or links the whole files, where the disk can; the others are laid out to be written. `done` has the tensors that are on
        disk already. Gives the tensors that need no writing any more."""
        shared = []
        for file, source in self._whole.items():
            target, names = self._folder / file, self._shards[file]
            if done.issuperset(names) and target.is_file():
                continue
            # A link to the source must not be written to; a kill may have noted a part of its tensors.
            if done.isdisjoint(names) or (target.is_file() and target.samefile(source)):
                target.unlink(missing_ok=True)
                if share_file(source, target):
                    shared += names
                    continue
            self._lay_out(target, names)
        return shared

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes rows of a tensor from the row `start` on."""
        file, offset = self._place[name]
        shape, dtype = self._specs[name]
        assert values.dtype == dtype, (name, values.dtype, dtype)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        offset += start * row_bytes
        with open(file, "r+b", buffering=0) as handle:
            handle.seek(offset)
            while data:
                data = data[handle.write(data[:_WRITE_BYTES]) :]

    def sync(self) -> None:
        """Returns when all that was written is on disk."""
        for file in self._own:
            sync_file(self._folder / file)

    def close(self) -> None:
        """Writes the index, where there are several files; of several processes, one calls this, when all have written and synced.

        Raises BadInput when a file of another process is not there.
        """
        missing = [file for file in self._shards if not (self._folder / file).is_file()]
        if missing:
            raise BadInput(f"{self._folder}: {missing[0]} is not there; give a folder on a disk that all processes share")
        if len(self._shards) > 1:
            weight_map = {name: file for file, names in self._shards.items() for name in names}
            index = {
                "metadata": {"total_size": sum(_size(*spec) for spec in self._specs.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_text(self._folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _lay_out(self, file: Path, names: list[str]) -> None:
        # transformers refuses files whose metadata does not name the framework's format.
        header: dict[str, Any] = {"__metadata__": {"format": _FORMAT}}
        offset = 0
        for name in names:
            shape, dtype = self._specs[name]
            size = _size(shape, dtype)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # values begin aligned
        with open(file, "ab"):
            pass
        with open(file, "r+b") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            # A full disk shows here, and not hours later.
            os.posix_fallocate(handle.fileno(), 0, 8 + len(text) + offset)
        for name in names:
            self._place[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])


def _plan_shards(specs: Specs, shard_bytes: int, owners: Mapping[str, int], whole: list[list[str]]) -> dict[str, list[str]]:
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
    files = [SINGLE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    return dict(zip(files, shards, strict=True))


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _read_index(folder: Path) -> dict[str, str]:
    """The index's map from tensor to file name, every file there; empty without an index."""
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        outside = [file for file in files if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path}: not a safetensors index (a JSON object with a weight_map); fetch it again") from None
    if outside or not weight_map:
        raise BadInput(f"{path}: " + (f"names files outside of the folder: {', '.join(outside)}" if outside else "names no tensors"))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise BadInput(f"{path}: names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing; fetch the folder again")
    return weight_map


def _single_file(folder: Path) -> Path:
    found = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise BadInput(f"{folder}: {len(found)} safetensors files and no {INDEX} that says which of them count; fetch the index too")
    if not found:
        raise BadInput(f"{folder}: no safetensors files; other weight formats must be converted to safetensors first")
    return found[0]


def _read_into(data: memoryview, file: Path, offset: int) -> None:
    with open(file, "rb", buffering=0) as handle:
        handle.seek(offset)
        while data:
            count = handle.readinto(data)
            if not count:
                raise OSError("it ends too early")
            data = data[count:]


@contextlib.contextmanager
def _explain(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file}: truncated or damaged, or not a safetensors file ({_one_line(error)}); fetch it again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
