"""The parameter tree in Hugging Face's safetensors files, bit for bit in both directions."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Array, PyTree
from tqdm import tqdm

from babel_jax.checkpoints.layout import check_shapes, leaf_shapes, tensor_shapes
from babel_jax.checkpoints.names import Place, is_stacked, tensor_names, tensor_place
from babel_jax.checkpoints.safetensors_files import SHARD_BYTES, StoredTensors, TensorFiles
from babel_jax.checkpoints.streaming import pieces
from babel_jax.config import ModelConfig
from babel_jax.errors import BadInput

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def open_hf_tensors(folder: Path, config: ModelConfig) -> StoredTensors:
    """The folder's tensors, checked against the config. Raises BadInput for missing, unexpected and misshapen ones.

    Two things that old files hold beside the parameters are passed over: buffers of rotary frequencies, and in a tied model a second copy
    of the embedding under the name of the output layer.
    """
    stored = StoredTensors(folder)
    found = {name: stored.shape(name) for name in stored.file_of if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and _OUTPUT in found and _EMBEDDING in found:
        if not _equal(stored, _OUTPUT, _EMBEDDING):
            raise BadInput(
                f"{folder}: config.json ties the embeddings (tie_word_embeddings), and {_OUTPUT} differs from {_EMBEDDING}; "
                "set tie_word_embeddings to false or remove the tensor"
            )
        del found[_OUTPUT]
    check_shapes(found, tensor_shapes(config), folder, stored.file_of.__getitem__)
    return stored


def _equal(stored: StoredTensors, one: str, other: str) -> bool:
    shape, dtype = stored.shape(one), stored.dtype(one)
    if (shape, dtype) != (stored.shape(other), stored.dtype(other)):
        return False
    return all(
        stored.read_rows(one, start, stop).tobytes() == stored.read_rows(other, start, stop).tobytes()
        for _, start, stop in pieces(one, shape, dtype)
    )


def load_hf_params(folder: Path, config: ModelConfig, dtype: Any, shardings: dict[Place, jax.sharding.Sharding]) -> PyTree[Array]:
    """The parameter tree of an HF folder; each device is given its part of a leaf, read from the files when it is needed.

    `dtype` None keeps every tensor's own type. Raises BadInput as `open_hf_tensors` does, and where the layers' types differ within a leaf.
    """
    stored = open_hf_tensors(folder, config)

    def load(place: Place, shape: tuple[int, ...]) -> Array:
        names = tensor_names(place, config.num_hidden_layers)
        own = sorted({str(stored.dtype(name)) for name in names})
        if dtype is None and len(own) > 1:
            raise BadInput(f"{folder}: the layers of {'/'.join(place)} have different types ({', '.join(own)}); make them one type")

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            if is_stacked(place):
                values = np.stack([stored.read(name, index[1:]) for name in names[index[0]]])
            else:
                values = stored.read(names[0], index)
            return values if dtype is None else values.astype(dtype)

        return jax.make_array_from_callback(shape, shardings[place], part)

    return traverse_util.unflatten_dict({place: load(place, shape) for place, shape in leaf_shapes(config).items()})


def save_hf_params(folder: Path, config: ModelConfig, params: PyTree[Array], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the safetensors files of a parameter tree that has the shapes of `config`."""
    leaves = traverse_util.flatten_dict(params)
    specs = {name: (shape, np.dtype(leaves[tensor_place(name)[0]].dtype)) for name, shape in tensor_shapes(config).items()}
    files = TensorFiles(folder, specs, shard_bytes)
    for name in tqdm(specs, "write tensors", unit=" tensors", leave=False, disable=None):
        place, layer = tensor_place(name)
        files.write(name, 0, np.asarray(leaves[place] if layer is None else leaves[place][layer]))
    files.close()
