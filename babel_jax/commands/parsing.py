"""How arguments are read; each type raises argparse.ArgumentTypeError with what would be right."""

import argparse
from collections.abc import Callable
from typing import Any, Protocol

Result = dict[str, Any]
Run = Callable[[argparse.Namespace], Result]


class Commands(Protocol):
    """Declares a command and gives its parser; every command takes --json."""

    def __call__(self, name: str, run: Run, does: str, example: str) -> argparse.ArgumentParser: ...


def integers(text: str) -> list[int]:
    """Whole numbers: 14,16 to [14, 16]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as 14,16") from None


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def count(text: str) -> int:
    """A whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def steps(text: str) -> range:
    """Steps of a run: 10:13 to range(10, 13)."""
    first, _, end = text.partition(":")
    if not first.isdecimal() or not end.isdecimal() or int(first) >= int(end):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a range of steps, such as 10:13 for the steps 10, 11 and 12"
        )
    return range(int(first), int(end))


def seed(text: str) -> int:
    """A whole number that a seed can be."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def gib(text: str) -> float:
    """A positive number of GiB, finite in bytes too."""
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
    """Words: en,sw to ["en", "sw"]."""
    return [part.strip() for part in text.split(",") if part.strip()]
