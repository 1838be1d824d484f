"""Waiting for a hub that is busy (429) or out of order (5xx), as long as it says; its errors in one line."""

import contextlib
import difflib
import functools
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from babel_jax.errors import BadInput, one_line

log = logging.getLogger("babel")

T = TypeVar("T")

# A hub that is busy is waited for so long, counted from its last good answer.
MOST_SECONDS_BUSY = 3600.0
# A hub that cannot be reached: before its first answer, and later.
MOST_SECONDS_UNREACHED = (10.0, 600.0)
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0  # unless the hub says more
_SECONDS_BETWEEN_LOOKS = 1.0
_SAID_FROM_SECONDS = 3.0  # shorter waits are not worth a line
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_NEAR = 3  # names in a message
_SEARCHED = 50  # names that are compared

_answered = False  # the hub has answered this process before
_sleep: Callable[[float], None] = time.sleep
_clock: Callable[[], float] = time.monotonic


def patiently(operation: Callable[[], T], what: str, progress: Callable[[], object] = lambda: None) -> T:
    """The result of an operation on the hub, which is repeated while the hub is busy or cannot be reached.

    The wait is the hub's own (Retry-After, RateLimit), else it doubles, with a random part, so that many
    clients do not come back at once. progress: a value that changes when the operation gets on, such as the
    bytes that came; the time to give up counts from its last change. It may raise an error to end a wait.
    Raises BadInput, which names `what`, if the hub stays busy; other errors as they come.
    """
    global _answered
    _log_as_ours()
    since, known, attempt = _clock(), progress(), 0
    while True:
        try:
            result = operation()
            _answered = True
            return result
        except Exception as error:
            # Bytes came since the last try, so the hub is not out of order: all counts begin anew.
            if progress() != known:
                since, known, attempt = _clock(), progress(), 0
            reason, most = _why_to_wait(error)
            if reason is None:
                raise
            wait = _asked_wait(error)
            if wait is None:
                wait = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0**attempt)
            wait *= random.uniform(1.0, 1.25)
            waited = _clock() - since
            if waited + wait > most:
                if most < MOST_SECONDS_BUSY:
                    # Who cannot reach the hub is told so by `explained`.
                    raise
                raise BadInput(
                    f"{what}: the hub has answered {reason} for {waited / 60:.0f} minutes; run the same "
                    "command later, which resumes; a key in HF_TOKEN raises the limit"
                ) from error
            if wait >= _SAID_FROM_SECONDS:
                log.warning("%s: the hub answers %s; next try in %.0f s", what, reason, wait)
            attempt += 1
            # In short sleeps, so that a stop need not wait for a long pause.
            until = _clock() + wait
            while (left := until - _clock()) > 0:
                _sleep(min(left, _SECONDS_BETWEEN_LOOKS))
                progress()


@functools.cache
def _log_as_ours() -> None:
    """Sends the log of huggingface_hub to ours alone: its own handler would show each line a second time, and
    the keys in addresses.
    """
    import huggingface_hub  # noqa: F401 - it adds its handler when it is imported

    logger = logging.getLogger("huggingface_hub")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


def _why_to_wait(error: Exception) -> tuple[str | None, float]:
    """The reason to repeat after an error, and the most seconds to do so; None if there is no use in it."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if status in _BUSY:
        return ("429 (too many requests)" if status == 429 else str(status)), MOST_SECONDS_BUSY
    if isinstance(error, httpx2.TransportError) and not isinstance(error, OfflineModeIsEnabled):
        return f"nothing ({type(error).__name__})", MOST_SECONDS_UNREACHED[_answered]
    return None, 0.0


def _status(error: BaseException | None) -> int | None:
    """The status of the answer that an error is about; errors of huggingface_hub may wrap it."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _asked_wait(error: Exception) -> float | None:
    """The seconds that the hub asks to wait."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    response = getattr(error, "response", None)
    if response is None:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    text = response.headers.get("Retry-After", "").strip()
    return float(text) + 1.0 if text.isdigit() else None


@contextlib.contextmanager
def explained(repo: str, kind: str = "model", revision: str | None = None) -> Iterator[None]:
    """Turns errors of the hub and its clients into BadInput: what is wrong with `repo`, and what to do.

    kind: "model" or "dataset".
    """
    import httpx2
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    try:
        yield
    except (BadInput, errors.RevisionNotFoundError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{repo}: has no revision {revision or 'main'!r}{_revisions(repo, kind)}") from error
    except errors.GatedRepoError as error:
        status = _status(error)
        todo = (
            "log in, accept its terms at"
            if status == 401
            else "the account of HF_TOKEN has no access; ask at"
        )
        raise BadInput(
            f"{repo}: this {kind} is gated: {todo} {page}"
            + (", and set HF_TOKEN to a key of that account" if status == 401 else "")
        ) from error
    except errors.RepositoryNotFoundError as error:
        here = "no folder of this name here, and " if kind == "model" else ""
        raise BadInput(
            f"{repo}: {here}no such {kind} on the hub, or a private one (then set HF_TOKEN)"
            f"{_near(repo, kind)}"
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise BadInput(_unreached(repo, error)) from error
        raise BadInput(f"{page}: {one_line(error, 200)}") from error
    except (errors.RevisionResolutionError, errors.OfflineModeIsEnabled, httpx2.TransportError) as error:
        raise BadInput(_unreached(repo, error)) from error
    except errors.HfHubHTTPError as error:
        if _status(error) == 401:
            raise BadInput(
                f"{repo}: the hub does not know the key in HF_TOKEN (or that of `hf auth login`); make a "
                f"new one at {constants.ENDPOINT}/settings/tokens"
            ) from error
        raise BadInput(f"{repo}: the hub refuses: {one_line(error, 300)}") from error


def _unreached(repo: str, error: Exception) -> str:
    from huggingface_hub import constants

    where = f"and {constants.HF_HUB_CACHE} (HF_HOME) does not have all of it"
    if constants.is_offline_mode():
        return f"{repo}: HF_HUB_OFFLINE is set, {where}; unset it, or fetch it on a machine with a network"
    # The innermost error names the reason, such as a host name that is not known.
    cause: BaseException | None = error
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    reason = re.sub(r"https?://\S+", "", one_line(cause, 200)).strip() or type(error).__name__
    return (
        f"{repo}: the hub at {constants.ENDPOINT} cannot be reached ({reason}), {where}; the same command "
        "resumes when there is a network"
    )


def _near(repo: str, kind: str) -> str:
    """Names on the hub that are nearly the same: `; near: A, B`. Empty if there are none."""
    found: list[str] = []
    owner, name = repo.split("/", 1)
    with contextlib.suppress(Exception):  # only a help: no error in it may hide the first one
        for options in ({"search": name}, {"author": owner}, {"search": re.split(r"[-_.]", name)[0]}):
            found += [entry.id for entry in _lister(kind)(limit=_SEARCHED, **options)]
    near = difflib.get_close_matches(repo, dict.fromkeys(found), n=_NEAR, cutoff=0.6)
    return f"; near: {', '.join(near)}" if near else "; check the name"


def _lister(kind: str) -> Callable[..., Any]:
    from huggingface_hub import HfApi

    return HfApi().list_models if kind == "model" else HfApi().list_datasets


def _revisions(repo: str, kind: str) -> str:
    from huggingface_hub import HfApi

    names: list[str] = []
    with contextlib.suppress(Exception):
        refs = HfApi().list_repo_refs(repo, repo_type=kind)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f"; it has {', '.join(names[:20])}" if names else "; check the name of the branch, tag or commit"
