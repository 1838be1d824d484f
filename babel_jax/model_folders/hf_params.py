"""The parameter tree in Hugging Face's safetensors files, bit for bit in both directions."""

import logging
import math
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Array, PyTree

from babel_jax.config import ModelConfig
from babel_jax.disk_errors import explain_os_errors
from babel_jax.distributed.agreement import agreed, is_in_parts, shared_out
from babel_jax.errors import BadInput
from babel_jax.model.shapes import Place, Shape, is_stacked, leaf_shapes
from babel_jax.model_folders.hf_tensors import open_hf_tensors
from babel_jax.model_folders.layout import tensor_shapes
from babel_jax.model_folders.names import tensor_names, tensor_place
from babel_jax.model_folders.resharding import gathered, host_values, moved, reading_steps
from babel_jax.model_folders.safetensors_files import SHARD_BYTES, Specs, StoredTensors, TensorFiles
from babel_jax.progress import Work

log = logging.getLogger("babel")

# Ranges read at once: requests to object storage wait long, and disks are faster with a queue.
_READERS = 16


def load_hf_params(
    folder: Path, config: ModelConfig, dtype: Any, shardings: dict[Place, jax.sharding.Sharding]
) -> PyTree[Array]:
    """The parameter tree of an HF folder, leaf after leaf: each device reads rows of it, which are then moved
    to the sharding in `shardings`.

    So all processes together read every byte about once, and the memory needed beside the parameters is one
    leaf's share. With dtype None, every tensor keeps its dtype. Raises BadInput, on all processes, as
    `open_hf_tensors` does, and if the dtypes of layers differ within a leaf.
    """
    with agreed():
        stored = open_hf_tensors(folder, config, compare_copy=jax.process_index() == 0)
    params = {}
    with ThreadPoolExecutor(_READERS) as readers:
        for place, shape in Work(
            "reading the model", leaf_shapes(config).items(), unit="leaves", shown=jax.process_index() == 0
        ):
            steps = reading_steps(shardings[place], shape, is_stacked(place))
            with agreed():
                read = _read_leaf(stored, place, shape, config.num_hidden_layers, dtype, steps[0], readers)
            params[place] = jax.block_until_ready(moved(read, steps))
    # The bytes read by each process matter only if there are several.
    level = logging.INFO if jax.process_count() > 1 else logging.DEBUG
    log.log(
        level,
        "%s: process %d of %d read %d bytes",
        folder,
        jax.process_index(),
        jax.process_count(),
        stored.bytes_read,
    )
    return traverse_util.unflatten_dict(params)


def _read_leaf(
    stored: StoredTensors,
    place: Place,
    shape: Shape,
    layers: int,
    dtype: Any,
    sharding: jax.sharding.Sharding,
    readers: ThreadPoolExecutor,
) -> Array:
    """A leaf, read in this sharding; a part that several devices of this process have is read once."""
    # One leaf is one array of one type, so all its layers must agree.
    names = tensor_names(place, layers)
    types = sorted({str(stored.dtype(name)) for name in names})
    if dtype is None and len(types) > 1:
        raise BadInput(
            f"{stored.folder}: the layers of {'/'.join(place)} have different types ({', '.join(types)}); "
            "make them one type"
        )
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        if str(index) not in parts:
            # The index of a stacked leaf begins with the layers; a tensor has the other axes.
            of_tensor, chosen = (index[1:], names[index[0]]) if is_stacked(place) else (index, names)
            # Files are read by rows, so the other axes are cut after reading.
            start, stop, _ = of_tensor[0].indices(stored.shape(names[0])[0])
            tensor_shape = stored.shape(names[0])
            sizes = [
                len(range(*part.indices(size))) for part, size in zip(of_tensor, tensor_shape, strict=True)
            ]
            values = np.empty((len(chosen), *sizes), dtype or stored.dtype(names[0]))

            def read(number: int) -> None:
                values[number] = stored.read_rows(chosen[number], start, stop)[:, *of_tensor[1:]]

            # `list` waits for all, and raises the first error.
            list(readers.map(read, range(len(chosen))))
            parts[str(index)] = values if is_stacked(place) else values[0]
        return parts[str(index)]

    return jax.make_array_from_callback(shape, sharding, part)


def save_hf_params(
    folder: Path, config: ModelConfig, params: PyTree[Array], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the safetensors files of a parameter tree with the shapes of `config`.

    With several processes, each writes whole layers, and tensors outside them, of about equal size. Tensors
    are gathered on the devices of every process one after the other. The process that a tensor belongs to
    copies it to the host and writes it while the next tensors are gathered. The memory needed is a tensor's
    share on a device, and a layer on the host. Raises BadInput, on all processes, if one cannot write.
    """
    leaves = traverse_util.flatten_dict(params)
    specs = {
        name: (shape, np.dtype(leaves[tensor_place(name)[0]].dtype))
        for name, shape in tensor_shapes(config).items()
    }
    owners = _owners(specs)
    with agreed(), explain_os_errors(folder):
        files = TensorFiles(folder, specs, shard_bytes, owners, jax.process_index())
    with agreed(), explain_os_errors(folder), ThreadPoolExecutor(1) as writer:
        # Errors of writing are raised after the loop, so that a process that cannot write still takes part
        # in the gathering.
        writing: list[Future[None]] = []
        before: int | None = None
        for name in Work("writing the model", specs, unit="tensors", shown=jax.process_index() == 0):
            place, layer = tensor_place(name)
            values = jax.block_until_ready(gathered(leaves[place], layer))
            if owners[name] == jax.process_index():
                # At most one layer waits on the host: the layer before must be written first.
                if layer is None or layer != before:
                    wait(writing)
                before = layer
                writing.append(writer.submit(files.write, name, 0, host_values(values)))
        for written in writing:
            written.result()
        files.sync()
    with agreed(), explain_os_errors(folder):
        if jax.process_index() == 0:
            files.close(shared=not is_in_parts(folder))


def _owners(specs: Specs) -> dict[str, int]:
    """The process that writes each tensor; all tensors of a layer have the same one."""
    # A unit is a layer, or a tensor outside the layers.
    units: dict[str, list[str]] = {}
    for name in specs:
        layer = tensor_place(name)[1]
        units.setdefault(name if layer is None else str(layer), []).append(name)

    sizes = {}
    for unit, names in units.items():
        sizes[unit] = sum(math.prod(specs[name][0]) * specs[name][1].itemsize for name in names)
    owners: dict[str, int] = {}
    for unit, process in shared_out(sizes).items():
        owners |= dict.fromkeys(units[unit], process)
    return owners
