"""One of two processes that begin the same commands at the same moment: each line of standard input is one to
run.

A line is {"arguments": [...], "locks": bool}; the answer is a line {"status": ..., "said": ...}. Without
locks flock(2) fails, as on some network disks, and a lease is renewed more often than it is by default.
"""

import contextlib
import errno
import fcntl
import io
import json
import sys

from babel_jax import lease
from babel_jax.cli import main
from babel_jax.recipe import recipe  # noqa: F401 - so that both begin at once

flock = fcntl.flock
lease.leased.__wrapped__.__defaults__ = (1.0,)  # seconds


def no_flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")


print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    fcntl.flock = flock if asked["locks"] else no_flock
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(asked["arguments"])
    print(json.dumps({"status": status, "said": said.getvalue()}), flush=True)
