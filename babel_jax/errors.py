"""Errors that end a command and are no fault of the program, and the one way in which foreign text gets into
a message.
"""

import re

LONGEST_LINE = 2_000  # characters of a message
_LINE_ENDS = re.compile(r"[ \t]*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_SHOWN_AS: dict[str, str] = {}  # of paths that stand for something else
# format characters that Persian, Hindi and others need, and that move nothing on a terminal
_JOINERS = "\u200c\u200d"


def show_as(path: str, name: str) -> None:
    """Names a path otherwise in all that is told and kept: the URL of a bucket in place of its working copy
    here.
    """
    _SHOWN_AS[path] = name


def shown(text: str) -> str:
    """Text with paths named as `show_as` says."""
    for path, name in _SHOWN_AS.items():
        text = text.replace(path, name)
    return text


def printable(text: str) -> str:
    """Text without characters that a terminal obeys: control, bidirectional and unassigned ones are escaped
    as in Python's strings.

    Line ends and tabs stay. Example: the character ESC is given as the four characters backslash, x, 1, b.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in "\n\t" or one in _JOINERS else _escaped(one) for one in text
    )


def one_line(value: object, longest: int = LONGEST_LINE) -> str:
    """A value as one printable line of at most about `longest` characters; of a longer one its begin and its
    end are given.
    """
    text = str(value)
    if len(text) > longest:
        text = f"{text[: longest * 3 // 4]} ... {text[-(longest // 4) :]}"
    return printable(_LINE_ENDS.sub(" ", text.strip()).replace("\t", " "))


def json_printable(text: str) -> str:
    """JSON text (written without ensure_ascii) in which strings have no characters that a terminal obeys or
    that UTF-8 cannot hold.

    The escapes are JSON's, so its values stay the same.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in "\n\t" or one in _JOINERS else _json_escaped(one) for one in text
    )


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode("ascii")


def _json_escaped(one: str) -> str:
    units = one.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place] << 8 | units[place + 1]:04x}" for place in range(0, len(units), 2))


class BadInput(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do about it. Exit
    status 2.

    The message may hold names and values as the input has them: what would break the line or reach a terminal
    is escaped here.
    """

    def __init__(self, message: object):
        super().__init__(one_line(shown(str(message))))


class InUse(BadInput):
    """Another process is at work where this one was about to be."""


class Preempted(BaseException):
    """SIGTERM: the machine is about to be taken away, and the command stopped where it can be resumed. Exit
    status 0.

    As KeyboardInterrupt, it is nothing that an `except Exception` around damaged files may take for their
    fault.
    """
