"""JSON text of strangers: bounded, and refused where readers differ in what it means."""

import json
import math
import re
from typing import Any

from babel_jax.errors import BadInput, one_line

MOST_DEPTH = 200  # nested lists and objects of a JSON value


MOST_DIGITS = 100  # of a whole number in JSON; transformers itself writes one of 31 digits (model_max_length)


def parse_json(text: str | bytes, where: str, unique_keys: bool = True) -> Any:
    """The value of JSON text; `where` (a path, or a path and line) begins messages.

    Raises BadInput for text that is not JSON (NaN and Infinity are not), numbers beyond float64 or
    MOST_DIGITS, more than MOST_DEPTH nested values, and half of a surrogate pair, which UTF-8 cannot encode.
    With `unique_keys` also for a key that an object has twice: readers differ in which of the two values they
    take.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        # With hooks, a vocabulary of 150,000 tokens takes seconds. So the hooks of numbers are used only if
        # the text may have a number that needs them.
        large = _MAYBE_LARGE.search(text) is not None
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys if unique_keys else None,
            parse_constant=_no_constant,
            parse_float=_finite if large else None,
            parse_int=_moderate if large else None,
        )
        _check_depth(value)
        if _MAYBE_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise BadInput(
            f"{where}: not a readable JSON file: more than {MOST_DEPTH} values nested in each other"
        ) from None
    except ValueError as error:
        raise BadInput(f"{where}: not a readable JSON file: {one_line(error, 300)}") from None
    return value


_MAYBE_LARGE = re.compile(rf"[0-9]{{{MOST_DIGITS}}}|[0-9][eE]\+?[0-9]{{3}}")


_MAYBE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The usual case costs one comparison: a search for the key comes only if there is one.
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} is there more than once; keep the one that holds")
        seen.add(key)
    raise AssertionError("there are fewer keys than pairs")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {one_line(digits, 40)} is beyond float64")
    return value


def _moderate(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; at most {MOST_DIGITS} are read")
    return int(digits)


def _check_depth(value: Any) -> None:
    # Level by level, without recursion: the number of levels is the depth.
    level = [value]
    for _ in range(MOST_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.values()
            elif isinstance(one, list):
                below += one
        if not below:
            return
        level = [one for one in below if isinstance(one, dict | list)]
    raise RecursionError
