"""The header of a safetensors file: the name, type, shape and position of each tensor.

Format: https://huggingface.co/docs/safetensors. A little-endian u64 with the length of the header, a JSON
header, and the bytes of the tensors.
"""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from babel_jax.errors import BadInput, one_line
from babel_jax.files import open_regular, regular_file
from babel_jax.json_text import parse_json

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
FORMAT = "pt"  # transformers refuses files whose metadata does not name the framework's format
METADATA = "__metadata__"
MOST_HEADER_BYTES = 2**24  # 83 billion parameters in one file have a header of 0.2 MB


class StoredTensor(NamedTuple):
    """A tensor in a file: its type by the name that the file uses, its shape, and the offset and number of
    its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


class Header(NamedTuple):
    """The content of a file: its tensors by name, and True if transformers accepts the file.

    `path` has links resolved.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    has_format: bool


def read_header(file: Path, below: Path) -> Header:
    """The header of a file in the folder `below`.

    Raises BadInput for a file that is damaged or irregular, or has too large a header.
    """
    with explain_damage(file):
        with open_regular(file, below) as handle:
            prefix = handle.read(8)
            if len(prefix) < 8:
                raise OSError("it is shorter than a header")
            length: int = struct.unpack("<Q", prefix)[0]
            if length > MOST_HEADER_BYTES:
                raise OSError(f"a header of {length:,} bytes; at most {MOST_HEADER_BYTES:,} are read")
            data = handle.read(length)
        path = regular_file(file, below)
        # The format's own library checks offsets and sizes.
        with safe_open(path, framework="numpy") as opened:
            has_format = (opened.metadata() or {}).get("format") == FORMAT
    entries = parse_json(data, f"{file}: header")
    tensors = {}
    for name, entry in entries.items():
        if name != METADATA:
            # Offsets in the header count from its end.
            begin, end = entry["data_offsets"]
            tensors[name] = StoredTensor(
                entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin
            )
    return Header(path, tensors, has_format)


@contextlib.contextmanager
def explain_damage(file: Path) -> Iterator[None]:
    """Turns errors of reading a safetensors file into BadInput that names it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"{file}: truncated or damaged, or not a safetensors file ({one_line(error, 300)}); fetch it "
            "again"
        ) from error
