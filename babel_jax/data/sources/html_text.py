"""The text of web pages, extracted in a separate process: for some pages of strangers the parser takes
minutes or crashes.

`python -m babel_jax.data.sources.html_text` is that process. It reads pages and writes texts; each starts
with its length in 8 bytes, little-endian.
"""

import atexit
import os
import resource
import select
import struct
import subprocess
import sys
import time
from typing import IO

# A page of a crawl takes milliseconds.
PAGE_SECONDS = 5.0
_MEMORY_BYTES = 2 << 30
_LENGTH = struct.Struct("<q")
_BLOCK = 1 << 16


class PageError(Exception):
    """The reason why a page gives no text."""


class TextOfPages:
    """The process, started with the first page, and again after a page that ended it."""

    def __init__(self, seconds: float = PAGE_SECONDS):
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def text_of(self, html: str) -> str:
        """The main content of a page as plain text.

        Raises PageError for a page that takes too much time or memory.
        """
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        page = html.encode("utf-8", "replace")
        # One limit for sending and receiving: the length comes first, then the text.
        end = time.monotonic() + self._seconds
        try:
            process.stdin.write(_LENGTH.pack(len(page)) + page)
            process.stdin.flush()
            length = _LENGTH.unpack(self._read(process.stdout, _LENGTH.size, end))[0]
            text = self._read(process.stdout, max(length, 0), end)
        except (BrokenPipeError, EOFError):
            self.close()
            raise PageError("the HTML parser ended on the page") from None
        except TimeoutError:
            self.close()
            raise PageError(
                f"the HTML parser took more than {self._seconds:g} seconds for the page"
            ) from None
        except BaseException:
            # The next output of the process would belong to this page.
            self.close()
            raise
        if length < 0:
            raise PageError("the HTML parser refuses the page")
        return text.decode("utf-8", "replace")

    def _started(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "babel_jax.data.sources.html_text"]
        path = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C must reach only the parent process
        )

    @staticmethod
    def _read(file: IO[bytes], size: int, end: float) -> bytes:
        content = bytearray()
        while len(content) < size:
            ready, _, _ = select.select([file], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            block = os.read(file.fileno(), min(_BLOCK, size - len(content)))
            if not block:
                raise EOFError
            content += block
        return bytes(content)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _serve() -> None:
    from resiliparse.extract.html2text import extract_plain_text

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    pages, texts = sys.stdin.buffer, sys.stdout.buffer
    # The input ends when the parent has ended; `close` kills this process.
    while head := pages.read(_LENGTH.size):
        page = pages.read(_LENGTH.unpack(head)[0]).decode("utf-8", "replace")
        try:
            text = extract_plain_text(page, main_content=True).encode("utf-8", "replace")
            texts.write(_LENGTH.pack(len(text)) + text)
        except Exception:
            texts.write(_LENGTH.pack(-1))
        texts.flush()


if __name__ == "__main__":
    _serve()
