"""Types of arguments, and options that several commands share. Each type raises argparse.ArgumentTypeError
with the valid form.
"""

import argparse
from collections.abc import Callable
from typing import Any, Protocol

Result = dict[str, Any]
Run = Callable[[argparse.Namespace], Result]


class Commands(Protocol):
    """Declares a command and returns its parser. Every command has --json.

    examples: shell lines for the help and the documentation. tests/test_examples.py runs each of them.
    resumes: after a stop, the same command continues with what is done; else it begins again.
    """

    def __call__(
        self, name: str, run: Run, does: str, *examples: str, resumes: bool = False
    ) -> argparse.ArgumentParser: ...


def add_config(parser: argparse.ArgumentParser, example: str = "seed=1") -> None:
    """Adds the argument CONFIG and the option --set; `example` is an override, for its help."""
    parser.add_argument("config", metavar="CONFIG")
    add_set(parser, f"override a setting, such as {example}")


def add_set(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Adds the option --set, which may be repeated."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_text)


def integers(text: str) -> list[int]:
    """Integers: 14,16 gives [14, 16]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as 14,16") from None


def positive(text: str) -> int:
    """An integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def count(text: str) -> int:
    """An integer of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def steps(text: str) -> range:
    """Steps of a run: 10:13 gives range(10, 13)."""
    first, _, end = text.partition(":")
    if not first.isdecimal() or not end.isdecimal() or int(first) >= int(end):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a range of steps, such as 10:13 for the steps 10, 11 and 12"
        )
    return range(int(first), int(end))


def seed(text: str) -> int:
    """An integer that can be a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def gib(text: str) -> float:
    """A positive number of GiB that is finite in bytes too."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number * 2**30 < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB, such as 4")
    return number


def percent(text: str) -> float:
    """A percentage of 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage of 0 or more, such as 0.5")
    return number


def words(text: str) -> list[str]:
    """Words: en,sw gives ["en", "sw"]."""
    return [part.strip() for part in text.split(",") if part.strip()]
