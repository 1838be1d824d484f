"""How tensors are cut for streaming, which is also how an Orbax folder stores them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from babel_jax.errors import BadInput
from babel_jax.model_folders import safetensors_files
from babel_jax.model_folders.safetensors_files import StoredTensors, TensorFiles
from babel_jax.model_folders.streaming import PIECE_BYTES, pieces, rows_of_piece


@given(
    rows=st.integers(1, 200_000),
    columns=st.lists(st.integers(1, 40_000), max_size=1),
    dtype=st.sampled_from([np.dtype(np.float32), np.dtype(np.float16)]),
)
def test_pieces_are_all_of_a_tensor_and_of_one_size(rows, columns, dtype):
    shape = (rows, *columns)
    cut = pieces("name", shape, dtype)
    assert [piece.start for piece in cut] == [0, *(piece.stop for piece in cut[:-1])]
    assert cut[-1].stop == rows
    chunk = rows_of_piece(shape, dtype)
    row_bytes = int(np.prod(columns)) * dtype.itemsize
    assert chunk == 1 or chunk * row_bytes <= PIECE_BYTES
    assert len(cut) * chunk < rows + len(cut), "a chunk is stored whole: the last one may not be mostly air"


def test_qwen2_7b_is_stored_with_next_to_no_air():
    for shape in ((18944, 3584), (3584, 18944), (152064, 3584), (3584, 3584), (512, 3584), (3584,)):
        chunk = rows_of_piece(shape, np.dtype(np.float16))
        assert len(pieces("name", shape, np.dtype(np.float16))) * chunk < 1.01 * shape[0]


def test_pieces_of_several_writes_are_on_disk_in_full(tmp_path):
    """A write of the system takes a MiB at most; these have three and one and a half."""
    values = np.arange(3 * 400_000, dtype=np.float32).reshape(3, -1)
    files = TensorFiles(tmp_path, {"large": (values.shape, values.dtype)})
    files.write("large", 1, values[1:])
    files.write("large", 0, values[:1])
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["large"], values)


def test_blocks_are_the_bytes_of_the_rows_and_a_file_that_ends_too_early_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "_READ_BYTES", 100)
    values = np.arange(7 * 30, dtype=np.float32).reshape(7, 30)
    save_file({"first": values, "last": values + 1}, tmp_path / "model.safetensors")
    stored = StoredTensors(tmp_path)
    for start, stop in ((0, 7), (2, 3), (6, 7)):
        blocks = [bytes(block) for block in stored.read_blocks("last", start, stop)]
        assert b"".join(blocks) == (values + 1)[start:stop].tobytes()
        assert max(map(len, blocks)) <= 100
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate((tmp_path / "model.safetensors").stat().st_size - 1)
    with pytest.raises(BadInput, match=r"model\.safetensors: .*it ends too early"):
        list(stored.read_blocks("last", 6, 7))
