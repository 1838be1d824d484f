"""A model folder to the hub, as one commit: `babel push`.

Large files are sent first, one after the other, and then one commit names all files: the hub never shows
half a model. (`upload_folder` of huggingface_hub commits a large folder in parts.) After a stop the same call
sends what the hub lacks, because the hub knows the files that it has by their digests.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from babel_jax.digests import SUMS, check_sums, files_below, is_list, lists_below, read_sums
from babel_jax.errors import BadInput, one_line
from babel_jax.hub.names import repo_name
from babel_jax.hub.patience import explained, patiently
from babel_jax.model_files import WEIGHT_SUFFIXES
from babel_jax.model_folders.folder import Format, ModelFolder, open_folder
from babel_jax.model_folders.hf_tensors import open_hf_tensors
from babel_jax.model_folders.model_card import CARD, front_matter
from babel_jax.new_folders import MARK
from babel_jax.places import fetched
from babel_jax.progress import Work

log = logging.getLogger("babel")

_MAIN = "main"


def push_folder(
    location: Path | str, name: str, private: bool = False, revision: str | None = None
) -> dict[str, Any]:
    """Sends a model folder in Hugging Face's format, with its card, to the repository OWNER/NAME, which is
    made if it is not there.

    private: of a new repository. revision: the branch, by default `main`. Weights of the repository that the
    folder does not have are removed: programs that read all safetensors files would read both models. Returns
    {"name", "url", "commit", "files", "bytes", "removed", "summary"}. Raises BadInput for a folder that is
    unfinished, damaged, in Orbax format or without a card, a missing or weak key, and a hub that cannot be
    reached.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationDelete, HfApi

    repo = repo_name(name)
    # All checks of the folder come before the first request to the hub.
    folder = _checked(fetched(location))
    if huggingface_hub.get_token() is None:
        raise BadInput(
            f"{repo}: sending needs a key of the hub with the right to write; set HF_TOKEN, or run `hf auth "
            "login`"
        )
    branch = revision or _MAIN
    api = HfApi(library_name="babel-jax")
    with explained(repo, revision=branch), _errors_of_sending(repo):
        # An answer that is lost on its way does no harm to any of these calls: they may be repeated.
        url = str(patiently(lambda: api.create_repo(repo, private=private, exist_ok=True), repo))
        if branch != _MAIN:
            patiently(lambda: api.create_branch(repo, branch=branch, exist_ok=True), repo)
        # What the hub has now: the commit is made onto this state, and refused if it changes.
        head = patiently(lambda: api.model_info(repo, revision=branch), repo)
        there = [sibling.rfilename for sibling in head.siblings or ()]
        additions = _additions(folder.path)
        sizes = {addition.path_in_repo: addition.upload_info.size for addition in additions}
        removed = [path for path in there if _is_weights(path) and path not in sizes]
        operations: list[Any] = [*additions, *(CommitOperationDelete(path) for path in removed)]
        with Work[Any](f"sending {repo}", total=sum(sizes.values()), unit="B", keep=True) as work:
            for addition in additions:
                # Small files are sent in the commit itself.
                if _is_weights(addition.path_in_repo):
                    patiently(_sender(api, repo, branch, addition), repo)
                    work.update(sizes[addition.path_in_repo])
            message = f"{folder.path.name}, by babel-jax"
            commit = patiently(_committer(api, repo, branch, operations, message, head.sha), repo)
    summary = f"{repo}: {len(sizes)} files of {sum(sizes.values()):,} bytes, commit {commit.oid[:12]}: {url}"
    # The hub makes no commit of files that it has already.
    if commit.oid == head.sha:
        summary = f"{repo}: has these files already, commit {commit.oid[:12]}: {url}"
    if removed:
        summary += f"\nremoved there, as weights of an earlier model: {', '.join(removed)}"
    return {
        "name": repo,
        "url": url,
        "commit": commit.oid,
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "removed": removed,
        "summary": summary,
    }


def _additions(folder: Path) -> list[Any]:
    """The files of a folder, as parts of a commit."""
    from huggingface_hub import CommitOperationAdd

    digests = dict(_digests(folder))
    additions = []
    for file in _files(folder):
        addition = CommitOperationAdd(file.relative_to(folder).as_posix(), str(file))
        if file in digests:
            # Known, so that the file is not read again.
            addition.upload_info.sha256 = bytes.fromhex(digests[file])
        additions.append(addition)
    return additions


def _sender(api: Any, repo: str, branch: str, addition: Any) -> Callable[[], Any]:
    return lambda: api.preupload_lfs_files(repo, [addition], revision=branch, free_memory=False)


def _committer(
    api: Any, repo: str, branch: str, operations: list[Any], message: str, parent: str | None
) -> Callable[[], Any]:
    """Commits onto `parent`: the hub refuses if somebody else has committed since."""
    return lambda: api.create_commit(
        repo, operations, commit_message=message, revision=branch, parent_commit=parent
    )


def _checked(path: Path) -> ModelFolder:
    """The folder, if it may be sent: whole, undamaged, in Hugging Face's format and with a card."""
    if (path / MARK).exists():
        raise BadInput(
            f"{path}: not whole: a command is writing it, or was stopped as it did; run that command again"
        )
    folder = open_folder(path)
    if folder.format is Format.ORBAX:
        raise BadInput(
            f"{path}: in Orbax's format, which the hub's programs do not read; send its conversion: babel "
            f"convert {path} FOLDER --to hf"
        )
    # First the headers of the weights, which are quick to read, then the digests of all bytes.
    open_hf_tensors(folder.path, folder.config, compare_copy=False)
    lists = lists_below(path)
    with Work[Any](f"checking {path.name}", unit="B") as work:
        checked = check_sums(lists, path, seen=work.update)
    for damaged, reason in checked.damaged.items():
        raise BadInput(f"{damaged}: {reason} ({SUMS}); make the folder again before it is sent")
    if not (path / CARD).is_file():
        raise BadInput(
            f"{path}: no card ({CARD}); `babel expand` and `babel train` write one, or write it yourself"
        )
    values = front_matter(path)
    if not values:
        raise BadInput(
            f"{path / CARD}: has no front matter that can be read (keys between two lines of ---), by which "
            "the hub finds and loads the model; add at least `license: ...`"
        )
    if "license" not in values:
        log.warning("%s: names no licence; add `license: ...` to it", path / CARD)
    return folder


def _files(folder: Path) -> list[Path]:
    """The files to send: all but hidden ones."""
    return [*files_below(folder), *(path for path in folder.iterdir() if is_list(path))]


def _digests(folder: Path) -> list[tuple[Path, str]]:
    found = []
    for path in lists_below(folder):
        found += list(read_sums(path).items())
    return found


def _is_weights(path: str) -> bool:
    return "/" not in path and path.endswith(WEIGHT_SUFFIXES)


@contextlib.contextmanager
def _errors_of_sending(repo: str) -> Iterator[None]:
    """Turns the errors of sending into BadInput; those of the hub's answers are left to `explained`."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 403:
            raise BadInput(
                f"{repo}: the key in HF_TOKEN has no right to write there "
                f"({one_line(error.server_message, 200)}); give one that has, or another owner"
            ) from error
        if status == 412:
            raise BadInput(
                f"{repo}: somebody else has changed it meanwhile; look at it, and run the same command again"
            ) from error
        raise
    except (RuntimeError, ValueError) as error:  # of huggingface_hub and hf_xet, when files are sent
        if isinstance(error, BadInput):
            raise
        cause = error.__cause__ or error
        raise BadInput(
            f"{repo}: cannot be sent: {one_line(cause, 300)}; the same command sends what is missing"
        ) from error
