"""Files on the hub or on a web server, read by ranges of bytes as if they were on disk.

The hub is asked once for the address of a file; the ranges are then asked of its storage, whose requests are
not limited as the hub's are. Blocks that came are kept on disk, up to a bound: a second reading, and the next
start of a command that was stopped, fetch nothing twice. BABEL_CACHE_GIB is the bound (default 20; 0 keeps
nothing).
"""

import collections
import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from babel_jax.errors import BadInput
from babel_jax.hub.patience import explained, patiently
from babel_jax.places import FREE_BYTES, PARTIAL

BLOCK_BYTES = 2**23
_BLOCKS_IN_MEMORY = 3
_DEFAULT_GIB = 20.0
_SECONDS_OF_SILENCE = 60.0
_KEPT = "blocks"  # of the scratch space


class WebFile(NamedTuple):
    """A file with an address. version: changes with the content; the digest of a large file on the hub.

    repo: the data set on the hub that has it; empty for a file on a web server.
    """

    address: str
    size: int
    version: str
    repo: str = ""


class RangedFile(io.RawIOBase):
    """A WebFile, open for reading. Only one thread may use it."""

    def __init__(self, file: WebFile):
        self._file, self._position = file, 0
        self._blocks: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._folder = _kept_blocks(file)
        self._location: str | None = None  # in the storage; None before it is known
        self._came = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def size(self) -> int:
        """The length of the file, for Arrow."""
        return self._file.size

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")
        # At most the rest of one block: readers ask again for more.
        number, skipped = divmod(self._position, BLOCK_BYTES)
        if self._position >= self._file.size or not len(wanted):
            return 0
        found = self._block(number)[skipped : skipped + len(wanted)]
        wanted[: len(found)] = found
        self._position += len(found)
        return len(found)

    def _block(self, number: int) -> bytes:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        kept = None if self._folder is None else self._folder / f"{number:06d}"
        length = min(BLOCK_BYTES, self._file.size - number * BLOCK_BYTES)
        # From the disk if a whole block is there; else from the network.
        block = None
        if kept is not None and kept.is_file():
            block = kept.read_bytes()
        if block is None or len(block) != length:
            block = self._fetched(number * BLOCK_BYTES, length)
            if kept is not None:
                _keep(kept, block)
        self._blocks[number] = block
        while len(self._blocks) > _BLOCKS_IN_MEMORY:
            self._blocks.popitem(last=False)
        return block

    def _fetched(self, start: int, length: int) -> bytes:
        name = self._file.repo or self._file.address
        with explained(name, "dataset"):
            data = patiently(lambda: self._asked(start, length), self._file.address, lambda: self._came)
        self._came += length
        return data

    def _asked(self, start: int, length: int) -> bytes:
        """One request for a range. An address that the storage no longer takes is asked for anew."""
        import httpx2
        from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

        if self._location is None:
            self._location = _location(self._file)
        headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        # The key goes to the hub alone; an address of the storage is signed already.
        if self._file.repo and _is_of_hub(self._location):
            headers |= build_hf_headers()
        answer = get_session().get(
            self._location, headers=headers, follow_redirects=True, timeout=_SECONDS_OF_SILENCE
        )
        if answer.status_code in (401, 403) and self._file.repo:
            # The address has expired: the next try asks for another one.
            self._location = None
            answer = get_session().get(
                _located(self), headers=headers, follow_redirects=True, timeout=_SECONDS_OF_SILENCE
            )
        if answer.status_code >= 400:
            _raise_for(answer)
        content: bytes = answer.content
        # A server that knows no ranges sends the whole file.
        if answer.status_code == 200:
            content = content[start : start + length]
        if len(content) != length:
            raise httpx2.RemoteProtocolError(f"{len(content)} of {length} bytes came")
        return content


def _located(reader: RangedFile) -> str:
    reader._location = _location(reader._file)
    return reader._location


def _location(file: WebFile) -> str:
    """The address at which the bytes of a file are: for the hub that of its storage."""
    if not file.repo:
        return file.address
    from huggingface_hub import get_hf_file_metadata

    return str(get_hf_file_metadata(file.address).location)


def _is_of_hub(address: str) -> bool:
    from huggingface_hub import constants

    return address.startswith(f"{constants.ENDPOINT}/")


def _raise_for(answer: Any) -> None:
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    hf_raise_for_status(answer)


def opened(file: WebFile) -> io.BufferedReader:
    """A file, open for reading."""
    return io.BufferedReader(RangedFile(file), 2**16)


def web_file(address: str) -> WebFile:
    """The size and version of a file on a web server.

    Raises BadInput if it is not there, or the server does not tell its size.
    """
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    def ask() -> Any:
        answer = get_session().head(address, follow_redirects=True, timeout=_SECONDS_OF_SILENCE)
        if answer.status_code >= 400 and answer.status_code != 404:
            _raise_for(answer)
        return answer

    with explained(address, "file"):
        answer = patiently(ask, address)
    if answer.status_code == 404:
        raise BadInput(f"{address}: no such file on the server; check the address")
    size = answer.headers.get("Content-Length")
    if size is None:
        raise BadInput(f"{address}: the server does not tell the size of the file; download it first")
    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return WebFile(address, int(size), version.strip('"'))


# --- Blocks on disk. --------------------------------------------------------------------------------------


def scratch() -> Path:
    """The folder in the scratch space for what comes from the hub."""
    above = os.environ.get("BABEL_SCRATCH") or Path.home() / ".cache" / "babel-jax"
    return Path(above).absolute() / "hub"


def _most_bytes() -> int:
    text = os.environ.get("BABEL_CACHE_GIB", "")
    try:
        return int(float(text or _DEFAULT_GIB) * 2**30)
    except (ValueError, OverflowError):
        raise BadInput(f"BABEL_CACHE_GIB = {text!r}: not a number of GiB, such as 20") from None


def _kept_blocks(file: WebFile) -> Path | None:
    """The folder of a file's blocks, with room for all of them; None if none are to be kept."""
    most = _most_bytes()
    if most < file.size or not file.version:
        return None
    key = hashlib.sha256(f"{file.address} {file.version} {file.size}".encode()).hexdigest()[:32]
    folder = scratch() / _KEPT / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError:
        return None
    _trim(folder.parent, folder, most - file.size)
    return folder


def _keep(path: Path, block: bytes) -> None:
    """Keeps a block. Without room it is not kept; that is no error."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(path.parent).free < FREE_BYTES + len(block):
            return
        partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
        partial.write_bytes(block)
        os.replace(partial, path)


def _trim(above: Path, used: Path, most: int) -> None:
    """Removes the blocks of other files, the ones opened longest ago first, until they have `most` bytes."""
    with contextlib.suppress(OSError):
        # The time of a folder is that of its last opening.
        folders = list(_sizes(above))
        left = sum(size for _, folder, size in folders if folder != used)
        for _, folder, size in sorted(folders):
            if left <= most:
                return
            if folder != used:
                shutil.rmtree(folder, ignore_errors=True)
                left -= size


def _sizes(above: Path) -> Iterator[tuple[float, Path, int]]:
    for entry in os.scandir(above):
        if entry.is_dir(follow_symlinks=False):
            size = sum(block.stat().st_size for block in os.scandir(entry.path))
            yield entry.stat().st_mtime, Path(entry.path), size
