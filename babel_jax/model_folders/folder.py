"""Model folders, which every command takes and gives: config.json and tokenizer files beside the parameters
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
    """Formats of a model folder: safetensors as Hugging Face lays them out, or an Orbax checkpoint under
    params/.
    """

    HF = "hf"
    ORBAX = "orbax"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder whose config.json has been read; `hf_config` is that file as it stands, with the keys
    that `config` does not know.
    """

    path: Path
    format: Format
    config: ModelConfig
    hf_config: dict[str, Any]


def open_folder(path: Path | str) -> ModelFolder:
    """Reads config.json and tells the format by the contents; parameters are not looked at.

    A folder may be in a bucket, named by its URL (gs://bucket/name): `path` is then a local folder that
    stands in for it. Raises BadInput for anything that is not a model folder of a supported architecture.
    """
    url = str(path) if is_url(path) else url_of(Path(path))
    path = stand_in(url) if url is not None else Path(path)
    try:
        found = path.is_dir(), path.exists()
    except OSError:  # a name that the system cannot hold
        found = False, False
    if found != (True, True):
        raise BadInput(
            f"{path}: no such model folder" if not found[1] else f"{path}: a file; a model folder is needed"
        )
    try:
        hf_config = read_json(path / CONFIG, path, MOST_CONFIG_BYTES)
    except FileNotFoundError:
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

    `dtype` None keeps each tensor's own type. `shardings` is one for all leaves, a tree of them like the
    parameters', or None for the default device. Of several processes each reads its share of an HF folder:
    together they read it once. Raises BadInput, on all processes, for damaged, missing, unexpected or
    misshapen tensors.
    """
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    one = isinstance(shardings, jax.sharding.Sharding)
    by_place = (
        dict.fromkeys(leaf_shapes(folder.config), shardings) if one else traverse_util.flatten_dict(shardings)
    )
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
    """Writes a model folder, whole or not at all: parameters in their own types, `hf_config` as config.json
    (in the spellings of transformers 4 and 5), and the files around them.

    `copy_files_from` is a folder whose other files (tokenizer, generation settings, licence, ...) come along;
    `texts` are more by name, and take the place of such files. The `dtype` in `hf_config` is written as it is
    given: `write_hf_config` sets it. Where there are several processes, all call this, with the same
    arguments and a path on a disk that they share; each writes files of its own. Raises BadInput, on all of
    them, when the folder exists, the disk is full, or `params` is not the model that `hf_config` describes.
    """
    path = place(path)
    config = read_hf_config(hf_config, str(path / CONFIG))
    found = {"/".join(place): tuple(leaf.shape) for place, leaf in traverse_util.flatten_dict(params).items()}
    expected = {"/".join(place): shape for place, shape in leaf_shapes(config).items()}
    check_shapes(found, expected, path, lambda _: path)
    hf_config = in_both_spellings(hf_config, str(path / CONFIG))
    if format is Format.ORBAX and jax.process_count() > 1 and url_of(path) is not None:
        raise BadInput(
            f"{path}: several processes cannot write an Orbax folder into a bucket; write an HF folder, and "
            "convert it"
        )
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
    """What becomes of the tensors between two folders. `values` gives a piece of the new model; it may read
    the old one's.

    `kept` says of which tensors of the new model are the old one's of the same name, as they are.
    `description` has all that `values` depends on: it tells whether a folder that was begun can be gone on
    with.
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
    """Writes the model folder that `change` makes of `source`, in pieces; gives the figures of `summary`.

    `share` lets safetensors files all of whose tensors stay as they are be clones of the source's, where the
    disk can; with `hard_links` they are else one file with the source's, so that a program which writes in
    place changes both. `texts` are files by name that take the place of the source's.

    Stopped or killed, the same call goes on where it was. `verify` reads all back and compares sha256 of
    every tensor with what it should be, before the folder gets its name, and asks transformers for its model
    of config.json; what does not read back is written again by the next call. Raises BadInput when the source
    is damaged or changes meanwhile, the destination exists, the disk is full, or the memory does not suffice
    for one piece.
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
            found = _verified(written, specs, read, memory_limit, sink, progress)
            asked = loaded_by_transformers(partial, source.path, tensor_shapes(config))
            verified = {"verified": {**found, "transformers": asked}}
        check_unchanged(source.path, before)
        write_sums(partial)
    return {**summary(dataclasses.replace(written, path=path), start), **verified}


def convert(
    source: Path | str, destination: Path | str, to: Format | None = None, **options: Any
) -> dict[str, Any]:
    """A model folder in the other format (or, where `to` says so, written anew in its own), every tensor the
    same to the bit.

    `options` are those of `transfer`. Raises BadInput as `open_folder` and `transfer` do.
    """
    folder = open_folder(source)
    to = to or (Format.ORBAX if folder.format is Format.HF else Format.HF)
    return transfer(folder, destination, to, folder.hf_config, **options)


def summary(folder: ModelFolder, start: float) -> dict[str, Any]:
    """What `--json` prints of a folder just written; `seconds` count from `start`, `peak_rss_bytes` is of the
    process.
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
    """Copies what stands beside the parameters and config.json in a model folder: tokenizer, generation
    settings, licence, cards.

    Raises BadInput for a link that leads out of the folder, for what is no regular file, and for a file of
    more than MOST_BESIDE_BYTES.
    """
    for file in sorted(source.iterdir()):
        if (
            file.name.startswith(".")
            or file.name in (CONFIG, PARAMS, MARK)
            or file.name.endswith(WEIGHT_SUFFIXES)
            or is_list(file)
        ):
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
    """Raises the error of a full disk where what is to be written cannot fit, and not hours later."""
    needed = sum(
        math.prod(shape) * dtype.itemsize for name, (shape, dtype) in specs.items() if name not in done
    )
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _stored(folder: ModelFolder) -> Source:
    return (
        open_hf_tensors(folder.path, folder.config)
        if folder.format is Format.HF
        else StoredLeaves(folder.path, folder.config)
    )


def layers_differ_in_type(folder: ModelFolder) -> bool:
    """Whether the layers of one leaf have different types, so that only a safetensors folder can hold them as
    they are.
    """
    stored = _stored(folder)
    return any(
        len(own) > 1
        for own in _types({name: stored.dtype(name) for name in tensor_shapes(folder.config)}).values()
    )


def _types(dtypes: Mapping[str, np.dtype]) -> dict[Place, set[str]]:
    types: dict[Place, set[str]] = {}
    for name, dtype in dtypes.items():
        types.setdefault(tensor_place(name)[0], set()).add(str(dtype))
    return types


def _check_types(path: Path, specs: Specs) -> None:
    for leaf, own in _types({name: dtype for name, (_, dtype) in specs.items()}).items():
        if len(own) > 1:
            raise BadInput(
                f"{path}: the layers of {'/'.join(leaf)} have different types ({', '.join(sorted(own))}); "
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
    """Reads all back. Raises Unverified where a tensor differs; it then counts as not written."""
    expected = digests(specs, read, memory_limit)
    try:
        stored = _stored(written)
        found = digests(specs, lambda piece: stored.read_rows(*piece), memory_limit)
    except BadInput as error:
        progress.forget(list(specs))
        raise Unverified(f"{error}; run the command again: it writes all anew") from error
    wrong = [name for name in specs if found[name] != expected[name]]
    if wrong:
        progress.forget(sink.together(wrong))
        raise Unverified(
            f"{written.path}: {len(wrong)} tensors read back differ from their source ({wrong[0]}); the "
            "disk or memory is faulty; "
            "run the command again: it writes these anew"
        )
    return {"tensors": len(found), "sha256": hashlib.sha256("".join(found.values()).encode()).hexdigest()}


def _format(path: Path) -> Format:
    orbax, hf = (
        (path / PARAMS).is_dir(),
        any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")),
    )
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
