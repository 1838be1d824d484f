"""Flores-200 from its official archive, which has no gate (CC-BY-SA-4.0; Goyal et al. 2022, NLLB team 2022).

It is fetched once, into `babel-jax/flores200_dataset` of the Hugging Face cache (HF_HOME). FLORES+ on the hub
has later corrections and more languages, and wants its conditions accepted.
"""

import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from babel_jax.errors import BadInput, one_line
from babel_jax.progress import working

URL = "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz"
FOLDERS = ("flores200", "flores200_dataset")  # in a folder of the user's: ours, and the archive's own
_MEMBER = re.compile(r"(?:\./)?flores200_dataset/((?:dev|devtest)/[a-z]{3}_[A-Z][a-z]{3}\.(?:dev|devtest))")
_MOST_BYTES = 2**20  # of a file; the largest one has less than half of that
_TIMEOUT = 60  # seconds without an answer


def flores_folder() -> Path:
    """The folder that has the archive's folder. Fetches the archive if it is not there yet.

    Raises BadInput if it cannot be had.
    """
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "babel-jax"
    folder = home / FOLDERS[1]
    if folder.is_dir():
        return home
    # Under a name of this process, so that two processes may fetch at the same time.
    partial = home / f"{FOLDERS[1]}.{os.getpid()}.partial"
    try:
        with working(f"fetching {URL}"):
            _extract(partial)
        # Another process may have been faster.
        if not folder.is_dir():
            partial.rename(folder)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise BadInput(
            f"Flores-200 cannot be had from {URL}: {one_line(error, 150)}; on a machine without network, "
            f"give --data DIR with its folder {FOLDERS[1]}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return home


def _extract(folder: Path) -> None:
    """Writes the sentences of the archive, and nothing else of it."""
    found = 0
    with (
        urllib.request.urlopen(URL, timeout=_TIMEOUT) as answer,
        tarfile.open(fileobj=answer, mode="r|gz") as archive,
    ):
        for member in archive:
            # An archive may name any path; only the files of sentences are written, below our folder.
            name = _MEMBER.fullmatch(member.name)
            file = archive.extractfile(member) if name is not None and member.isreg() else None
            if name is None or file is None:
                continue
            if member.size > _MOST_BYTES:
                raise tarfile.TarError(f"{member.name} has {member.size:,} bytes")
            path = folder / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())
            found += 1
    if not found:
        raise tarfile.TarError("it has no sentences")
