"""Run by test_processes.py as one of several JAX processes: loads, saves and fails, and prints what it saw as
JSON.
"""

import errno
import json
import logging
import sys
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file

from babel_jax.errors import BadInput
from babel_jax.model.shapes import is_stacked
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.names import tensor_names
from babel_jax.model_folders.params import load_params, save_folder
from babel_jax.model_folders.safetensors_files import StoredTensors, TensorFiles
from babel_jax.training.mesh import make_mesh, param_shardings, replicated

MESHES = {
    "embed": {"fsdp": 8},
    "tensor": {"tensor": 2, "fsdp": 4},
    "copies": {"data": 2, "fsdp": 2, "tensor": 2},
}


class BytesRead(logging.Handler):
    """Keeps what `load_params` logs of the bytes that this process read."""

    last = 0

    def emit(self, record):
        if "bytes" in record.msg:
            self.last = record.args[-1]


def check_bits(params, source):
    """Every part of every leaf that is here has the bits of the files, read by another library."""
    tensors = {
        name: value for file in Path(source).glob("*.safetensors") for name, value in load_file(file).items()
    }
    layers = open_folder(source).config.num_hidden_layers
    for place, leaf in traverse_util.flatten_dict(params).items():
        values = [tensors[name] for name in tensor_names(place, layers)]
        expected = np.stack(values) if is_stacked(place) else values[0]
        assert leaf.shape == expected.shape, place
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes(), (place, shard.index)


def message(function):
    try:
        function()
    except BadInput as error:
        return str(error)
    return None


def main(source: Path, odd: Path, out: Path) -> dict:
    counted = BytesRead()
    logging.getLogger("babel").setLevel(logging.INFO)
    logging.getLogger("babel").addHandler(counted)
    seen: dict = {"bytes": {}, "odd": {}}
    fails = jax.process_index() == 1

    for path, meshes, bytes_read in (
        (source, MESHES, seen["bytes"]),
        (odd, {"embed": MESHES["embed"]}, seen["odd"]),
    ):
        folder = open_folder(path)
        for name, sizes in meshes.items():
            mesh = make_mesh(sizes)
            shardings = param_shardings(folder.config, mesh)
            params = load_params(folder, shardings=shardings)
            check_bits(params, path)
            assert jax.tree.all(jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted, params, shardings))
            bytes_read[name] = counted.last
    folder = open_folder(source)
    everywhere = load_params(folder, shardings=replicated(make_mesh(MESHES["embed"])))
    check_bits(everywhere, source)
    seen["bytes"]["replicated"] = counted.last
    mesh = make_mesh(MESHES["tensor"])
    shardings = param_shardings(folder.config, mesh)
    cast = load_params(folder, dtype=np.float32, shardings=shardings)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype(np.float32)}

    params = load_params(open_folder(source.absolute().as_uri()), shardings=shardings)
    check_bits(params, source)
    seen["remote"] = counted.last

    write, names = TensorFiles.write, []
    TensorFiles.write = lambda self, name, start, values: (
        names.append(name),
        write(self, name, start, values),
    )
    save_folder(out / "tensor", Format.HF, params, folder.hf_config, folder.path, shard_bytes=3000)
    seen["written"] = list(names)
    save_folder(out / "replicated", Format.HF, everywhere, folder.hf_config)
    save_folder(out / "orbax", Format.ORBAX, params, folder.hf_config, folder.path)
    check_bits(load_params(open_folder(out / "orbax"), shardings=shardings), source)

    seen["exists"] = message(lambda: save_folder(out / "tensor", Format.HF, params, folder.hf_config))

    def full(self, name, start, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails:
        TensorFiles.write = full
    seen["full"] = message(lambda: save_folder(out / "full", Format.HF, params, folder.hf_config))

    def damaged(self, name, start, stop):
        raise BadInput("model.safetensors: damaged")

    if fails:
        StoredTensors.read_rows = damaged
    seen["damaged"] = message(lambda: load_params(folder, shardings=shardings))
    return seen


if __name__ == "__main__":
    process, count, port, *paths = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
    print("SEEN " + json.dumps(main(*map(Path, paths))))
