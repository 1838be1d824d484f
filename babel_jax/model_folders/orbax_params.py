"""The parameter tree in an Orbax checkpoint: the same nested tree, layers stacked, every leaf in its own
dtype.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from absl import logging as absl_logging
from flax import traverse_util
from jaxtyping import Array, PyTree
from orbax.checkpoint import v1 as ocp

from babel_jax.buckets import kvstore_spec
from babel_jax.config import ModelConfig
from babel_jax.disk_errors import is_full
from babel_jax.distributed.agreement import agreed
from babel_jax.errors import BadInput, one_line
from babel_jax.files import read_json, regular_file, sync_file, sync_folder, write_text
from babel_jax.model.shapes import Place, Shape, leaf_shapes
from babel_jax.model_files import PARAMS
from babel_jax.model_folders.layout import check_shapes
from babel_jax.model_folders.names import tensor_place
from babel_jax.model_folders.safetensors_files import Specs
from babel_jax.model_folders.safetensors_header import DTYPES
from babel_jax.places import PARTIAL, listing, native, url_of

# Names and sizes of the files that Orbax wrote. Orbax notices a truncated file only when it reads that part,
# and then prints tracebacks.
FILES = "files.json"
_NO_CACHE = {"cache_pool": {"total_bytes_limit": 0}}
# With a sync, TensorStore waits for the disk after every piece, and pieces wait for each other.
_NO_SYNC = {"file_io_sync": False}
_MOST_METADATA_BYTES = 2**26
_VALUES = "d"  # the folder of OCDBT's files of values
_ITEM = "state"  # the folder into which Orbax's v1 API puts a tree


def load_orbax_params(
    folder: Path, config: ModelConfig, dtype: Any, shardings: dict[Place, jax.sharding.Sharding]
) -> PyTree[Array]:
    """The parameter tree of an Orbax folder. With dtype None, each leaf keeps its dtype.

    Raises BadInput if params/ is damaged or does not have the model of the config.
    """
    path = (folder / PARAMS).absolute()
    wanted = {}
    for place, leaf in _checked_metadata(path, config).items():
        wanted[place] = jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=shardings[place])
    with _explain(path):
        return ocp.load(native(path), traverse_util.unflatten_dict(wanted))


def _checked_metadata(path: Path, config: ModelConfig) -> dict[Place, Any]:
    """Shape and dtype of each leaf, checked against the config."""
    _check_files(path)
    with _explain(path):
        stored = traverse_util.flatten_dict(ocp.metadata(native(path)).metadata)
    shapes = {"/".join(place): tuple(getattr(leaf, "shape", ())) for place, leaf in stored.items()}
    expected = {"/".join(place): shape for place, shape in leaf_shapes(config).items()}
    check_shapes(shapes, expected, path, lambda _: path)
    for place, leaf in stored.items():
        if np.dtype(leaf.dtype) not in DTYPES.values():
            raise BadInput(
                f"{path}: {'/'.join(place)} has type {leaf.dtype}; supported: "
                f"{', '.join(map(str, DTYPES.values()))}"
            )
    result: dict[Place, Any] = stored
    return result


def save_orbax_params(folder: Path, params: PyTree[Array]) -> None:
    """Writes params/ into `folder`; all processes must call this."""
    path = (folder / PARAMS).absolute()
    with _quiet():
        ocp.save(path, params)
    with agreed():
        if jax.process_index() == 0:
            _list_files(path)


def _list_files(path: Path) -> None:
    sizes = {}
    for file in sorted(path.rglob("*")):
        # Not an older list, nor a part of one that a kill left.
        if file.is_file() and file != path / FILES and not file.name.endswith(PARTIAL):
            sizes[str(file.relative_to(path))] = file.stat().st_size
    write_text(path / FILES, json.dumps(sizes, indent=2) + "\n")


class StoredLeaves:
    """The leaves of params/ as tensors by their Hugging Face names, read in pieces. Threads may share it."""

    def __init__(self, folder: Path, config: ModelConfig):
        """Raises BadInput as `load_orbax_params` does, and for an Orbax checkpoint of another layout."""
        self._path = (folder / PARAMS).absolute()
        stored = _checked_metadata(self._path, config)
        _check_layout(self._path)
        with _explain(self._path):
            context = tensorstore.Context(_NO_CACHE)
            arrays = {place: _open_leaf(context, self._path, place) for place in stored}
            self._arrays = {place: array.result() for place, array in arrays.items()}

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor."""
        result: np.dtype = np.dtype(self._arrays[tensor_place(name)[0]].dtype.numpy_dtype)
        return result

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor."""
        place, layer = tensor_place(name)
        array = self._arrays[place]
        with _explain(self._path):
            result: np.ndarray = (
                (array[start:stop] if layer is None else array[layer, start:stop]).read(order="C").result()
            )
            return result


class LeafFiles:
    """params/ being written: tensors by their Hugging Face names, in pieces, into stacked leaves.

    Orbax first writes the tree with leaves of one element, so that names and metadata are in its form.
    TensorStore then writes each leaf again (zarr 3 in OCDBT, like Orbax) in uncompressed chunks of one piece,
    with a checksum (crc32c) that every reader verifies.
    """

    def __init__(self, folder: Path, specs: Specs, rows_of_piece: Callable[[Shape, np.dtype], int]):
        """specs: shape and dtype of each tensor by its name; all tensors of a leaf must have the same
        dtype.
        """
        self._path = (folder / PARAMS).absolute()
        # The shape of one layer's row, its type, and the number of layers (0 outside the layers).
        leaves: dict[Place, tuple[Shape, np.dtype, int]] = {}
        for name, (shape, dtype) in specs.items():
            place, layer = tensor_place(name)
            layers = leaves[place][2] + 1 if place in leaves else 1
            leaves[place] = (shape, dtype, 0 if layer is None else layers)
        # A folder that an earlier run began has this file, and is continued.
        if not (self._path / "orbax.checkpoint").is_file():
            shutil.rmtree(self._path, ignore_errors=True)
            small = {place: np.zeros(1, dtype) for place, (_, dtype, _) in leaves.items()}
            with _quiet():
                ocp.save(self._path, traverse_util.unflatten_dict(small))
        self._synced: set[Path] = set()
        context, opened = tensorstore.Context(_NO_CACHE | _NO_SYNC), {}
        for place, (shape, dtype, layers) in leaves.items():
            chunk = (rows_of_piece(shape, dtype), *shape[1:])
            opened[place] = _open_leaf(
                context,
                self._path,
                place,
                (layers, *shape) if layers else shape,
                (1, *chunk) if layers else chunk,
                dtype,
            )
        try:
            # Waits for all, so that none is still writing when another has failed.
            for array in opened.values():
                array.exception()
            self._arrays = {place: array.result() for place, array in opened.items()}
        except ValueError as error:
            # Damage means that the machine went down between two syncs.
            if is_full(error):
                raise
            raise BadInput(
                f"{self._path}: what an earlier run left is damaged and was removed; run the command again"
            ) from error

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes rows of a tensor from row `start` on, which must begin a piece."""
        place, layer = tensor_place(name)
        rows = slice(start, start + len(values))
        array = self._arrays[place]
        (array[rows] if layer is None else array[layer, rows]).write(values).result()

    def sync(self) -> None:
        """Returns when everything written is on disk.

        Files of values are written once; only the manifests are written again.
        """
        files = {path for path in self._path.rglob("*") if path.is_file()}
        for file in sorted(files - self._synced):
            sync_file(file)
        for folder in sorted({file.parent for file in files - self._synced}):
            sync_folder(folder)
        self._synced |= {file for file in files if not file.name.startswith("manifest")}

    def together(self, names: Iterable[str]) -> list[str]:
        """The tensors that must be written again with `names`: only these."""
        return list(names)

    def close(self) -> None:
        """Writes the list of files."""
        _list_files(self._path)


def _open_leaf(
    context: tensorstore.Context,
    path: Path,
    place: Place,
    shape: Shape | None = None,
    chunk: Shape | None = None,
    dtype: Any = None,
) -> Any:
    """The leaf as a TensorStore array (a future). With `shape`, it is created, unless it exists in that
    shape.
    """
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": _store(path / _ITEM), "path": ".".join(place) + "/"},
        "recheck_cached_data": False,
        # As in Orbax, a missing chunk is damage; so chunks of zeros must be written too.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    # Without a shape, the array exists and is only opened.
    if shape is None or chunk is None:
        return tensorstore.open(spec, context=context, open=True)
    spec["metadata"] = {
        "shape": shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "data_type": str(np.dtype(dtype)),
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    # An array that an earlier run made in this shape keeps its chunks. Any other one is replaced.
    try:
        tensorstore.open(spec, context=context, open=True).result()
    except ValueError:
        spec |= {"create": True, "delete_existing": True}
    return tensorstore.open(spec, context=context)


def _store(folder: Path) -> Any:
    url = url_of(folder)
    return f"file://{folder.absolute()}/" if url is None else kvstore_spec(f"{url}/")


def _check_files(path: Path) -> None:
    """Raises BadInput if a file is irregular, missing, or of another size than was written. Orbax checkpoints
    of other programs have no list of sizes.
    """
    # Links that lead out of the folder, and pipes and devices, are refused before Orbax opens them.
    if url_of(path) is None:
        for file in sorted(path.rglob("*")):
            if file.is_symlink() or not file.is_dir():
                regular_file(file, path.parent)
    present = listing(path)
    for file, size in present.items():
        # Orbax and TensorStore read all files into memory, except those of values.
        if file.parent.name != _VALUES and size > _MOST_METADATA_BYTES:
            raise BadInput(
                f"{file}: larger than the {_MOST_METADATA_BYTES:,} bytes that such a file may have"
            )
    try:
        sizes = read_json(path / FILES, path.parent)
    except FileNotFoundError:
        return
    if not isinstance(sizes, dict):
        raise BadInput(f"{path / FILES}: not a list of files with their sizes; make the folder again")
    for name, size in sizes.items():
        present_size = present.get(path / name)
        if present_size != size and not name.endswith(PARTIAL):
            state = "missing" if present_size is None else f"{present_size} bytes long, not {size}"
            raise BadInput(f"{path / name}: {state}: damaged Orbax parameters; make the folder again")


def _check_layout(path: Path) -> None:
    """Raises BadInput for a checkpoint that Orbax can read and `_open_leaf` cannot: Orbax v0 has no folder
    around the tree and writes zarr 2.
    """
    description = path / _ITEM / "_METADATA"
    with _explain(path):
        layout = read_json(description, path.parent, _MOST_METADATA_BYTES) if description.is_file() else {}
    if not (layout.get("use_ocdbt") and layout.get("use_zarr3")):
        raise BadInput(
            f"{path}: not in the layout of Orbax v1 (zarr 3 in OCDBT) but, it seems, in that of v0, which "
            "is not read in pieces; write it anew with orbax.checkpoint.v1: save(NEW, load(OLD))"
        )


@contextlib.contextmanager
def _explain(path: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except Exception as error:
        # Orbax and tensorstore raise errors of many types: JSON, key, value and OS errors.
        line = one_line(error, 200)
        raise BadInput(
            f"{path}: damaged Orbax parameters ({type(error).__name__}: {line}); make the folder again"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's logs of tracebacks off the terminal: it also raises these errors, and one line is
    enough.
    """
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


# asyncio logs tracebacks too, for tasks of Orbax that failed after the first one, when they are collected.
logging.getLogger("asyncio").addFilter(
    lambda record: "exception was never retrieved" not in record.getMessage()
)
