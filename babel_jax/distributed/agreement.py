"""Several JAX processes that write one folder or read one model: all succeed, or all fail with one
message.
"""

import contextlib
import hashlib
import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax._src import distributed  # the barrier of the coordination service has no public name
from jax.experimental import multihost_utils

from babel_jax.digests import SUMS, files_below, is_list, merge_sums, write_sums
from babel_jax.errors import BadInput, one_line
from babel_jax.new_folders import new_folder
from babel_jax.places import fetch_part, url_of
from babel_jax.sending import send_part

_MESSAGE_BYTES = 1000
_LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000
_meetings = itertools.count()
# Folders for a bucket, which each process fills in part on its own disk, with their final paths.
_PARTS: dict[Path, Path] = {}


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block that ends on all processes when each process has reached its end.

    If one process raises an error in the block, the others raise BadInput with its message, so that none
    waits for a process that has ended. The block may contain no collective operation, because a process that
    failed would miss it.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        _exchange(one_line(error) or type(error).__name__)
        raise
    failed = {process: message for process, message in enumerate(_exchange("")) if message}
    if failed:
        process, message = next(iter(failed.items()))
        raise BadInput(f"{message} (process {process} of {jax.process_count()})")


def meet() -> None:
    """Waits until all processes are here, even if one of them compiles or prepares for a long time.

    Collective operations have a time limit (Gloo: 30 s to connect). A process that has died ends the others
    here too.
    """
    if (client := distributed.global_state.client) is not None:
        client.wait_at_barrier(f"babel {next(_meetings)}", _LONGEST_WAIT_MS)


def _exchange(message: str) -> list[str]:
    # A meeting may take long. The collective operation after it has a time limit.
    meet()
    # An all-gather needs arrays of one size on all processes.
    data = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(message.encode()[:_MESSAGE_BYTES], np.uint8)
    data[: len(encoded)] = encoded
    messages = []
    for row in multihost_utils.process_allgather(data):
        # A message that was too long may end within a character.
        messages.append(bytes(row).rstrip(b"\0").decode(errors="ignore"))
    return messages


def texts_of_all(text: str) -> list[str]:
    """The text of each process, by its index; at most 1,000 bytes of each. All processes must call this."""
    return [text] if jax.process_count() == 1 else _exchange(text)


def first_says(yes: bool) -> bool:
    """The answer of process 0 to a question that processes may answer differently, such as if a file
    exists.
    """
    return yes if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(yes)))


def first_text(text: str) -> str:
    """The text of process 0, on all processes."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    # A broadcast needs arrays of one size too, so the length is sent first.
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return bytes(multihost_utils.broadcast_one_to_all(np.resize(data, length))).decode()


def same_on_all(text: str) -> bool:
    """True if all processes have the same text; their hashes are compared."""
    if jax.process_count() == 1:
        return True
    digests = multihost_utils.process_allgather(
        np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    )
    return bool((digests == digests[0]).all())


@contextlib.contextmanager
def new_folder_of_all(final: Path) -> Iterator[Path]:
    """`new_folder`: process 0 makes and renames it, all processes fill it. Raises BadInput on all of them if
    one fails.

    A folder for a bucket has a part on the disk of each process; `write_sums_of_all` sends the parts of the
    other processes. `write_sums_of_all` must be the last call of the block. Process 0 renames the folder at
    the end of the block and waits for no other process; after that call, all processes have written.
    """
    with contextlib.ExitStack() as made:
        with agreed():
            partial = made.enter_context(new_folder(final)) if jax.process_index() == 0 else final

        # Process 0 chose the name of the partial folder.
        partial = final.with_name(first_text(partial.name))
        # The processes share no disk for a bucket, so each fills a folder on its own disk.
        in_parts = jax.process_count() > 1 and url_of(final) is not None
        with agreed():
            if in_parts:
                _PARTS[partial] = final
                made.callback(_PARTS.pop, partial)
                if jax.process_index() != 0:
                    partial.mkdir()
                    made.callback(shutil.rmtree, partial, ignore_errors=True)
            # Process 0 has made the folder. A process that does not see it has another disk.
            if not partial.is_dir():
                raise BadInput(
                    f"{partial}: not seen by all processes; give a folder on a disk that they share"
                )
        yield partial
        with agreed():
            made.close()


def is_in_parts(folder: Path) -> bool:
    """True if each process fills its part of this folder on its own disk."""
    return folder in _PARTS


def write_sums_of_all(folder: Path) -> None:
    """Writes the list of digests of a folder that all processes have filled; each reads its share of the
    files.

    All processes must call this.
    """
    if folder in _PARTS:
        _write_sums_of_parts(folder, _PARTS[folder])
        return
    with agreed():
        files = {str(path): path.stat().st_size for path in files_below(folder)}
    # Digests need every byte again, so the processes share the reading.
    owners, process = shared_out(files), jax.process_index()
    part = f"{SUMS}.process_{process}"
    with agreed():
        write_sums(folder, [Path(path) for path in files if owners[path] == process], part)
    with agreed():
        # The block above ended on all processes, so all parts of the list are on disk.
        if process == 0:
            merge_sums(folder)


def _write_sums_of_parts(folder: Path, final: Path) -> None:
    process = jax.process_index()
    with agreed():
        write_sums(folder, name=f"{SUMS}.process_{process}")
        if process != 0:
            send_part(folder, final)
    with agreed():
        # The parts are in the bucket now. Process 0 fetches only their lists of digests.
        if process == 0:
            fetch_part(final, folder, is_list)
            merge_sums(folder)


def shared_out(sizes: Mapping[str, int]) -> dict[str, int]:
    """A process for each name, so that the sums of sizes are about equal: each name goes to the process with
    the smallest sum so far.
    """
    loads = [0] * jax.process_count()
    owners = {}
    for name, size in sizes.items():
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += size
    return owners
