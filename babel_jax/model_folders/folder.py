"""Model folders, which every command reads and writes: config.json and tokenizer files beside the parameters
in one of two formats.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Array, PyTree

from babel_jax import __version__
from babel_jax.buckets import is_url
from babel_jax.config import ModelConfig
from babel_jax.digests import is_list, write_sums
from babel_jax.distributed.agreement import agreed, new_folder_of_all, write_sums_of_all
from babel_jax.errors import BadInput
from babel_jax.files import read_bytes, read_json, write_bytes, write_text
from babel_jax.model.parameters import Place
from babel_jax.model_folders.hf_config import in_both_spellings, read_hf_config
from babel_jax.model_folders.hf_params import load_hf_params, open_hf_tensors, save_hf_params
from babel_jax.model_folders.layout import (
    FOLDERS_BESIDE,
    MOST_BESIDE_BYTES,
    WEIGHT_SUFFIXES,
    check_shapes,
    leaf_shapes,
    tensor_shapes,
)
from babel_jax.model_folders.names import tensor_place
from babel_jax.model_folders.object_storage import stand_in
from babel_jax.model_folders.orbax_params import (
    PARAMS,
    LeafFiles,
    StoredLeaves,
    load_orbax_params,
    save_orbax_params,
)
from babel_jax.model_folders.safetensors_files import SHARD_BYTES, Specs, StoredTensors, TensorFiles
from babel_jax.model_folders.streaming import (
    Piece,
    Sink,
    Source,
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
from babel_jax.places import place, url_of

CONFIG = "config.json"
MOST_CONFIG_BYTES = 2**22  # with the plans of many expansions it stays below 1 MB
MEMORY_LIMIT = 4 * 2**30


class Format(StrEnum):
    """The format of a model folder: safetensors in Hugging Face's layout, or an Orbax checkpoint under
    params/.
    """

    HF = "hf"
    ORBAX = "orbax"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder whose config.json has been read. `hf_config` is that file unchanged, with keys that
    `config` does not have.
    """

    path: Path
    format: Format
    config: ModelConfig
    hf_config: dict[str, Any]


def open_folder(path: Path | str) -> ModelFolder:
    """Reads config.json and finds the format from the files; parameters are not read.

    A folder may be in a bucket, named by its URL (gs://bucket/name); `path` is then a local folder that
    stands in for it. Raises BadInput for a folder that is no model folder of a supported architecture.
    """
    url = str(path) if is_url(path) else url_of(Path(path))
    path = stand_in(url) if url is not None else Path(path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError:  # the name is impossible on this file system
        is_folder, exists = False, False
    if not exists:
        raise BadInput(f"{path}: no such model folder")
    if not is_folder:
        raise BadInput(f"{path}: a file; a model folder is needed")
    try:
        hf_config = read_json(path / CONFIG, path, MOST_CONFIG_BYTES)
    except FileNotFoundError:
        # A run folder is a likely mistake: it has a model folder in hf/.
        run = "; it is a run folder: its model is in hf/, and [[deepen]] in its settings deepens it midway"
        raise BadInput(
            f"{path}: no {CONFIG}, so this is not a model "
            f"folder{run if (path / 'config.toml').is_file() else ''}"
        ) from None
    if not isinstance(hf_config, dict):
        raise BadInput(f"{path / CONFIG}: not a JSON object")
    config = read_hf_config(hf_config, str(path / CONFIG))
    return ModelFolder(path, _format(path), config, hf_config)


def load_params(
    folder: ModelFolder,
    dtype: Any = None,
    shardings: PyTree[jax.sharding.Sharding] | jax.sharding.Sharding | None = None,
) -> PyTree[Array]:
    """The parameter tree (layers stacked) as jax arrays.

    dtype: None keeps each tensor's dtype. shardings: one for all leaves, a tree of them like the parameters,
    or None for the default device. Of several processes, each reads its share of an HF folder, so that
    together they read it once. Raises BadInput, on all processes, for damaged, missing, unexpected or
    misshapen tensors.
    """
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        by_place = dict.fromkeys(leaf_shapes(folder.config), shardings)
    else:
        by_place = traverse_util.flatten_dict(shardings)
    load = load_hf_params if folder.format is Format.HF else load_orbax_params
    return load(folder.path, folder.config, dtype, by_place)


def save_folder(
    path: Path | str,
    format: Format,
    params: PyTree[Array],
    hf_config: dict[str, Any],
    copy_files_from: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> ModelFolder:
    """Writes a model folder; a failure leaves no half-written folder. It has the parameters in their dtypes,
    `hf_config` as config.json (in the forms of transformers 4 and 5), and further files.

    copy_files_from: a folder whose other files (tokenizer, generation settings, licence, ...) are copied.
    texts: further files by name, which replace copied ones. The `dtype` in `hf_config` is written unchanged:
    `write_hf_config` sets it. Several processes must all call this, with the same arguments and a path on a
    disk that they share; each writes its own files. Raises BadInput, on all of them, if the folder exists,
    the disk is full, or `params` is not the model of `hf_config`.
    """
    path = place(path)
    config = read_hf_config(hf_config, str(path / CONFIG))
    leaves = traverse_util.flatten_dict(params)
    shapes = {"/".join(place): tuple(leaf.shape) for place, leaf in leaves.items()}
    expected = {"/".join(place): shape for place, shape in leaf_shapes(config).items()}
    check_shapes(shapes, expected, path, lambda _: path)
    hf_config = in_both_spellings(hf_config, str(path / CONFIG))
    if format is Format.ORBAX and jax.process_count() > 1 and url_of(path) is not None:
        raise BadInput(
            f"{path}: several processes cannot write an Orbax folder into a bucket; write an HF folder, and "
            "convert it"
        )

    # Config and other files come from process 0; every process writes its part of the parameters.
    with new_folder_of_all(path) as partial:
        with agreed():
            if jax.process_index() == 0:
                if copy_files_from is not None:
                    copy_other_files(copy_files_from, partial)
                for name, text in {**texts, CONFIG: json.dumps(hf_config, indent=2) + "\n"}.items():
                    write_text(partial / name, text)
        if format is Format.HF:
            save_hf_params(partial, config, params, shard_bytes)
        else:
            save_orbax_params(partial, params)
        write_sums_of_all(partial)
    return ModelFolder(path, format, config, hf_config)


@dataclasses.dataclass(frozen=True)
class Change:
    """The change of tensors from one folder to another. `values(piece, source)` returns a piece of the new
    model; it may read the old model.

    `kept(name)` is True if the tensor is copied unchanged from the source tensor of the same name.
    `description` identifies `values`: a folder that was begun is resumed only if it is equal.
    """

    description: str
    source_of: Callable[[str], str]
    kept: Callable[[str], bool]
    values: Callable[[Piece, Source], np.ndarray]


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
    texts: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Writes the model folder that `change` makes of `source`, in pieces; returns the figures of `summary`.

    share: safetensors files whose tensors are all unchanged are cloned from the source, if the disk can.
    hard_links: if it cannot, they become one file with the source's, so that a program that writes in place
    changes both. texts: files by name that replace the source's.

    After a stop or a kill, the same call resumes. verify: read everything back, compare the sha256 of every
    tensor with the expected one before the folder gets its name, and ask transformers for its model of
    config.json; tensors that differ are written again by the next call. Raises BadInput if the source is
    damaged or changes meanwhile, the destination exists, the disk is full, or the memory is too small for one
    piece.
    """
    start = time.monotonic()
    path = place(destination)
    if not (
        path / MARK
    ).is_file():  # of a process that was killed, or just now gives the folder its name: see below
        check_free(path)
    if path.resolve().is_relative_to(source.path.resolve()):
        raise BadInput(f"{path}: inside of the folder that is read; give another place")
    workers_within(memory_limit)
    config = read_hf_config(hf_config, str(path / CONFIG))
    hf_config = in_both_spellings(hf_config, str(path / CONFIG))
    check_vocabulary(source.path, source.config.vocab_size)

    before = files_now(source.path)
    stored = _stored(source)
    specs = {
        name: (shape, stored.dtype(change.source_of(name))) for name, shape in tensor_shapes(config).items()
    }
    if to is Format.ORBAX:
        _check_types(source.path, specs)

    # The mark identifies the output: a folder that was begun with another mark is not resumed.
    whole_files = {}
    if share and to is Format.HF and isinstance(stored, StoredTensors):
        whole_files = stored.whole_files(lambda name: name in specs and change.kept(name))
    layout = {"shard_bytes": shard_bytes, "whole_files": [file.name for file in whole_files]}
    if to is Format.ORBAX:
        layout["rows_of_pieces"] = [rows_of_piece(*spec) for spec in specs.values()]
    mark = fingerprint(
        version=__version__, source=before, config=hf_config, to=to, change=change.description, layout=layout
    )

    def read(piece: Piece) -> np.ndarray:
        return change.values(piece, stored)

    with resumable_folder(path, mark) as (partial, progress):
        copy_other_files(source.path, partial)
        for name, text in {**texts, CONFIG: json.dumps(hf_config, indent=2) + "\n"}.items():
            write_text(partial / name, text)
        sink: Sink
        if to is Format.HF:
            sink = files = TensorFiles(
                partial, specs, shard_bytes, whole_files=whole_files, hard_links=hard_links
            )
            progress.add(files.share(progress.done))
        else:
            _check_room(partial, specs, progress.done)
            sink = LeafFiles(partial, specs, rows_of_piece)
        stream(specs, read, sink, progress, memory_limit)
        sink.close()
        written = ModelFolder(partial, to, config, hf_config)
        verified = {}
        if verify:
            digest = _verified(written, specs, read, memory_limit, sink, progress)
            loaded = loaded_by_transformers(partial, source.path, tensor_shapes(config))
            verified = {"verified": {**digest, "transformers": loaded}}
        check_unchanged(source.path, before)
        write_sums(partial)
    return {**summary(dataclasses.replace(written, path=path), start), **verified}


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
    """The figures that `--json` prints about a folder just written. `seconds` count from `start`;
    `peak_rss_bytes` is of the process.
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


def copy_other_files(source: Path, destination: Path) -> None:
    """Copies the files beside the parameters and config.json of a model folder: tokenizer, generation
    settings, licence, cards.

    Raises BadInput for a link that leads out of the folder, an irregular file, and a file of more than
    MOST_BESIDE_BYTES.
    """
    for file in sorted(source.iterdir()):
        is_parameters = file.name in (CONFIG, PARAMS, MARK) or file.name.endswith(WEIGHT_SUFFIXES)
        if is_parameters or file.name.startswith(".") or is_list(file):
            continue
        if not file.is_dir():
            write_bytes(destination / file.name, read_bytes(file, source, MOST_BESIDE_BYTES))
        elif file.name in FOLDERS_BESIDE:
            (destination / file.name).mkdir(exist_ok=True)
            for below in sorted(file.iterdir()):
                write_bytes(
                    destination / file.name / below.name, read_bytes(below, source, MOST_BESIDE_BYTES)
                )


def _check_room(folder: Path, specs: Specs, done: set[str]) -> None:
    """Raises the error of a full disk now if the output cannot fit, instead of hours later."""
    needed = sum(
        math.prod(shape) * dtype.itemsize for name, (shape, dtype) in specs.items() if name not in done
    )
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _stored(folder: ModelFolder) -> Source:
    if folder.format is Format.HF:
        return open_hf_tensors(folder.path, folder.config)
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
    sink: Sink,
    progress: Progress,
) -> dict[str, Any]:
    """The number and a digest of all tensors, read back. Raises Unverified if a tensor differs; it then
    counts as not written.
    """
    expected = digests(specs, read, memory_limit)
    try:
        stored = _stored(written)
        actual = digests(specs, lambda piece: stored.read_rows(*piece), memory_limit)
    except BadInput as error:
        progress.forget(list(specs))
        raise Unverified(f"{error}; run the command again: it writes all anew") from error

    # A tensor that differs is written anew by the next call; the other tensors stay.
    wrong = [name for name in specs if actual[name] != expected[name]]
    if wrong:
        progress.forget(sink.together(wrong))
        raise Unverified(
            f"{written.path}: {len(wrong)} tensors read back differ from their source ({wrong[0]}); the "
            "disk or memory is faulty; run the command again: it writes these anew"
        )
    return {"tensors": len(actual), "sha256": hashlib.sha256("".join(actual.values()).encode()).hexdigest()}


def _format(path: Path) -> Format:
    orbax = (path / PARAMS).is_dir()
    hf = any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))
    if orbax and hf:
        raise BadInput(
            f"{path}: holds both safetensors files and {PARAMS}/; remove the one that does not count"
        )
    if not orbax and not hf:
        raise BadInput(
            f"{path}: holds neither safetensors files nor an Orbax {PARAMS}/; other weight formats must be "
            "converted first"
        )
    return Format.ORBAX if orbax else Format.HF
