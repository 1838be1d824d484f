"""The data set of a benchmark: where its rows are, and what they must be."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Item = dict[str, Any]


def _as_it_is(row: Item) -> Item:
    return row


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The data set of a benchmark, and the checks of its rows.

    - hub: the data set on the hub
    - configs: its configuration for each of our languages
    - splits: the splits that are read; the first one is evaluated
    - keys: the keys of a row; the values of the keys in `texts` are texts
    - check: returns the first other error of a row, or None
    - normal: the row in today's form, from that of another revision
    """

    hub: str
    configs: Mapping[str, str]
    splits: tuple[str, ...]
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    check: Callable[[Item], str | None]
    normal: Callable[[Item], Item] = _as_it_is


def is_one_of(label: Any, count: int) -> bool:
    """True if a label is an int below `count`; 1.0 and true equal 1, but are no index."""
    return isinstance(label, int) and not isinstance(label, bool) and 0 <= label < count
