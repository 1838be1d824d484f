"""Names on the hub: OWNER/NAME, or OWNER/NAME@REVISION."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from babel_jax.errors import BadInput

_REPO = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"(?P<repo>{_REPO})(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_NEVER = re.compile(r"--|\.\.|[.-](?:/|@|$)")  # the hub gives no such names
_COMMIT = re.compile(r"[0-9a-f]{40}")
# In the hub's cache: models--OWNER--NAME/snapshots/COMMIT.
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


class HubName(NamedTuple):
    """A model on the hub. revision: a branch, a tag or a commit; None for the branch `main`."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a commit, so that the model can never change."""
        return self.revision is not None and is_commit(self.revision)


def is_commit(revision: str) -> bool:
    """True for the whole hash of a commit: 40 hexadecimal digits."""
    return _COMMIT.fullmatch(revision) is not None


def hub_name(location: Path | str) -> HubName | None:
    """The name on the hub that a location is; None for a path and for a URL.

    A file or folder on disk of the same name wins. With @REVISION the name always means the hub's model,
    unless a folder is named so.
    """
    text = str(location)
    match = _NAME.fullmatch(text)
    if match is None or _NEVER.search(text) or os.path.lexists(text):
        return None
    return HubName(match["repo"], match["revision"])


def repo_name(text: str) -> str:
    """OWNER/NAME, as the name of a place on the hub to write to. Raises BadInput for anything else."""
    match = _NAME.fullmatch(text)
    if match is None or match["revision"] is not None or _NEVER.search(text):
        raise BadInput(f"{text}: no name of a model on the hub; write OWNER/NAME, such as me/my-babel")
    return text


def hub_origin(folder: Path) -> HubName | None:
    """The model, with its commit, of a folder of the hub's cache; None for any other folder."""
    match = _CACHED.fullmatch(folder.parent.parent.name)
    if folder.parent.name != "snapshots" or match is None or not is_commit(folder.name):
        return None
    return HubName(f"{match['owner']}/{match['name']}", folder.name)
