"""Windows on disk: one TFDS dataset (ArrayRecord) for each language and kind, written and read without
TensorFlow.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import example_serializer

from babel_jax.digests import SUMS, check_sums, is_list
from babel_jax.errors import BadInput
from babel_jax.places import pull

DATASET = "windows"
VERSION = "1.0.0"
SPLIT = "train"
FIELDS = ("tokens", "segment_ids")
MASKED_FIELDS = (*FIELDS, "loss_mask")


class _LocalInfo(tfds.core.DatasetInfo):  # type: ignore[misc]
    """Information of a dataset that exists on this machine alone.

    TFDS looks into its bucket for every new dataset, and leaves a temporary folder each time.
    """

    def initialize_from_bucket(self) -> None:
        """Does nothing: the bucket of TFDS has none of our datasets."""


class _WindowsBuilder(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder,  # type: ignore[misc]
    skip_registration=True,
):
    """Writes windows in the order in which they arrive."""

    name = DATASET
    VERSION = tfds.core.Version(VERSION)
    # Nothing is downloaded. Without this line TFDS looks for checksums beside this module, and that takes a
    # package which TFDS does not require.
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        windows: Iterable[tuple[np.ndarray, ...]],
        seq_len: int,
        fields: tuple[str, ...],
        **settings: Any,
    ):
        self._windows, self._seq_len, self._fields = windows, seq_len, fields
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        def ids() -> tfds.features.Tensor:
            return tfds.features.Tensor(shape=(self._seq_len,), dtype=np.uint32, encoding="bytes")

        features = tfds.features.FeaturesDict({field: ids() for field in self._fields})
        return _LocalInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for number, window in enumerate(self._windows):
            yield number, dict(zip(self._fields, window, strict=True))


def write_windows(
    folder: Path,
    name: str,
    windows: Iterable[tuple[np.ndarray, ...]],
    seq_len: int,
    fields: tuple[str, ...] = FIELDS,
) -> None:
    """Writes version 1.0.0 of the TFDS dataset `windows/NAME` into `folder`, whose final path is
    `DATA_DIR/windows/NAME`.

    There `tfds.data_source("windows/NAME", split="train", data_dir=DATA_DIR)` reads it. Each record has the
    keys `fields`: {"tokens": uint32[seq_len], "segment_ids": uint32[seq_len]}. Windows of conversations also
    have "loss_mask" uint32[seq_len], which is 1 where the loss counts the token.
    """
    build = folder / "build"
    with _quiet(), _same_bytes():
        builder = _WindowsBuilder(
            windows,
            seq_len,
            fields,
            config=tfds.core.BuilderConfig(name=name),
            data_dir=os.fspath(build),
            file_format="array_record",
        )
        builder.download_and_prepare()
    # TFDS makes folders of its own names; only the version folder is kept.
    (build / DATASET / name / VERSION).rename(folder / VERSION)
    shutil.rmtree(build)


def open_windows(folder: Path) -> Any:
    """The random-access data source (`len`, `[index]`, `__getitems__`) of a dataset that `write_windows`
    wrote.

    A dataset in a bucket is first copied to the scratch space as a whole. Raises BadInput where the copy
    differs from the digests.
    """
    # Files that were just copied from a bucket are compared with their digests: a copy may be damaged.
    if copied := pull(folder):
        lists = [path for path in folder.glob(f"{SUMS}*") if is_list(path)]
        checked = check_sums(lists, folder, lambda sizes: copied, stored=False)
        if checked.damaged:
            path, reason = next(iter(checked.damaged.items()))
            raise BadInput(f"{path}: {reason}; prepare the folder again")
    with _quiet():
        return tfds.builder_from_directory(os.fspath(folder / VERSION)).as_data_source(split=SPLIT)


@contextlib.contextmanager
def _same_bytes() -> Iterator[None]:
    """Makes TFDS write equal bytes for equal windows in every process.

    Without this, protobuf writes the features of an example in an order that differs from process to process.
    """

    def serialize(self: Any, example: Any) -> bytes:
        result: bytes = self.get_tf_example(example).SerializeToString(deterministic=True)
        return result

    serializer: Any = example_serializer.ExampleSerializer
    original = serializer.serialize_example
    serializer.serialize_example = serialize
    try:
        yield
    finally:
        serializer.serialize_example = original


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the banners, bars and warnings of TFDS off the terminal."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
