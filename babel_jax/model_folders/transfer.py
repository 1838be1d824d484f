"""From model folder to model folder in pieces: conversion and expansion, under a memory limit, resumable."""

import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from babel_jax import __version__
from babel_jax.config import ModelConfig
from babel_jax.digests import EarlySums, files_below, write_sums
from babel_jax.errors import BadInput
from babel_jax.files import write_bytes, write_text
from babel_jax.model.shapes import Place, leaf_shapes
from babel_jax.model_files import CONFIG
from babel_jax.model_folders.folder import Format, ModelFolder, copy_other_files, open_folder
from babel_jax.model_folders.hf_config import in_both_spellings, read_hf_config
from babel_jax.model_folders.hf_tensors import open_hf_tensors
from babel_jax.model_folders.layout import tensor_shapes
from babel_jax.model_folders.names import tensor_place
from babel_jax.model_folders.safetensors_files import SHARD_BYTES, Specs, StoredTensors, TensorFiles
from babel_jax.model_folders.streaming import (
    Piece,
    TensorSink,
    TensorSource,
    check_unchanged,
    digests,
    files_now,
    fingerprint,
    rows_of_piece,
    stream,
    workers_within,
)
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.model_folders.transformers_check import loaded_by_transformers
from babel_jax.new_folders import MARK, Progress, Unverified, check_free, resumable_folder
from babel_jax.places import place

MEMORY_LIMIT = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Change:
    """The change of tensors from one folder to another.

    `copied(name)` is True if the tensor has the bytes of the source tensor `source_of(name)`. For any other
    tensor, `values(piece, source)` returns a piece of the new model; it may read the old model. `description`
    identifies the change: a partly written folder is resumed only if its description is the same.
    """

    description: str
    source_of: Callable[[str], str]
    copied: Callable[[str], bool]
    values: Callable[[Piece, TensorSource], np.ndarray]


# The same tensors: a conversion.
SAME = Change("same", lambda name: name, lambda _: True, lambda piece, source: source.read_rows(*piece))


def transfer(
    source: ModelFolder,
    destination: Path | str,
    to: Format,
    hf_config: dict[str, Any],
    change: Change = SAME,
    *,
    memory_limit: int = MEMORY_LIMIT,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
    share: bool = True,
    hard_links: bool = False,
    texts: Mapping[str, str | bytes] = MappingProxyType({}),
) -> dict[str, Any]:
    """Applies `change` to `source` and writes the result, piece by piece. Returns what `summary` returns.

    share: safetensors files whose tensors are all unchanged are cloned from the source, if the disk can.
    hard_links: if it cannot, these files are hard links. A program that changes one in place then changes the
    source's too. texts: files by name that replace the source's.

    verify: reads everything back before the folder gets its name. Compares the sha256 of each tensor. Lets
    transformers build the model of config.json. After a difference, the next call writes again all tensors of
    each file that has a wrong one. After a stop or a kill, the same call resumes.

    Raises BadInput if the source is damaged or changes meanwhile, if the destination exists, or if the memory
    is too small for one piece; OSError if the disk is full.
    """
    start = time.monotonic()
    path = _free_place(source, destination)
    workers_within(memory_limit)
    config = read_hf_config(hf_config, str(path / CONFIG))
    hf_config = in_both_spellings(hf_config, str(path / CONFIG))
    check_vocabulary(source.path, source.config.vocab_size)
    # The state of the source's files now. It is compared with the state at the end.
    before = files_now(source.path)
    stored = _stored(source)
    tensors = _new_tensors(source.path, stored, config, to, change, shard_bytes, share, hard_links)
    mark = tensors.mark(before, hf_config, change.description)

    pieces = _Pieces(stored, change)
    with EarlySums() as sums, resumable_folder(path, mark) as (partial, progress):
        copy_other_files(source.path, partial)
        _write_texts(partial, {**texts, CONFIG: json.dumps(hf_config, indent=2) + "\n"})
        sink = tensors.sink(partial, progress, sums)
        move = functools.partial(pieces.move, sink=sink)
        # Checksums begin after the last piece: the processor is idle while the disk syncs.
        stream(tensors.specs, move, sink, progress, memory_limit, lambda: sums.begin(files_below(partial)))
        sink.close()
        written = ModelFolder(partial, to, config, hf_config)
        verified = {}
        if verify:
            digest = _verified(written, tensors.specs, pieces.read, memory_limit, sink, progress)
            loaded = loaded_by_transformers(partial, source.path, tensor_shapes(config))
            verified = {"verified": {**digest, "transformers": loaded}}
        check_unchanged(source.path, before)
        write_sums(partial, sum_of=sums.sum_of)
    return {**summary(dataclasses.replace(written, path=path), start), **verified}


def _free_place(source: ModelFolder, destination: Path | str) -> Path:
    """The place of the new folder. Raises BadInput if the place is taken, or lies inside the source."""
    path = place(destination)
    # A mark means that a process was killed, or is about to rename the folder. Such a folder is resumed.
    if not (path / MARK).is_file():
        check_free(path)
    if path.resolve().is_relative_to(source.path.resolve()):
        raise BadInput(f"{path}: inside of the folder that is read; give another place")
    return path


@dataclasses.dataclass(frozen=True)
class _NewTensors:
    """The tensors of the new folder, and how they are cut into files and pieces.

    whole_files: files of the source whose tensors are all unchanged, with the names of their tensors.
    """

    to: Format
    specs: Specs
    shard_bytes: int
    whole_files: dict[Path, list[str]]
    hard_links: bool

    def mark(self, source: Mapping[str, Any], hf_config: Mapping[str, Any], change: str) -> str:
        """Identifies the output: a folder that was begun with another mark is not resumed.

        source: its files. change: the description of the change.
        """
        # Written pieces are kept, so a resumed run must cut the tensors in the same way.
        whole_files = [file.name for file in self.whole_files]
        layout: dict[str, Any] = {"shard_bytes": self.shard_bytes, "whole_files": whole_files}
        if self.to is Format.ORBAX:
            layout["rows_of_pieces"] = [rows_of_piece(*spec) for spec in self.specs.values()]
        return fingerprint(
            version=__version__,
            source=source,
            config=hf_config,
            to=self.to,
            change=change,
            layout=layout,
        )

    def sink(self, folder: Path, progress: Progress, sums: EarlySums) -> TensorSink:
        """The sink of the pieces. Makes the whole files at once, before the first piece."""
        if self.to is Format.HF:
            files = TensorFiles(
                folder,
                self.specs,
                self.shard_bytes,
                whole_files=self.whole_files,
                hard_links=self.hard_links,
                written=sums.written,
            )
            progress.add(files.share(progress.done))
            return files
        # Imported here alone: it is an eighth of the time to start, and HF to HF does not need it.
        from babel_jax.model_folders.orbax_params import LeafFiles

        _check_room(folder, self.specs, progress.done)
        return LeafFiles(folder, self.specs, rows_of_piece)


def _new_tensors(
    path: Path,
    stored: TensorSource,
    config: ModelConfig,
    to: Format,
    change: Change,
    shard_bytes: int,
    share: bool,
    hard_links: bool,
) -> _NewTensors:
    """The tensors that `change` makes of those stored in the folder `path`. The new model has `config`."""
    # Each new tensor has the type of the tensor that it is made from.
    specs = {}
    for name, shape in tensor_shapes(config).items():
        specs[name] = (shape, stored.dtype(change.source_of(name)))
    if to is Format.ORBAX:
        _check_types(path, specs)
    whole_files: dict[Path, list[str]] = {}
    if share and to is Format.HF and isinstance(stored, StoredTensors):
        whole_files = stored.whole_files(lambda name: name in specs and _is_kept(name, change))
    return _NewTensors(to, specs, shard_bytes, whole_files, hard_links)


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """The pieces of the new tensors, made of the stored ones."""

    stored: TensorSource
    change: Change

    def read(self, piece: Piece) -> np.ndarray:
        """The values of a piece, as an array."""
        if self.change.copied(piece.name):
            return self.stored.read_rows(self.change.source_of(piece.name), piece.start, piece.stop)
        return self.change.values(piece, self.stored)

    def move(self, piece: Piece, sink: TensorSink) -> None:
        """Writes a piece: an unchanged one from file to file in small blocks, any other as an array."""
        is_copied = self.change.copied(piece.name)
        # Memory for arrays of whole pieces would double the time.
        if is_copied and isinstance(sink, TensorFiles) and isinstance(self.stored, StoredTensors):
            source = self.change.source_of(piece.name)
            blocks = self.stored.read_blocks(source, piece.start, piece.stop)
            sink.write_blocks(piece.name, piece.start, blocks)
        else:
            sink.write(piece.name, piece.start, self.read(piece))


def _write_texts(folder: Path, texts: Mapping[str, str | bytes]) -> None:
    for name, text in texts.items():
        if isinstance(text, bytes):
            write_bytes(folder / name, text)
        else:
            write_text(folder / name, text)


def convert(
    source: Path | str, destination: Path | str, to: Format | None = None, **options: Any
) -> dict[str, Any]:
    """Writes a model folder in the other format, or in the format `to`; every tensor is the same to the bit.

    options: those of `transfer`. Raises BadInput as `open_folder` and `transfer` do.
    """
    folder = open_folder(source)
    to = to or (Format.ORBAX if folder.format is Format.HF else Format.HF)
    return transfer(folder, destination, to, folder.hf_config, **options)


def summary(folder: ModelFolder, start: float) -> dict[str, Any]:
    """The figures that `--json` prints about a folder just written. `seconds` are since `start`;
    `peak_rss_bytes` is of the whole process.
    """
    shapes = leaf_shapes(folder.config)
    # The kernel counts kibibytes on Linux and bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "path": str(folder.path),
        "format": str(folder.format),
        "layers": folder.config.num_hidden_layers,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "bytes_written": sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file()),
        "seconds": time.monotonic() - start,
        "peak_rss_bytes": peak,
    }


def _is_kept(name: str, change: Change) -> bool:
    """True if the tensor is the source tensor of the same name."""
    return change.copied(name) and change.source_of(name) == name


def _check_room(folder: Path, specs: Specs, done: set[str]) -> None:
    """Raises OSError (ENOSPC) now if the output cannot fit, not hours later."""
    needed = 0
    for name, (shape, dtype) in specs.items():
        if name not in done:
            needed += math.prod(shape) * dtype.itemsize
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _stored(folder: ModelFolder) -> TensorSource:
    if folder.format is Format.HF:
        return open_hf_tensors(folder.path, folder.config)
    from babel_jax.model_folders.orbax_params import StoredLeaves

    return StoredLeaves(folder.path, folder.config)


def layers_differ_in_type(folder: ModelFolder) -> bool:
    """True if the layers of one leaf have different dtypes, which only a safetensors folder can hold."""
    stored = _stored(folder)
    dtypes = {name: stored.dtype(name) for name in tensor_shapes(folder.config)}
    return any(len(types) > 1 for types in _types(dtypes).values())


def _types(dtypes: Mapping[str, np.dtype]) -> dict[Place, set[str]]:
    """The dtypes of the tensors of each leaf."""
    types: dict[Place, set[str]] = {}
    for name, dtype in dtypes.items():
        types.setdefault(tensor_place(name)[0], set()).add(str(dtype))
    return types


def _check_types(path: Path, specs: Specs) -> None:
    for leaf, types in _types({name: dtype for name, (_, dtype) in specs.items()}).items():
        if len(types) > 1:
            raise BadInput(
                f"{path}: the layers of {'/'.join(leaf)} have different types ({', '.join(sorted(types))}); "
                "make them one type"
            )


def _verified(
    written: ModelFolder,
    specs: Specs,
    read: Callable[[Piece], np.ndarray],
    memory_limit: int,
    sink: TensorSink,
    progress: Progress,
) -> dict[str, Any]:
    """The number and a digest of all tensors, read back. Raises Unverified if a tensor differs, and marks all
    tensors of its file as not written.
    """
    # The values are computed a second time from the source, then read back from the new folder.
    expected = digests(specs, read, memory_limit)
    try:
        stored = _stored(written)
        actual = digests(specs, lambda piece: stored.read_rows(*piece), memory_limit)
    except BadInput as error:
        progress.forget(list(specs))
        raise Unverified(f"{error}; run the command again: it writes all anew") from error

    # The next call writes a file anew that has a wrong tensor; other files stay.
    wrong = [name for name in specs if actual[name] != expected[name]]
    if wrong:
        progress.forget(sink.together(wrong))
        raise Unverified(
            f"{written.path}: {len(wrong)} tensors read back differ from their source ({wrong[0]}); the "
            "disk or memory is faulty; run the command again: it writes these anew"
        )
    return {"tensors": len(actual), "sha256": hashlib.sha256("".join(actual.values()).encode()).hexdigest()}
