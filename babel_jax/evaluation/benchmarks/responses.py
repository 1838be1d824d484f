"""The answers of a model by request, on disk: an evaluation that was stopped resumes with the missing
ones.
"""

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
    """The answers of one model by request; with a file, a JSON line for each. `mark` identifies the model.

    cut: the requests whose beginning was cut because the model has too few positions; it is stored with their
    answers. Several processes make the same requests in the same order; the first one reads and writes the
    file.
    """

    def __init__(self, mark: str, path: Path | None = None):
        self._mark, self._path = mark, path
        self._known: dict[str, Any] = {}
        self.cut: set[str] = set()
        for line in _read_by_first(path).split("\n"):
            # A line may have been cut by a kill.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                self._known[entry["request"]] = entry["response"]
                self.cut |= {entry["request"]} if entry.get("cut") else set()

    def key(self, kind: str, arguments: Iterable[Any]) -> str:
        """The key of a request."""
        return fingerprint(model=self._mark, kind=kind, arguments=list(arguments))[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, responses: Mapping[str, Any]) -> None:
        """Stores answers; they are on disk when it returns."""
        self._known.update(responses)
        if self._path is None or jax.process_index() != 0 or not responses:
            return
        lines = []
        for key, response in responses.items():
            entry = {"request": key, "response": response}
            if key in self.cut:
                entry["cut"] = True
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        with explain_os_errors(self._path), open_to_append(self._path) as file:
            file.write("".join(lines).encode())


def _read_by_first(path: Path | None) -> str:
    """The text of a file, read by the first process and sent to the others; "" without a file."""
    content = b""
    if path is not None and jax.process_index() == 0 and path.is_file():
        content = path.read_bytes()
    if path is not None and jax.process_count() > 1:
        # The length first: an array that is broadcast has the same size on all processes.
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
        padded = np.frombuffer(content.ljust(size, b"\0")[:size], np.uint8)
        content = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()
    return content.decode("utf-8", errors="replace")
