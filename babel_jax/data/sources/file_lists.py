"""Lists of files on web servers: a file with one address a line, as Common Crawl and HPLT publish them."""

import fnmatch
import gzip
import io
import urllib.parse
from pathlib import Path

from babel_jax.config import Source
from babel_jax.config.data import LIST_SUFFIXES
from babel_jax.data.sources.streams import opened_bytes
from babel_jax.errors import BadInput

_MOST_BYTES = 2**28  # of a list, unpacked


def is_list(path: str) -> bool:
    """True for a list of files, by its name: warc.paths.gz, sw.map, files.urls."""
    return path.endswith(LIST_SUFFIXES)


def listed_files(source: Source) -> list[str]:
    """The files that a source's list names, in its order, and of these only those that match `only`.

    A line is an address, or a path from the root of the list's server: Common Crawl's lists name
    `crawl-data/...`. Raises BadInput for a list without such lines.
    """
    assert source.path is not None
    with opened_bytes(source.path) as file:
        content = file.read(_MOST_BYTES)
    if source.path.endswith(".gz"):
        with gzip.open(io.BytesIO(content)) as unpacked:
            content = unpacked.read(_MOST_BYTES)
    files = []
    for line in content.decode("utf-8", "replace").split():
        files.append(line if "://" in line else _beside(source.path, line))
    chosen = [file for file in files if source.only is None or fnmatch.fnmatch(file, f"*{source.only}")]
    if not chosen:
        shown = f", such as {files[0]}" if files else ""
        raise BadInput(
            f"{source.path}: none of its {len(files)} files matches only = {source.only!r}{shown} (source of "
            f"language {source.language})"
        )
    return chosen


def _beside(path: str, line: str) -> str:
    """The address of a line without a server: from the root of the list's server, or beside a list on
    disk.
    """
    if "://" in path:
        return urllib.parse.urljoin(path, f"/{line.lstrip('/')}")
    return str(Path(path).parent / line)
