"""An OpenAI-compatible server and its key. Only this module sends the key, and it keeps the key out of
everything that is written.

A request goes only to the configured address: a redirect is an error, because the key would go with it. An
answer has a total deadline and a maximum size, even if a server sends single bytes slowly.
"""

import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any

from babel_jax.config.quality import JudgeSettings
from babel_jax.errors import BadInput, one_line, redacted

MOST_ANSWER_BYTES = 4 * 2**20  # of status line, headers and body together
_MOST_SHOWN_CHARACTERS = 300  # of a server's text in a message
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
# Statuses for a single prompt: it is too long, or a filter stops it. If many prompts in a row get these, the
# cause is not in the prompts.
_PROMPT_STATUSES = (400, 413, 422)
_FIRST_PAUSE_SECONDS = 1.0


class Server:
    """The chat completions of one endpoint."""

    def __init__(self, settings: JudgeSettings):
        """Raises BadInput for a key that an HTTP header cannot hold. The key is not in the message."""
        self._settings = settings
        # The key is in this object alone, and `url` is safe to show.
        self._key = _key(settings.key_variable)
        self._url = f"{(settings.endpoint or '').rstrip('/')}/chat/completions"
        self.url = redacted(self._url, self._key)  # for messages
        self._opener = urllib.request.build_opener(
            _NoRedirects(), _Http(settings.timeout_seconds), _Https(settings.timeout_seconds)
        )

    def post(self, body: dict[str, Any]) -> tuple[int, Any]:
        """The server's status and answer, without the key. If the server is busy or does not answer, the
        request is repeated after pauses that double.

        Raises BadInput for any status except 200 and those of a single prompt, and for an invalid answer.
        """
        problem = ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                status, answer = self._answer(body)
            except BadInput:
                raise
            except (OSError, ValueError, OverflowError, RecursionError, http.client.HTTPException) as error:
                problem = self._shown(str(error) or type(error).__name__)
                continue
            if status == 200:
                return status, answer
            message = self._shown(answer)
            # The prompt is at fault, not the server: the other prompts can still be asked.
            if status in _PROMPT_STATUSES:
                return status, message
            problem = f"status {status}: {message}"
            if status not in _RETRIED:
                break
        raise BadInput(
            f"judge.endpoint: {self.url} does not serve ({problem}); answers so far are kept, and the same "
            "command resumes"
        )

    def without_key(self, value: Any) -> Any:
        """JSON values with the key replaced in all texts."""
        if isinstance(value, str):
            return redacted(value, self._key)
        if isinstance(value, list):
            return [self.without_key(element) for element in value]
        if isinstance(value, dict):
            return {redacted(name, self._key): self.without_key(element) for name, element in value.items()}
        return value

    def _answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status 200 with the JSON value of the answer without the key, or another status with its text.

        Raises RecursionError for values that are nested deeply.
        """
        # A server on this machine may need no key.
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self._settings.timeout_seconds) as response:
                return 200, self.without_key(json.loads(response.read()))
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(errors="replace")

    def _shown(self, text: str) -> str:
        """A text of a server or a library for a message. The key is removed before the text is cut, so that
        no part of the key stays.
        """
        return one_line(redacted(" ".join(text.split()), self._key), _MOST_SHOWN_CHARACTERS)


def _key(variable: str) -> str | None:
    key = os.environ.get(variable, "").strip()
    if not key:
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise BadInput(
            f"{variable}: the key has a space, a line end or a letter beyond ASCII inside, which no header "
            "can hold; set it again"
        )
    return key


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        fp.close()
        raise BadInput(
            f"judge.endpoint: it redirects to another address (status {code}), and the key goes to "
            "judge.endpoint alone; name the final one"
        )


class _BoundedReader(io.RawIOBase):
    """The bytes of a socket until a deadline (of time.monotonic) and up to MOST_ANSWER_BYTES."""

    def __init__(self, raw: Any, wait: Callable[[float], None], deadline: float):
        self._raw, self._wait, self._deadline, self._left = raw, wait, deadline, MOST_ANSWER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A time limit of the socket is for one read. This deadline is for the whole answer.
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer was not complete within judge.timeout_seconds")
        self._wait(left)
        count = self._raw.readinto(buffer) or 0
        self._left -= count
        if self._left < 0:
            raise http.client.HTTPException(f"an answer of more than {MOST_ANSWER_BYTES:,} bytes")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: Any, *arguments: Any, deadline: float, **names: Any):
        super().__init__(sock, *arguments, **names)
        self.fp = io.BufferedReader(_BoundedReader(self.fp.detach(), sock.settimeout, deadline))


def _bounded(
    kind: type[http.client.HTTPConnection], seconds: float
) -> Callable[..., http.client.HTTPConnection]:
    def connect(*arguments: Any, **names: Any) -> http.client.HTTPConnection:
        connection = kind(*arguments, **names)
        response_class = partial(_BoundedResponse, deadline=time.monotonic() + seconds)
        connection.response_class = response_class  # type: ignore[assignment]
        return connection

    return connect


class _Http(urllib.request.HTTPHandler):
    def __init__(self, seconds: float):
        super().__init__()
        self._seconds = seconds

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_bounded(http.client.HTTPConnection, self._seconds), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, seconds: float):
        super().__init__()
        self._seconds = seconds

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_bounded(http.client.HTTPSConnection, self._seconds), req)
