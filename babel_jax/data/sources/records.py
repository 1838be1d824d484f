"""Records of files (JSON lines, text, Parquet, WARC), TFDS and Hugging Face datasets, streamed, each with its
location.
"""

import difflib
import glob
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babel_jax.config import Source
from babel_jax.data.sources.file_lists import is_list, listed_files
from babel_jax.data.sources.parquet import parquet_records
from babel_jax.data.sources.streams import (
    COMPRESSION,
    MAX_DOCUMENT_BYTES,
    BadRowError,
    Record,
    check_begun,
    decompressed,
    explained,
    imported,
    one_line,
    remote,
    too_long,
)
from babel_jax.data.sources.web_pages import page_records
from babel_jax.errors import BadInput
from babel_jax.hub.datasets import HubPath, dataset_commit, hub_path, kept_or_made, list_files, list_folders

_FORMATS = ".jsonl, .json, .txt, .warc and .wet (plain, .gz or .zst) and .parquet"
_READ_HERE = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TFDS_PART = 100_000
_BLOCK_BYTES = 1 << 18
_MAX_BLANK_LINES = 1 << 20
# Of a line that is skipped; a file with a longer one (such as 4 TB of holes) is no text.
_MAX_LINE_BYTES = 2**30


def source_files(source: Source) -> list[str]:
    """The files of a source's path or glob, sorted by name; or those of its list of files, in its order.

    Files of a data set on the hub are named with the commit. Raises BadInput if there is none.
    """
    assert source.path is not None
    if is_list(source.path):
        files = listed_files(source)
    elif "://" in source.path:
        files = _remote_files(source)
    else:
        # A name that exists is that file, also if it has brackets or stars in it.
        path = Path(source.path)
        if path.is_dir():
            raise BadInput(f"{path}: a folder; name its files, for example {path}/*.jsonl")
        files = [str(path)] if path.is_file() else []
        if not files and glob.has_magic(source.path):
            matches = glob.glob(source.path, recursive=True)  # noqa: PTH207 - may be absolute
            files = sorted(name for name in matches if Path(name).is_file())
    if not files:
        problem = "no file matches" if glob.has_magic(source.path) else "no such file"
        raise BadInput(f"{source.path}: {problem} (source of language {source.language})")
    return files


def dataset_version(source: Source) -> str:
    """The version of a TFDS dataset (its version and sizes), or of a Hugging Face dataset (commit or times of
    its files).
    """
    if source.tfds is not None:
        info = _tfds(source).dataset_info
        splits = {name: (split.num_examples, split.num_bytes) for name, split in sorted(info.splits.items())}
        return f"{info.full_name} {splits}"
    # The files' commits or times stand for their content, so no file is read.
    datasets = imported("datasets", source.label, "hf")
    with explained(source.label, lambda: "nothing"):
        builder = datasets.load_dataset_builder(
            source.huggingface, source.huggingface_config, revision=source.revision
        )
        files = builder.config.data_files or {}
        origins = {}
        for split, split_files in files.items():
            origins[str(split)] = list(map(list, split_files.origin_metadata))
        return json.dumps([str(builder.hash), origins], sort_keys=True)


def parts(source: Source) -> list[str]:
    """The parts of a source that can be read independently: its files, ranges of a TFDS dataset, or shards of
    a Hugging Face dataset.
    """
    if source.path is not None:
        return source_files(source)
    if source.tfds is not None:
        # Ranges of a fixed size: parts do not depend on how the dataset was written.
        length = len(_tfds(source))
        starts = range(0, max(length, 1), _TFDS_PART)
        return [f"{start}:{min(start + _TFDS_PART, length)}" for start in starts]
    # Files of known formats are read here. Others are read by the package, in its shards.
    files = dataset_files(source)
    if files is not None:
        return files
    number = _huggingface(source).num_shards
    return [f"{shard}/{number}" for shard in range(number)]


def read_records(source: Source, part: str) -> Iterator[Record]:
    """The records of one of `parts(source)`, in order.

    Raises BadInput for a missing, corrupt or truncated file.
    """
    if source.tfds is not None:
        yield from _tfds_records(source, *map(int, part.split(":")))
    elif source.huggingface is not None and "://" not in part:
        yield from _huggingface_records(source, *map(int, part.split("/")))
    else:
        yield from _file_records(part, source)


# --- files ------------------------------------------------------------------------------------------------


def _file_records(path: str, source: Source) -> Iterator[Record]:
    check_begun(path)
    # The kind of a file is its name's: text.jsonl.gz is JSON lines, compressed.
    suffixes = Path(path).suffixes[-2:] if Path(path).suffix in COMPRESSION else Path(path).suffixes[-1:]
    if suffixes == [".parquet"]:
        yield from parquet_records(path, source)
    elif suffixes[:1] in ([".jsonl"], [".json"]):
        yield from _jsonl_records(path)
    elif suffixes[:1] == [".txt"]:
        yield from _paragraphs(path, source.text_key)
    elif suffixes[:1] in ([".warc"], [".wet"]):
        yield from page_records(path, source)
    else:
        raise BadInput(f"{path}: not a kind of file that can be read; readable are {_FORMATS}")


def _lines(path: str) -> Iterator[tuple[int, bytes | BadRowError]]:
    """Lines with their line ends and their numbers, from 1."""
    number = blank = 0
    with (
        explained(path, lambda: f"line {number}"),
        decompressed(path) as stream,
        io.BufferedReader(stream, _BLOCK_BYTES) as lines,
    ):
        while line := lines.readline(MAX_DOCUMENT_BYTES):
            number += 1
            blank = blank + 1 if len(line) < 3 else 0
            if blank > _MAX_BLANK_LINES:
                raise BadInput(
                    f"{path}:{number}: more than {_MAX_BLANK_LINES:,} lines of nothing in a row; the file "
                    "is no text"
                )

            # The rest of a line that is too long is skipped.
            if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                size = len(line)
                while (rest := lines.readline(MAX_DOCUMENT_BYTES)) and not rest.endswith(b"\n"):
                    size += len(rest)
                    if size > _MAX_LINE_BYTES:
                        raise BadInput(
                            f"{path}:{number}: a line of more than {_MAX_LINE_BYTES:,} bytes; the file is "
                            "no text"
                        )
                yield number, too_long()
            else:
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _jsonl_records(path: str) -> Iterator[Record]:
    for number, line in _lines(path):
        if isinstance(line, BadRowError):
            yield f"{path}:{number}", line
            continue
        # A blank line is no row, and no mistake.
        if line.isspace():
            continue
        try:
            yield f"{path}:{number}", json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield (
                f"{path}:{number}",
                BadRowError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)"),
            )
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", BadRowError(f"not readable JSON: {one_line(error)}")


def _paragraphs(path: str, text_key: str) -> Iterator[Record]:
    """Plain text: a document is a run of lines between blank lines."""
    paragraph: list[bytes] = []
    start, size = 1, 0
    for number, line in _lines(path):
        blank = not isinstance(line, BadRowError) and line.isspace()
        if not blank:
            # A paragraph that becomes too long is forgotten; only its size is kept.
            size += MAX_DOCUMENT_BYTES if isinstance(line, BadRowError) else len(line)
            if size < MAX_DOCUMENT_BYTES:
                assert isinstance(line, bytes)
                paragraph.append(line)
            else:
                paragraph.clear()
        else:
            yield from _paragraph(path, start, paragraph, size, text_key)
            paragraph, start, size = [], number + 1, 0
    yield from _paragraph(path, start, paragraph, size, text_key)


def _paragraph(path: str, start: int, lines: list[bytes], size: int, text_key: str) -> Iterator[Record]:
    if size:
        long = size >= MAX_DOCUMENT_BYTES
        yield f"{path}:{start}", too_long() if long else {text_key: b"".join(lines).rstrip(b"\r\n")}


def _remote_files(source: Source) -> list[str]:
    path = source.path
    assert path is not None
    on_hub = hub_path(path)
    if on_hub is not None:
        files = list_files(on_hub._replace(revision=source.revision or on_hub.revision))
        if not files:
            raise BadInput(_no_file_on_hub(on_hub, source))
        return files
    if path.startswith(("http://", "https://")):
        if glob.has_magic(path):
            raise BadInput(f"{path}: a web server lists no files; name one file, or a list of files (.paths)")
        return [path]
    # A bucket or another store that fsspec knows.
    system, name = remote(path)
    try:
        files = [match for match in sorted(system.glob(name)) if system.isfile(match)]
        return [system.unstrip_protocol(file) for file in files]
    except Exception as error:  # each store raises errors of its own
        raise BadInput(f"{path}: cannot be listed: {one_line(error)}") from error


def _no_file_on_hub(path: HubPath, source: Source) -> str:
    """The message for a path on the hub without a file: with the folders that there are instead."""
    parts = path.path.split("/")
    # From the deepest folder up: the first one that exists shows where the path goes wrong.
    for depth in range(len(parts) - 1, -1, -1):
        beside = list_folders(path, "/".join(parts[:depth]))
        if beside:
            missing = parts[depth]
            near = difflib.get_close_matches(missing, beside, n=3, cutoff=0.3) or beside[:8]
            where = "/".join([path.repo, *parts[:depth]])
            return (
                f"{source.label}: no file matches (source of language {source.language}); {where} has no "
                f"{missing}, near: {', '.join(near)}"
            )
    return f"{source.label}: no file matches (source of language {source.language})"


# --- datasets ---------------------------------------------------------------------------------------------


def _tfds(source: Source) -> Any:
    # Slow to import, and few sources need it.
    import tensorflow_datasets

    try:
        rows = tensorflow_datasets.data_source(
            source.tfds, split=source.tfds_split, data_dir=source.tfds_folder
        )
        len(rows)
    except Exception as error:  # TFDS raises errors of many types; without TensorFlow, ModuleNotFoundError
        raise BadInput(
            f"TFDS dataset {source.tfds} (split {source.tfds_split}) cannot be read: {one_line(error)}"
        ) from error
    return rows


def _tfds_records(source: Source, start: int, stop: int) -> Iterator[Record]:
    rows = _tfds(source)
    for number in range(start, stop):
        yield f"{source.tfds}/{source.tfds_split}:{number + 1}", rows[number]


def _builder_files(name: str, config: str | None, split: str, commit: str, label: str) -> list[str]:
    """The files of a split of a data set on the hub, by the configurations of its card."""
    datasets = imported("datasets", label, "hf")
    try:
        builder = datasets.load_dataset_builder(name, config, revision=commit)
    except Exception as error:  # from the hub, the file system and the formats
        raise BadInput(f"Hugging Face dataset {label} cannot be read: {one_line(error)}") from error
    by_split = builder.config.data_files or {}
    if split not in by_split:
        there = ", ".join(map(str, by_split)) or "none"
        raise BadInput(f"Hugging Face dataset {label}: has no split {split!r}; its splits are {there}")
    return list(map(str, by_split[split]))


def dataset_files(source: Source) -> list[str] | None:
    """The files of a Hugging Face dataset with a split, if all are files that are read here; else None, and
    the package `datasets` reads them.

    They are asked for once for each data set, not once for each shard, and read by ranges.
    """
    assert source.huggingface is not None
    if not HUB_NAME.fullmatch(source.huggingface):
        return None
    commit = dataset_commit(source.huggingface, source.revision)
    asked = (source.huggingface, source.huggingface_config, source.huggingface_split, commit)
    files: list[str] = kept_or_made(f"files of {asked}", lambda: _builder_files(*asked, source.label))
    if not files or not all(hub_path(file) and file.endswith(_READ_HERE) for file in files):
        return None
    return files


def _huggingface(source: Source) -> Any:
    datasets = imported("datasets", source.label, "hf")
    try:
        return datasets.load_dataset(
            source.huggingface,
            source.huggingface_config,
            split=source.huggingface_split,
            revision=source.revision,
            streaming=True,
        )
    except Exception as error:  # from the hub, the file system and the formats
        raise BadInput(
            f"Hugging Face dataset {source.label} (split {source.huggingface_split}) cannot be read: "
            f"{one_line(error)}"
        ) from error


def _huggingface_records(source: Source, shard: int, number: int) -> Iterator[Record]:
    # Streamed: a shard is never whole in memory or on disk.
    rows = iter(_huggingface(source).shard(num_shards=number, index=shard))
    row = 0
    with explained(source.label, lambda: f"row {row} of shard {shard}"):
        for record in rows:
            row += 1
            yield f"{source.label}/{source.huggingface_split}-{shard}:{row}", record
