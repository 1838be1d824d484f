"""What a model answered, by request, on disk: an evaluation that was stopped goes on with what is missing."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from babel_jax.disk_errors import explain_os_errors
from babel_jax.files import open_to_append
from babel_jax.model_folders.streaming import fingerprint


class Responses:
    """Answers by request, of one model (`mark` tells it from others); a JSON line for each where a file is
    given.

    `cut` are the requests whose beginning did not fit the model, which is kept with their answers. Of several
    processes, which ask for the same in the same order, the first reads and writes the file.
    """

    def __init__(self, mark: str, path: Path | None = None):
        self._mark, self._path = mark, path
        self._known: dict[str, Any] = {}
        self.cut: set[str] = set()
        for line in _read_by_first(path).split("\n"):
            with contextlib.suppress(
                ValueError, KeyError, TypeError, RecursionError
            ):  # a line may have been cut by a kill
                entry = json.loads(line)
                self._known[entry["request"]] = entry["response"]
                self.cut |= {entry["request"]} if entry.get("cut") else set()

    def key(self, kind: str, arguments: Iterable[Any]) -> str:
        """The name of a request."""
        return fingerprint(model=self._mark, kind=kind, arguments=list(arguments))[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, responses: Mapping[str, Any]) -> None:
        """Keeps answers, on disk at once."""
        self._known.update(responses)
        if self._path is None or jax.process_index() != 0 or not responses:
            return
        entries = [
            {"request": key, "response": response, **({"cut": True} if key in self.cut else {})}
            for key, response in responses.items()
        ]
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        with explain_os_errors(self._path), open_to_append(self._path) as file:
            file.write("".join(lines).encode())


def _read_by_first(path: Path | None) -> str:
    found = b""
    if path is not None and jax.process_index() == 0 and path.is_file():
        found = path.read_bytes()
    if path is not None and jax.process_count() > 1:
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(found))))
        padded = np.frombuffer(found.ljust(size, b"\0")[:size], np.uint8)
        found = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()
    return found.decode("utf-8", errors="replace")
