"""Tensors by name in the safetensors files of a folder: one file, or shards with an index as Hugging Face writes them."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from babel_jax.errors import BadInput
from babel_jax.files import write_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The default of transformers and huggingface_hub: large enough for few files, small enough to fetch again after a broken download.
SHARD_BYTES = 5_000_000_000

DTYPES: dict[str, np.dtype] = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


class StoredTensors:
    """The tensors of a folder's safetensors files: names, shapes and types at once, values when asked for."""

    def __init__(self, folder: Path):
        """Opens every file and reads its header. Raises BadInput for files that are missing, damaged, or not as the index says."""
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
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

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The values of a tensor, or of the part of it that `index` selects (one slice an axis); only that part is read."""
        with _explain(self.file_of[name]):
            return self._slice(name)[index] if index else self._open[self.file_of[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._open[self.file_of[name]].get_slice(name)


def write_tensors(
    folder: Path,
    specs: dict[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the tensors named in `specs` (shape, type), in that order, into shards of at most `shard_bytes` each.

    `read` gives a tensor's values; one shard's tensors are held at a time. A tensor larger than `shard_bytes` gets a shard of its own.
    """
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in specs.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [SINGLE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with tqdm(total=sum(sizes.values()), desc="write tensors", unit="B", unit_scale=True, disable=None) as progress:
        for file, names in zip(files, shards, strict=True):
            tensors = {name: np.ascontiguousarray(read(name)) for name in names}
            for name, tensor in tensors.items():
                assert (tensor.shape, tensor.dtype) == specs[name], (name, tensor.shape, tensor.dtype)
            # transformers refuses files whose metadata does not name the framework's format.
            save_file(tensors, folder / file, metadata={"format": "pt"})
            progress.update(sum(sizes[name] for name in names))
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


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


@contextlib.contextmanager
def _explain(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file}: truncated or damaged, or not a safetensors file ({_one_line(error)}); fetch it again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
