"""Workers: processes that a command starts, each for one request.

The request is one line of JSON on the worker's standard input, which stays open. The worker ends when this
input ends. So it ends with its parent, also when the parent is killed.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any


def send(worker: subprocess.Popen[str], request: Mapping[str, Any]) -> None:
    """Sends the request. The worker must have ended before its standard input is closed."""
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()


def received() -> dict[str, Any]:
    """In the worker: the request. From now on this process ends with its parent."""
    request: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, name="ends with its parent", daemon=True).start()
    return request


def _end_with_parent() -> None:
    # Not by sys.stdin, whose lock this thread would hold while the interpreter shuts down.
    while os.read(0, 1024):
        pass
    os._exit(1)
