"""The `babel` command: parses, calls, prints. Exit status 0 on success and on SIGTERM, 1 where a check finds
something, 2 on bad input, 130 on Ctrl-C.

The commands are in commands/. The code of a command is imported when it runs, so that `babel --help` is
quick.
"""

import contextlib
import errno
import gc
import json
import logging
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import TextIO

from babel_jax.commands.parser import BabelParser
from babel_jax.disk_errors import os_error_line
from babel_jax.distributed import cluster
from babel_jax.distributed.signals import INTERRUPTED, end_now, interruptible, say, stopped_in
from babel_jax.errors import BadInput, Preempted, json_printable, one_line, printable, shown
from babel_jax.hardware import without_accelerator
from babel_jax.sending import settle_all

# TensorStore prints this once for each unfinished write after another one has failed.
_CLOSED_LOOP = "Event loop is closed"
_OBJECTS_BETWEEN_COLLECTIONS = 10_000
_READERLESS = 141  # exit status, as in shells: 128 + SIGPIPE


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    try:
        with interruptible():
            try:
                return _main(arguments)
            except KeyboardInterrupt:
                return _failed(INTERRUPTED, _stopped("", resumes=False))
    finally:
        # Only Python's own end follows; another Ctrl-C would print tracebacks there.
        if arguments is None:
            signal.signal(signal.SIGINT, end_now)
        # Flushes the output of argparse.
        _print("", sys.stdout)


def _main(arguments: list[str] | None) -> int:
    parser = BabelParser()
    options = parser.parse_args(arguments)
    if options.run is None:
        return _print(parser.format_help(), sys.stdout)
    # Without a TPU, libtpu would print warnings when JAX looks for one.
    if without_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # After each 700 new objects Python looks for cycles: an eighth of the time of the imports.
    if arguments is None:
        gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        with _log_shown():
            result = options.run(options)
            settle_all()
    except BadInput as error:
        return _failed(2, str(error))
    except KeyboardInterrupt as interrupt:
        return _failed(INTERRUPTED, _stopped(str(interrupt), options.resumes))
    except Preempted as stopped:
        result = {"preempted": True, "summary": f"{stopped}; the same command resumes"}
    # From here on the error is no message for the user: a reason is looked for, else it is a fault of ours.
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout):
            return _print("", sys.stdout) or _READERLESS
        reason = os_error_line(error)
        if isinstance(error, MemoryError):
            reason = (
                f"not enough memory ({one_line(error, 200) or 'of this machine'}); use a smaller model or "
                "batch, or a larger machine"
            )
        if reason is not None:
            return _failed(2, reason)
        # One process: Python shows the traceback. Of several processes, one must not leave the others
        # waiting.
        if not cluster.joined():
            raise
        if (lost := cluster.lost_process(error)) is not None:
            return _failed(1, lost)
        cluster.begin_to_leave()
        traceback.print_exc()
        return cluster.leave(1, one_line(error) or type(error).__name__)
    # A finding that a script shall see, such as a corpus that has changed.
    status = int(result.pop("exit_status", 0))
    if not cluster.speaks():
        return status
    if options.json:
        text = json_printable(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return _print(text + "\n", sys.stdout) or status
    # The result has text of models, servers and files, whose control characters must not reach a terminal.
    text = printable(result.get("summary") or "\n".join(f"{key}: {value}" for key, value in result.items()))
    return _print(text + "\n", sys.stdout) or status


def _stopped(saved: str, resumes: bool) -> str:
    """The message after Ctrl-C: `saved step 9 of 40; the same command resumes`."""
    where = f" in {stopped_in()}" if stopped_in() else ""
    return f"{saved or f'stopped{where}'}; the same command {'resumes' if resumes else 'begins again'}"


def _failed(status: int, line: str) -> int:
    """Prints why the command failed, in one line, and returns the exit status. Other processes end too."""
    cluster.begin_to_leave()
    _print(f"babel: {line}\n", sys.stderr)
    return cluster.leave(status, line)


def _print(text: str, stream: TextIO) -> int:
    """Writes text at once and returns the exit status.

    If nobody reads the stream any more (`| head`, a closed terminal), the text is dropped.
    """
    # Paths of working copies become URLs, and secrets of the environment are removed.
    text = shown(text)
    try:
        stream.write(text)
        stream.flush()
        return 0
    except OSError as error:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.suppress(OSError, ValueError):
            # Python's own flush at the end must not fail again.
            os.dup2(nowhere.fileno(), stream.fileno())
        if error.errno in (errno.EPIPE, errno.EIO):
            return 0
        say(f"babel: standard output: {error.strerror}; the command itself is done")
        return 2


def _nobody_reads(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))


@contextlib.contextmanager
def _log_shown() -> Iterator[None]:
    """Shows the project's log on standard error, above any progress bar; other packages show only
    warnings.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[shown])
    logging.getLogger("babel").setLevel(logging.INFO)
    with logging_redirect_tqdm(), _errors_told_once():
        yield


@contextlib.contextmanager
def _errors_told_once() -> Iterator[None]:
    """Hides the tracebacks that Orbax logs from its threads, clients of buckets log from theirs, and
    TensorStore prints from its callbacks, before the same error is raised and shown as one line.
    """
    from absl import logging as absl

    loggers = (absl.get_absl_logger(), logging.getLogger("gcsfs"), logging.getLogger("s3fs"))

    def is_no_error(record: logging.LogRecord) -> bool:
        # Orbax looks for a file that our checkpoints do not need.
        looks = record.getMessage().startswith("Metadata file does not exist")
        return record.levelno < logging.ERROR and not looks

    # The same errors come a second time as exceptions, which are shown as one line.
    hook = sys.unraisablehook
    for logger in loggers:
        logger.addFilter(is_no_error)
    sys.unraisablehook = lambda unraisable: (
        None if str(unraisable.exc_value) == _CLOSED_LOOP else hook(unraisable)
    )
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(is_no_error)


class _Printable(logging.Formatter):
    """Log records without characters that control a terminal, and without what follows ? in an address: it
    may be a key, as in signed addresses of the hub's storage.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = re.sub(r"(https?://[^\s?]+)\?[^\s'\"]+", r"\1", super().format(record))
        return printable(shown(text))


if __name__ == "__main__":
    sys.exit(main())
