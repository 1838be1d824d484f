"""The identity of a source's text: bytes, times and digests of files, versions of data sets.

Digests are made when the text is prepared. Later, a file of the same size and time counts as unchanged
without being read. A file with another time is read, and its digest compared. `babel prepare --recheck` reads
all files.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from babel_jax.config import Source
from babel_jax.data.sources.records import dataset_files, dataset_version, source_files
from babel_jax.data.sources.streams import file_version, opened_bytes, web_file_of
from babel_jax.errors import BadInput

_BLOCK = 1 << 20
_MOST_HOLES = 1 << 32  # bytes; no file system compresses to less than a thousandth
# {"files": {path: {"bytes", "version", "digest"}}}, or {"version"} of a data set.
Origin = dict[str, Any]


def origin_of(source: Source, part: str | None = None, known: Mapping[str, Any] | None = None) -> Origin:
    """The origin of a source, or of one of its parts.

    known: files with their digests; other files are read.
    """
    names = _files_of(source, part)
    if names is None:
        return {"version": dataset_version(source)}
    files = {}
    for file in names:
        version = file_version(file)
        # The digest of the last reading counts for a file of the same size and version.
        earlier = (known or {}).get(file, {})
        is_unchanged = {**earlier, **version} == earlier
        digest = earlier.get("digest") if is_unchanged else None
        files[file] = {**version, "digest": digest or file_digest(file)}
    return {"files": files}


def changed_text(
    before: Mapping[str, Any], source: Source, part: str | None = None, recheck: bool = False
) -> str | None:
    """A description of the change since a source, or a part of one, was prepared; None if the text is the
    same.

    before: the entry of the prepared data: the source's settings and its origin. Entries of earlier versions
    have only the bytes of files.
    """
    settings = source.model_dump(mode="json")
    for key, value in settings.items():
        # Earlier versions had fewer settings.
        earlier = before.get(key, _default(key))
        if earlier != value:
            return f"its {key}: {earlier}, and now {value}"
    # Entries of earlier versions have no files of a data set.
    is_dataset = source.path is None and "version" in before
    if is_dataset or source.tfds is not None:
        return None if before.get("version") in (None, dataset_version(source)) else "its version"

    # Earlier versions recorded the sizes of files, without their versions.
    files = before.get("files")
    if files is None:
        sizes = before.get("bytes") if part is None else {part: before.get("bytes")}
        files = {file: {"bytes": size, "version": None} for file, size in (sizes or {}).items()}
    names = _files_of(source, part) or []
    if set(names) != set(files):
        return ", ".join(sorted(set(names) ^ set(files))[:3])
    for file in names:
        if not _is_same(file, files[file], recheck):
            return file
    return None


def _files_of(source: Source, part: str | None) -> list[str] | None:
    """The files of a source, or of a part of it; None for a data set that is not read as files."""
    if source.tfds is not None or (part is not None and source.huggingface is not None and "://" not in part):
        return None
    if part is not None:
        return [part]
    return dataset_files(source) if source.path is None else source_files(source)


def _default(key: str) -> Any:
    """The default of a setting of a source as JSON, for entries of earlier versions without it."""
    default = Source.model_fields[key].get_default()
    return list(default) if isinstance(default, tuple) else default


def _is_same(file: str, before: Mapping[str, Any], recheck: bool) -> bool:
    now = file_version(file)
    if now["bytes"] != before["bytes"]:
        return False
    # Entries of earlier versions have no digest, so the size alone tells.
    if "digest" not in before:
        if recheck:
            raise BadInput(
                f"{file}: prepared by an earlier version, which kept no digests to check; prepare another "
                "data.folder"
            )
        return True
    return (now["version"] == before["version"] and not recheck) or file_digest(file) == before["digest"]


def file_digest(file: str) -> str:
    """A digest of a file's bytes.

    Raises BadInput for a large local file that is nearly all holes: reading it would take hours.
    """
    on_web = web_file_of(file)
    if on_web is not None and on_web.repo:
        # The hub names the digest of each file, so nothing is read for it.
        return f"hub:{on_web.version}"
    if "://" not in file:
        status = Path(file).stat()
        if status.st_size > _MOST_HOLES and status.st_blocks * 512 < status.st_size // 1000:
            raise BadInput(
                f"{file}: {status.st_size:,} bytes, of which next to none are on the disk; copy the file "
                "again"
            )
    hashed = hashlib.blake2b(digest_size=16)
    with opened_bytes(file) as opened:
        while block := opened.read(_BLOCK):
            hashed.update(block)
    return hashed.hexdigest()
