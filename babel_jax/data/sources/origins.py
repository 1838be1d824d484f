"""What tells the text of a source from other text: of files their bytes, times and digests, of data sets
their versions.

Digests are made when the text is prepared. Later a file of the same size and time is taken for the same file,
which costs no reading. A file of another time is read, and its digest compared. `babel prepare --recheck`
reads all files.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from babel_jax.config import Source
from babel_jax.data.sources.records import dataset_version, source_files
from babel_jax.data.sources.streams import file_version, opened_bytes
from babel_jax.errors import BadInput

_BLOCK = 1 << 20
_MOST_HOLES = 1 << 32  # bytes; compression of a file system saves less than 999 of 1,000
# {"files": {path: {"bytes", "version", "digest"}}}, or {"version"} of a data set.
Origin = dict[str, Any]


def origin_of(source: Source, part: str | None = None, known: Mapping[str, Any] | None = None) -> Origin:
    """The origin of a source, or of one of its parts.

    `known` are files whose digests have been made; the others are read.
    """
    if source.path is None:
        return {"version": dataset_version(source)}
    files = {}
    for file in source_files(source) if part is None else [part]:
        now = file_version(file)
        before = (known or {}).get(file, {})
        digest = before.get("digest") if {**before, **now} == before else None
        files[file] = {**now, "digest": digest or file_digest(file)}
    return {"files": files}


def changed_text(
    before: Mapping[str, Any], source: Source, part: str | None = None, recheck: bool = False
) -> str | None:
    """What has changed since a source, or a part of one, was described; None where its text is the same.

    `before` is what prepared data keeps: the source's settings beside its origin. Earlier versions kept no
    more than the bytes of files.
    """
    settings = source.model_dump(mode="json")
    if any(before.get(key) != value for key, value in settings.items()):
        return "its settings"
    if source.path is None:
        return None if before.get("version") in (None, dataset_version(source)) else "its version"
    files = before.get("files")
    if files is None:
        sizes = before.get("bytes") if part is None else {part: before.get("bytes")}
        files = {file: {"bytes": size, "version": None} for file, size in (sizes or {}).items()}
    names = source_files(source) if part is None else [part]
    if set(names) != set(files):
        return ", ".join(sorted(set(names) ^ set(files))[:3])
    return next((file for file in names if not _is_same(file, files[file], recheck)), None)


def _is_same(file: str, before: Mapping[str, Any], recheck: bool) -> bool:
    now = file_version(file)
    if now["bytes"] != before["bytes"]:
        return False
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

    Raises BadInput for a large local file of nothing but holes: to read it would take hours.
    """
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
