"""Models of the hub as folders: their files in the hub's own cache (HF_HOME), fetched once.

huggingface_hub finds the commit and keeps the cache, so that transformers and other programs share the files.
Only the large files are fetched here: huggingface_hub 2 drops what came of a file when a download is stopped,
and does not compare its digest. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are huggingface_hub's.
"""

import fcntl
import functools
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO

from babel_jax.errors import BadInput, show_as
from babel_jax.hub.names import HubName
from babel_jax.hub.patience import explained, patiently
from babel_jax.model_files import (
    CONFIG,
    FOLDERS_BESIDE,
    INDEX,
    MOST_BESIDE_BYTES,
    OTHER_WEIGHTS,
    SAFETENSORS,
)
from babel_jax.progress import Work

_THREADS = 4  # files that are fetched at a time
_FREE_BYTES = 2**28  # left free on the disk of the cache
_SECONDS_BETWEEN_LOOKS = 0.5
_PARTIAL = ".babel-partial"


def hub_model(name: HubName, weights: bool = True) -> Path:
    """The folder of a model in the hub's cache. Files that the cache lacks are fetched.

    weights: False for the config and the tokenizer alone. Raises BadInput for an unknown, a gated or a
    private model, an unknown revision, a model without safetensors, a hub that cannot be reached, and a disk
    without room.
    """
    with explained(name.repo, revision=name.revision):
        commit = _commit(name)
        folder = _snapshot(name.repo, commit, [CONFIG])
        show_as(str(folder), str(name))
        files = _files(name.repo, commit, folder)
        if CONFIG not in files:
            raise BadInput(f"{name}: has no {CONFIG}, so it is no model of transformers")
        # Small files come from huggingface_hub as they are; only weights are fetched by `_fetch`.
        small = [path for path, file in files.items() if _is_beside(path, file.size)]
        _snapshot(name.repo, commit, small)
        if weights:
            chosen = _weights(name, files, folder)
            missing = [path for path in chosen if not (folder / path).exists()]
            if missing:
                _fetch(missing, name, folder.parent.parent / "blobs")
                # The files are there: huggingface_hub only links them into the folder.
                _snapshot(name.repo, commit, chosen)
    return folder


@functools.cache
def _commit(name: HubName) -> str:
    """The commit of a revision. In one process a model stays the same, also if the hub gets a newer one."""
    from huggingface_hub import HfApi

    return str(
        patiently(lambda: HfApi().resolve_revision(name.repo, revision=name.revision), name.repo).resolved
    )


def pinned(name: HubName) -> HubName:
    """The same model with its commit as the revision. Raises BadInput as `hub_model`."""
    with explained(name.repo, revision=name.revision):
        return HubName(name.repo, _commit(name))


def _snapshot(repo: str, commit: str, paths: Sequence[str]) -> Path:
    """The folder of a commit in the hub's cache, with these files."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    # Our own progress is shown.
    disable_progress_bars()
    patterns = [path.replace("[", "[[]") for path in paths]
    return Path(
        patiently(
            lambda: huggingface_hub.snapshot_download(
                repo, revision=commit, allow_patterns=patterns, library_name="babel-jax"
            ),
            repo,
        )
    )


def _files(repo: str, commit: str, folder: Path) -> dict[str, Any]:
    """The files of a commit by their paths, each with its `size`."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        return {file.path: file for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        # A cache of an earlier huggingface_hub, and no network: only the files in the cache are known.
        found = {}
        for path in folder.rglob("*"):
            if path.is_file():
                relative = path.relative_to(folder).as_posix()
                size = path.stat().st_size
                found[relative] = RepoFile(path=relative, size=size, oid="")  # type: ignore[no-untyped-call]
        return found


def _is_beside(path: str, size: int) -> bool:
    """True for a file that is read beside the weights: at the top, or in one of the known folders."""
    folder, _, name = path.rpartition("/")
    if folder not in ("", *FOLDERS_BESIDE) or name.startswith("."):
        return False
    return not name.endswith((SAFETENSORS, *OTHER_WEIGHTS)) and size <= MOST_BESIDE_BYTES


def _weights(name: HubName, files: dict[str, Any], folder: Path) -> list[str]:
    """The weights: the files that the index names, else all safetensors files at the top."""
    at_top = [path for path in files if path.endswith(SAFETENSORS) and "/" not in path]
    # A repository may have further safetensors files; the index says which ones are the model.
    if INDEX in files:
        index = json.loads((folder / INDEX).read_bytes())
        named = sorted({str(file) for file in index.get("weight_map", {}).values()})
        missing = [path for path in named if path not in files]
        if missing:
            raise BadInput(
                f"{name}: {INDEX} names {missing[0]}, which the hub does not have; name another revision"
            )
        return named
    if not at_top:
        others = [path for path in files if path.endswith(OTHER_WEIGHTS)]
        holds = f" (it has {', '.join(others[:3])})" if others else ""
        raise BadInput(
            f"{name}: holds no safetensors files{holds}; name another model or revision, or convert it with "
            "https://huggingface.co/spaces/safetensors/convert"
        )
    return at_top


def _fetch(paths: Sequence[str], name: HubName, blobs: Path) -> None:
    """Fetches large files into the cache's blobs, several at a time. After a stop, the next call fetches only
    the bytes that are missing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

    commit = _commit(name)
    files: list[Any] = list(
        patiently(lambda: HfApi().get_paths_info(name.repo, list(paths), revision=commit), name.repo)
    )
    # Still larger files than these are for huggingface_hub alone, by another protocol.
    missing: list[Any] = []
    for file in files:
        lfs = getattr(file, "lfs", None)
        if lfs is not None and file.size <= MAX_HTTP_DOWNLOAD_SIZE and not (blobs / lfs.sha256).exists():
            missing.append(file)
    if not missing:
        return
    blobs.mkdir(parents=True, exist_ok=True)
    # Bytes that came before a stop are not fetched again, so they need no room.
    there = sum(_partial_bytes(blobs, file) for file in missing)
    total = sum(file.size for file in missing)
    free = shutil.disk_usage(blobs).free - _FREE_BYTES
    if total - there > free:
        raise BadInput(
            f"{name}: {total - there:,} bytes are to be fetched to {blobs.parent.parent}, whose disk has "
            f"{max(free, 0):,} free; set HF_HOME to a folder on a larger disk"
        )
    stopped = threading.Event()
    with (
        Work[Any](f"fetching {name}", total=total, initial=there, unit="B", keep=True) as work,
        ThreadPoolExecutor(_THREADS) as pool,
    ):

        def came(count: int) -> None:
            if stopped.is_set():
                raise InterruptedError("stopped")
            work.update(count)

        try:
            for future in as_completed(
                [pool.submit(_fetch_blob, name, file, blobs, came) for file in missing]
            ):
                # The first error stops all downloads; what came of each file stays for the next call.
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _partial_bytes(blobs: Path, file: Any) -> int:
    partial = blobs / f"{file.lfs.sha256}{_PARTIAL}"
    return min(partial.stat().st_size, file.size) if partial.is_file() else 0


def _fetch_blob(name: HubName, file: Any, blobs: Path, came: Callable[[int], None]) -> None:
    """Fetches one file. If another process is fetching it, waits for that process."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    blob = blobs / file.lfs.sha256
    partial = blobs / f"{blob.name}{_PARTIAL}"
    url = hf_hub_url(name.repo, file.path, revision=_commit(name))
    bar = _bar(came)
    with open(partial, "ab") as handle:
        _lock(handle, came)
        if blob.exists():
            partial.unlink(missing_ok=True)
            return
        # There are more bytes than the file has, so they cannot be its beginning.
        if handle.tell() > file.size:
            handle.truncate(0)

        def fetch() -> None:
            handle.flush()
            http_get(
                url,
                handle,
                resume_size=os.fstat(handle.fileno()).st_size,
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.path,
                tqdm_class=bar,
            )

        def size_now() -> int:
            came(0)
            return os.fstat(handle.fileno()).st_size

        patiently(fetch, f"{name.repo}/{file.path}", size_now)
        # Under the lock, so that nobody else writes.
        digest = _sha256(partial)
        if digest != blob.name:
            partial.unlink()
            raise BadInput(
                f"{name}: other bytes of {file.path} came than the hub names (sha256 {digest[:12]}, not "
                f"{blob.name[:12]}); run the same command again"
            )
        os.replace(partial, blob)


def _lock(handle: BinaryIO, came: Callable[[int], None]) -> None:
    """Waits until no other process fetches the same file. Some network disks have no locks."""
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            came(0)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        except OSError:
            return


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bar(came: Callable[[int], None]) -> Any:
    """The class of progress bars that huggingface_hub is given: each only reports what came."""

    class Bar:
        def __init__(self, *_: object, **__: object):
            pass

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            came(count)

        def set_postfix_str(self, *_: object, **__: object) -> None:
            pass

        def close(self) -> None:
            pass

    return Bar
