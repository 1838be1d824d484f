"""Faults at the n-th rename, link or sync of a program that runs in this process: an error of the disk, or
the end of the process.
"""

import contextlib
import os
import shutil
import threading

CHANGES = ("replace", "rename", "link", "fsync")
OTHERS = ("unlink", "remove", "rmdir", "mkdir")


class Killed(BaseException):
    """The process is gone: nothing catches it, and nothing that comes after it changes the disk."""


class Faults:
    """Counts the changes; at the one numbered `at` (from 1) raises an OSError of this number, or, with None,
    kills.
    """

    def __init__(self, monkeypatch, at=0, number=None):
        self.count, self._at, self._number, self._dead = 0, at, number, False
        self._lock = threading.Lock()
        for name in CHANGES:
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))
        for name in OTHERS:
            monkeypatch.setattr(os, name, self._of_the_living(getattr(os, name)))
        monkeypatch.setattr(shutil, "rmtree", self._of_the_living(shutil.rmtree))

    def _watched(self, change):
        def run(*arguments, **names):
            self._die()
            with self._lock:
                self.count += 1
                now = self.count == self._at
            if now and self._number is not None:
                raise OSError(self._number, os.strerror(self._number), str(arguments[0]))
            if now:
                self._dead = True
                self._die()
            return change(*arguments, **names)

        return run

    def _of_the_living(self, removal):
        def run(*arguments, **names):
            self._die()
            return removal(*arguments, **names)

        return run

    def _die(self):
        if not self._dead:
            return
        if threading.current_thread() is threading.main_thread():
            raise Killed
        raise OSError(5, "Input/output error")  # what libraries wait for a thread with is an Exception


@contextlib.contextmanager
def faults(pytest_monkeypatch, at=0, number=None):
    """`Faults` for a block."""
    with pytest_monkeypatch.context() as patch:
        yield Faults(patch, at, number)
