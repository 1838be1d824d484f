"""The commits of the data sets on the hub that prepared data was begun with.

They are written into the folder before any text is read. A later start reads the same commits, also if the
hub has newer ones: the same files in the same order. A folder that is complete needs no hub.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from babel_jax.config import Source
from babel_jax.data.json_files import read_json
from babel_jax.files import write_text
from babel_jax.hub.datasets import dataset_commit, hub_path
from babel_jax.hub.names import is_commit

REVISIONS = "revisions.json"


def pinned_sources(sources: Sequence[Source], folder: Path) -> tuple[Source, ...]:
    """The sources, those on the hub with the commit that the folder was begun with as their revision.

    Raises BadInput for a data set or a revision that the hub does not have.
    """
    path = folder / REVISIONS
    kept = read_json(path) if path.is_file() else {}
    commits = dict(kept)
    pinned = []
    for source in sources:
        repo, asked = _on_hub(source)
        if repo is None:
            pinned.append(source)
            continue
        # One commit for each data set and branch: all sources of it read the same files.
        key = f"{repo}@{asked or 'main'}"
        if asked is not None and is_commit(asked):
            commits[key] = asked
        elif key not in commits:
            commits[key] = dataset_commit(repo, asked)
        pinned.append(source.model_copy(update={"revision": commits[key]}))
    if commits != kept:
        text = json.dumps(dict(sorted(commits.items())), indent=2) + "\n"
        write_text(path, text)
    return tuple(pinned)


def _on_hub(source: Source) -> tuple[str | None, str | None]:
    """The data set on the hub of a source and the revision that it names; (None, None) for other sources."""
    if source.huggingface is not None:
        return (source.huggingface, source.revision) if "/" in source.huggingface else (None, None)
    path = None if source.path is None else hub_path(source.path)
    return (None, None) if path is None else (path.repo, source.revision or path.revision)
