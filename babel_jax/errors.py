"""Errors that end a command without being a fault of the program, and the one way for foreign text into a
message.
"""

import json
import os
import re
import urllib.parse

LONGEST_LINE = 2_000  # characters of a message
_LINE_ENDS = re.compile(r"[ \t]*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_LEAST_SECRET = 6  # characters; a shorter key would also match ordinary words
# Such as HF_TOKEN, AWS_SECRET_ACCESS_KEY and MY_PASSWORD, but not TOKENIZERS_PARALLELISM.
_SECRET_VARIABLE = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|KEY)(_|$)", re.IGNORECASE)
_SHOWN_AS: dict[str, str] = {}  # the name to show for a path that stands for something else
# Format characters that Persian, Hindi and other languages need; they have no effect on a terminal.
_JOINERS = "\u200c\u200d"


def show_as(path: str, name: str) -> None:
    """Gives a path another name in all messages and stored text: the URL of a bucket instead of its working
    copy.
    """
    _SHOWN_AS[path] = name


def shown(text: str) -> str:
    """Text in which paths have the names that `show_as` gave them, and no secret of the environment is left:
    a server may repeat a token in its answer.
    """
    for path, name in _SHOWN_AS.items():
        text = text.replace(path, name)
    for variable, value in os.environ.items():
        # A variable that ends in KEY may name the file of a key: a path is no secret.
        if _SECRET_VARIABLE.search(variable) and not value.startswith(("/", "~", ".")):
            text = redacted(text, value.strip())
    return text


def redacted(text: str, key: str | None) -> str:
    """A text in which [key] replaces the key, also in the forms that URLs, JSON and Python give it."""
    if not key or len(key) < _LEAST_SECRET or not text:
        return text
    # A server may give the key back in a URL, in JSON or in a Python error.
    forms = {
        key,
        urllib.parse.quote(key, safe=""),
        urllib.parse.quote_plus(key),
        json.dumps(key)[1:-1],
        repr(key)[1:-1],
    }
    for form in forms:
        text = text.replace(form, "[key]")
    return text


def printable(text: str) -> str:
    """Text without characters that control a terminal: control, bidirectional and unassigned ones are escaped
    as in Python's strings.

    Line ends and tabs stay. Example: the character ESC becomes the four characters backslash, x, 1, b.
    """
    if text.isprintable():
        return text
    return "".join(letter if _is_harmless(letter) else _escaped(letter) for letter in text)


def one_line(value: object, longest: int = LONGEST_LINE) -> str:
    """A value as one printable line of at most about `longest` characters; the middle of a longer one is left
    out.
    """
    text = str(value)
    if len(text) > longest:
        text = f"{text[: longest * 3 // 4]} ... {text[-(longest // 4) :]}"
    return printable(_LINE_ENDS.sub(" ", text.strip()).replace("\t", " "))


def json_printable(text: str) -> str:
    """JSON text (written without ensure_ascii) whose strings have no characters that control a terminal or
    that UTF-8 cannot encode.

    The escapes are JSON's, so its values do not change.
    """
    if text.isprintable():
        return text
    return "".join(letter if _is_harmless(letter) else _json_escaped(letter) for letter in text)


def _is_harmless(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\t" or letter in _JOINERS


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _json_escaped(letter: str) -> str:
    # JSON escapes UTF-16 code units, of two bytes each.
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[start] << 8 | units[start + 1]:04x}" for start in range(0, len(units), 2))


class BadInput(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do. Exit status
    2.

    The message may contain names and values from the input: characters that break the line or control a
    terminal are escaped here.
    """

    def __init__(self, message: object):
        super().__init__(one_line(shown(str(message))))


NOT_FINITE = (
    "the model's logits are not finite (NaN or infinite): its weights are damaged, or too large for the "
    "compute dtype; compute in float32, or give another model"
)


class InUse(BadInput):
    """Another process already works in the folder."""


class Preempted(BaseException):
    """SIGTERM: the machine is about to be taken away. The command stopped at a point from which it can be
    resumed. Exit status 0.

    Like KeyboardInterrupt, it is no Exception, so that an `except Exception` around damaged files does not
    catch it.
    """
