"""The parser of `babel`: all commands, in groups."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from babel_jax import __version__
from babel_jax.commands import (
    corpus,
    evaluation,
    models,
    pods,
    quality,
    report,
    runs,
    shells,
    text,
    tokenizer,
    verify,
)
from babel_jax.commands.parsing import Run
from babel_jax.errors import one_line

# The commands in the order in which a user meets them, for `babel --help` and the documentation.
GROUPS = {
    "begin": ("demo", "init"),
    "text": ("catalogue", "prepare", "mixture", "statistics", "judge", "classifier", "score"),
    "models": ("convert", "expand", "tokenizer report", "tokenizer extend", "sensitivity", "ablate"),
    "training": ("train", "sft", "watch", "status", "report"),
    "trained models": ("evaluate", "generate", "chat", "push"),
    "before a run": ("plan", "rehearse", "tune"),
    "more": ("verify", "completion"),
}
_NAME_WIDTH = 18  # characters of the column of names in `babel --help`
# argparse's message about a command that does not exist.
_NO_COMMAND = re.compile(r"argument COMMAND: invalid choice: '(?P<name>[^']*)' \(choose from (?P<names>.*)\)")


class _OneLineParser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line, as all other bad input is answered."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2. argparse would print all options before the message."""
        if unknown := _NO_COMMAND.match(message):
            names = re.findall(r"[\w-]+", unknown["names"])
            message = f"no command is named {unknown['name']!r}{_near(unknown['name'], names)}"
        self.exit(2, f"babel: {one_line(message)}; see `{self.prog} --help`\n")


class CommandParser(_OneLineParser):
    """The parser of one command, with what it does and its tested examples."""

    does: str
    examples: tuple[str, ...]


class BabelParser(_OneLineParser):
    """The parser of `babel`. Its help lists the commands in groups, which argparse cannot do."""

    def __init__(self) -> None:
        super().__init__(
            prog="babel",
            usage="babel COMMAND ...",
            description="Grow a pretrained decoder and train it on in your languages.",
            epilog="babel COMMAND --help shows the options of a command, with examples.",
        )
        self.commands: dict[str, CommandParser] = {}
        self._below: dict[str, argparse._SubParsersAction[Any]] = {}
        self.add_argument("--version", action="version", version=f"babel-jax {__version__}")
        self.set_defaults(run=None)
        self._subparsers_action = self.add_subparsers(
            metavar="COMMAND", prog="babel", parser_class=CommandParser
        )
        # Each file of commands imports JAX and the like within its functions alone: `babel --help` must take
        # under 0.1 s, and builds all parsers.
        for subject in (runs, corpus, quality, models, tokenizer, evaluation, text, report, pods, verify):
            subject.declare(self._declare)
        shells.declare(self._declare, self)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The options. What a command does not know ends the program with status 2 and one line, which has
        the option with a similar name.
        """
        options, unknown = self.parse_known_args(args, namespace)
        # argparse would answer with the usage of `babel`; the parser of the command knows its own options.
        if unknown:
            parser = self.commands[options.command]
            name = unknown[0].partition("=")[0]
            if name.startswith("-"):
                known = [option for action in parser._actions for option in action.option_strings]
                parser.error(f"no option is named {name}{_near(name, known)}")
            hint = f"; each setting has a --set of its own: --set {unknown[0]}" if "=" in unknown[0] else ""
            parser.error(f"one argument too many: {unknown[0]}{hint}")
        return options

    def _declare(
        self, name: str, run: Run, does: str, *examples: str, resumes: bool = False
    ) -> argparse.ArgumentParser:
        action, last_word = self._place_of(name)
        made: CommandParser = action.add_parser(
            last_word,
            help=does,
            description=does,
            epilog="\n  ".join(["examples:", *examples]) if len(examples) > 1 else f"example: {examples[0]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="print the result as one JSON object")
        made.set_defaults(run=run, resumes=resumes, command=name)
        made.does, made.examples = does, examples
        self.commands[name] = made
        return made

    def _place_of(self, name: str) -> "tuple[argparse._SubParsersAction[Any], str]":
        """The action that takes the last word of a name: `tokenizer report` is below `tokenizer`."""
        group, _, last_word = name.rpartition(" ")
        if not group:
            return self._subparsers_action, name
        if group not in self._below:
            parser = self._subparsers_action.add_parser(group, help=f"see babel {group} --help")
            self._below[group] = parser.add_subparsers(
                metavar="COMMAND", prog=f"babel {group}", parser_class=CommandParser, required=True
            )
        return self._below[group], last_word

    def format_help(self) -> str:
        """The usage, the commands in groups, and the options."""
        parts = [self.format_usage().rstrip("\n"), self.description or ""]
        for title, names in GROUPS.items():
            rows = "\n".join(f"  {name:{_NAME_WIDTH}}{self.commands[name].does}" for name in names)
            parts.append(f"{title}:\n{rows}")
        parts.append("options:\n  -h, --help    show this help\n  --version     show the version")
        return "\n\n".join([*parts, self.epilog or ""]) + "\n"


def _near(name: str, names: Iterable[str]) -> str:
    """The names that are similar, as the end of a message."""
    similar = difflib.get_close_matches(name, names, n=2, cutoff=0.7)
    return f"; near: {', '.join(similar)}" if similar else ""
