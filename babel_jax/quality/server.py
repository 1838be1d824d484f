"""An OpenAI-compatible server and its key: one place that sends the key, and one that keeps it out of
everything that is written.

A request goes to the configured address alone: a redirect is an error, as the key would go with it. An answer
has a total deadline and a size, also where a server sends a byte now and then.
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
from babel_jax.errors import BadInput, one_line

MOST_ANSWER_BYTES = 4 * 2**20  # of status line, headers and body together
_SAID_CHARACTERS = 300  # of a server's own words in a message
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
# It is too long, or a filter stops it; where many in a row get these, it is not for the prompts.
_OF_ONE_PROMPT = (
    400,
    413,
    422,
)
_FIRST_PAUSE_SECONDS = 1.0
_LEAST_SECRET = 6  # characters; a shorter key would be found in ordinary words


class Server:
    """The chat completions of one endpoint."""

    def __init__(self, settings: JudgeSettings):
        """Raises BadInput for a key that no header can hold. The key is not in the message."""
        self._settings = settings
        self._key = _key(settings.key_variable)
        self._url = f"{(settings.endpoint or '').rstrip('/')}/chat/completions"
        self.url = redacted(self._url, self._key)  # for messages
        self._opener = urllib.request.build_opener(
            _NoRedirects(), _Http(settings.timeout_seconds), _Https(settings.timeout_seconds)
        )

    def post(self, body: dict[str, Any]) -> tuple[int, Any]:
        """The server's status and answer, without the key; asked again, after pauses that double, where it
        was busy or did not answer.

        Raises BadInput for any status but 200 and those of one prompt, and for what is no answer.
        """
        problem = ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                status, answer = self._answer(body)
            except BadInput:
                raise
            except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
                problem = self._words(str(error) or type(error).__name__)
                continue
            if status == 200:
                return status, self.without_key(answer)
            said = self._words(answer)
            if status in _OF_ONE_PROMPT:
                return status, said
            problem = f"status {status}: {said}"
            if status not in _RETRIED:
                break
        raise BadInput(
            f"judge.endpoint: {self.url} does not serve ({problem}); what was answered is kept, and the "
            "same command goes on"
        )

    def without_key(self, value: Any) -> Any:
        """JSON values with the key replaced wherever a text has it."""
        if isinstance(value, str):
            return redacted(value, self._key)
        if isinstance(value, list):
            return [self.without_key(one) for one in value]
        if isinstance(value, dict):
            return {redacted(name, self._key): self.without_key(one) for name, one in value.items()}
        return value

    def _answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        """The status with the JSON value of a 200, or the words of another status."""
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self._settings.timeout_seconds) as response:
                return 200, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(errors="replace")

    def _words(self, text: str) -> str:
        """A server's or library's words for a message: the key goes before they are cut, so that no part of
        it stays.
        """
        return one_line(redacted(" ".join(text.split()), self._key), _SAID_CHARACTERS)


def redacted(text: str, key: str | None) -> str:
    """A text in which the key, also as it is written in URLs, in JSON and in Python, is replaced by [key]."""
    if not key or len(key) < _LEAST_SECRET:
        return text
    for form in {
        key,
        urllib.parse.quote(key, safe=""),
        urllib.parse.quote_plus(key),
        json.dumps(key)[1:-1],
        repr(key)[1:-1],
    }:
        text = text.replace(form, "[key]")
    return text


def _key(variable: str) -> str | None:
    key = os.environ.get(variable, "").strip()
    if not key:
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise BadInput(
            f"{variable}: the key has a space, a line end or a letter beyond ASCII inside, which no header "
            "can hold; set it anew"
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
    """What a socket gives until a moment (of time.monotonic) and up to MOST_ANSWER_BYTES."""

    def __init__(self, raw: Any, wait: Callable[[float], None], deadline: float):
        self._raw, self._wait, self._deadline, self._left = raw, wait, deadline, MOST_ANSWER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
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
        self.fp = io.BufferedReader(_BoundedReader(self.fp.detach(), sock.settimeout, deadline))  # type: ignore[attr-defined]


def _bounded(
    kind: type[http.client.HTTPConnection], seconds: float
) -> Callable[..., http.client.HTTPConnection]:
    def connect(*arguments: Any, **names: Any) -> http.client.HTTPConnection:
        connection = kind(*arguments, **names)
        connection.response_class = partial(_BoundedResponse, deadline=time.monotonic() + seconds)  # type: ignore[assignment]
        return connection

    return connect


class _Http(urllib.request.HTTPHandler):
    def __init__(self, seconds: float):
        super().__init__()
        self._seconds = seconds

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_bounded(http.client.HTTPConnection, self._seconds), req)  # type: ignore[arg-type]


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, seconds: float):
        super().__init__()
        self._seconds = seconds

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_bounded(http.client.HTTPSConnection, self._seconds), req)  # type: ignore[arg-type]
