"""The `babel` command: parses, calls, prints. Exit status 0 on success and on SIGTERM, 2 on bad input, 130 on Ctrl-C.

The commands stand in commands/. What one needs is imported when it runs, so that `babel --help` answers at once.
"""

import argparse
import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Iterator

from babel_jax import __version__, cluster
from babel_jax.commands import corpus, evaluation, models, pods, quality, report, runs, text
from babel_jax.commands.parsing import Run
from babel_jax.errors import BadInput, Preempted, json_printable, printable


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and gives its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 0
    try:
        with _log_shown():
            result = options.run(options)
    except BadInput as error:
        print(f"babel: {error}", file=sys.stderr)
        return cluster.leave(2)
    except KeyboardInterrupt:
        print("babel: interrupted; the same command goes on where this can be resumed", file=sys.stderr)
        return cluster.leave(130)
    except Preempted as stopped:
        result = {"preempted": True, "summary": f"{stopped}; resume with the same command"}
    except Exception as error:
        if not cluster.joined():
            raise
        if (lost := cluster.lost_process(error)) is not None:
            print(f"babel: {lost}", file=sys.stderr)
        else:
            traceback.print_exc()
        return cluster.leave(1)
    if not cluster.speaks():
        return 0
    if options.json:
        print(json_printable(json.dumps(result, ensure_ascii=False, allow_nan=False)))
    else:
        # Texts of models, servers and files are in it, and a terminal obeys control characters.
        print(printable(result.get("summary") or "\n".join(f"{key}: {value}" for key, value in result.items())))
    return 0


@contextlib.contextmanager
def _log_shown() -> Iterator[None]:
    """What the project logs goes to standard error, above any progress bar; of other packages only warnings do."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[shown])
    logging.getLogger("babel").setLevel(logging.INFO)
    with logging_redirect_tqdm():
        yield


class _Printable(logging.Formatter):
    """Log records without characters that a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="babel", description="Grow a pretrained decoder and train it on in 25 languages.")
    parser.add_argument("--version", action="version", version=f"babel-jax {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Run, does: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=does, description=does, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument("--json", action="store_true", help="print the result as one JSON object")
        made.set_defaults(run=run)
        return made

    for group in (runs, corpus, quality, models, evaluation, text, report, pods):
        group.declare(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
