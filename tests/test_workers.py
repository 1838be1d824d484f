"""A worker answers one request, and ends with the process that started it."""

import subprocess
import sys

# The worker says that it has its request, and then would wait for ever.
WORKER = """
import threading
from babel_jax.workers import received
print(received()["word"], flush=True)
threading.Event().wait()
"""
# Ends itself (an exit status) with the interpreter's own end.
QUICK_WORKER = "from babel_jax.workers import received; print(received()['word'])"
PARENT = f"""
import subprocess, sys, threading
from babel_jax.workers import send
with subprocess.Popen([sys.executable, "-c", {WORKER!r}], stdin=subprocess.PIPE, text=True) as worker:
    send(worker, {{"word": "ready"}})
    threading.Event().wait()
"""


def test_a_worker_ends_when_its_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        # The worker has the pipe too, so the pipe ends with the worker: or TimeoutExpired is raised.
        assert parent.communicate(timeout=60) == ("", None)


def test_a_worker_that_is_done_ends_with_its_own_status():
    script = f"""
import subprocess, sys
from babel_jax.workers import send
with subprocess.Popen([sys.executable, "-c", {QUICK_WORKER!r}], stdin=subprocess.PIPE, text=True) as worker:
    send(worker, {{"word": "two\\nlines"}})
    assert worker.wait() == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "two\nlines\n", "")
