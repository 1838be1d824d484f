"""The tensors of a Hugging Face folder, opened and checked against its config."""

from pathlib import Path

from babel_jax.config import ModelConfig
from babel_jax.errors import BadInput
from babel_jax.model.shapes import EMBEDDING, HEAD
from babel_jax.model_folders.layout import check_shapes, tensor_shapes
from babel_jax.model_folders.names import tensor_name
from babel_jax.model_folders.safetensors_files import StoredTensors
from babel_jax.model_folders.streaming import pieces

_EMBEDDING, _OUTPUT = tensor_name(EMBEDDING, None), tensor_name(HEAD, None)


def open_hf_tensors(folder: Path, config: ModelConfig, compare_copy: bool = True) -> StoredTensors:
    """The folder's tensors, checked against the config. Raises BadInput for missing, unexpected and misshapen
    tensors.

    Two kinds of tensors that old files have are ignored: buffers of rotary frequencies, and in a tied model a
    second copy of the embedding under the name of the output layer. compare_copy: read both copies and check
    that they are equal.
    """
    stored = StoredTensors(folder)
    shapes = {name: stored.shape(name) for name in stored.file_of if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and _OUTPUT in shapes and _EMBEDDING in shapes:
        if compare_copy and not _equal(stored, _OUTPUT, _EMBEDDING):
            raise BadInput(
                f"{folder}: config.json ties the embeddings (tie_word_embeddings), and {_OUTPUT} differs "
                f"from {_EMBEDDING}; set tie_word_embeddings to false or remove the tensor"
            )
        del shapes[_OUTPUT]
    check_shapes(shapes, tensor_shapes(config), folder, stored.file_of.__getitem__)
    return stored


def _equal(stored: StoredTensors, left: str, right: str) -> bool:
    shape, dtype = stored.shape(left), stored.dtype(left)
    if (shape, dtype) != (stored.shape(right), stored.dtype(right)):
        return False
    # In pieces, so that neither copy is whole in memory.
    for _, start, stop in pieces(left, shape, dtype):
        left_rows, right_rows = stored.read_rows(left, start, stop), stored.read_rows(right, start, stop)
        if left_rows.tobytes() != right_rows.tobytes():
            return False
    return True
