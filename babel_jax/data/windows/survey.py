"""Decides for each row of a language, before anything is written, if it is training text, held-out text or
left out.
"""

import dataclasses
import hashlib
import heapq
import itertools
from collections.abc import Iterable, Iterator

from babel_jax.data.sources.rows import Row
from babel_jax.draws import Purpose, unit_draw
from babel_jax.errors import BadInput

_LEFT_OUT = 0


@dataclasses.dataclass(frozen=True)
class Survey:
    """The decision for each row of a language.

    - fates: one byte a row, in reading order: 0 is left out, n is training text of `kinds[n - 1]`
    - heldout: sorted by the hashes of the ids, so that parallel rows have the same order in every language
    - duplicates: the number of rows whose text an earlier row has
    - overlaps: the number of training rows whose text is also held out
    - reserved: the number of rows that were chosen after the held-out text had `heldout_bytes`; they are left
      out, because the row may be held out in another language
    """

    kinds: tuple[str, ...]
    fates: bytearray
    heldout: tuple[Row, ...]
    duplicates: int
    overlaps: int
    reserved: int

    @property
    def documents(self) -> dict[str, int]:
        """The number of training rows of each kind; kinds without any are left out."""
        # 0 is left out, so kinds count from 1.
        counts = {kind: self.fates.count(number) for number, kind in enumerate(self.kinds, 1)}
        return {kind: count for kind, count in counts.items() if count}

    def training_rows(self, rows: Iterable[Row], kind: str) -> Iterator[Row]:
        """The training rows of one kind, chosen from the same rows read a second time.

        Raises BadInput if the second reading has more or fewer rows than the first.
        """
        # The two readings go side by side: a row more or fewer is a changed file.
        wanted = self.kinds.index(kind) + 1
        for row, fate in itertools.zip_longest(rows, self.fates):
            if row is None or fate is None:
                raise BadInput(
                    f"the text of kind {kind} changed between its first and its second reading; run `babel "
                    "prepare` again"
                )
            if fate == wanted:
                yield row


def survey(
    rows: Iterable[Row], heldout_fraction: float, heldout_bytes: int, are_distinct: bool = False
) -> Survey:
    """Chooses held-out rows by the hash of a row's id alone, so that a parallel row is chosen in every
    language.

    Of the chosen rows, those with the lowest hashes become the held-out text, until it has `heldout_bytes` of
    UTF-8. If the fraction chooses none of several rows, the row with the lowest hash is taken. Memory: a
    digest for each row, and the held-out text; if the rows `are_distinct` (deduplication made them so), one
    byte for each row.
    """
    kinds: dict[str, int] = {}
    fates = bytearray()
    first_seen: dict[bytes, int] = {}
    heldout = _Lowest(heldout_bytes)
    heldout_texts: set[bytes] = set()
    lowest: tuple[float, int, Row] | None = None
    duplicates = training = 0
    for number, row in enumerate(rows):
        # The id alone decides: the translation of a held-out row is held out too.
        draw = unit_draw(Purpose.HELDOUT, row.id)
        # Texts that are distinct already need no digest: the row's number stands for the text.
        text = number.to_bytes(8, "big") if are_distinct else _digest(row.text)
        fates.append(_LEFT_OUT)
        is_heldout = draw < heldout_fraction

        # The first row of a text counts. Held-out and training texts are compared with each other at the end.
        if text in (heldout_texts if is_heldout else first_seen):
            duplicates += 1
        elif is_heldout:
            heldout_texts.add(text)
            heldout.add(draw, number, row)
        else:
            training += 1
            if not are_distinct:
                first_seen[text] = number
            fates[number] = kinds.setdefault(row.kind, len(kinds) + 1)
            if lowest is None or (draw, number) < lowest[:2]:
                lowest = draw, number, row

    # A small language may have no chosen row: its lowest row is held out, if another one is left to train on.
    if heldout_fraction > 0 and not heldout_texts and lowest is not None and training > 1:
        heldout.add(*lowest)
        fates[lowest[1]] = _LEFT_OUT

    # The text of a training row may be chosen later under another id.
    overlaps = [first_seen[text] for text in heldout_texts & first_seen.keys()]
    for number in overlaps:
        fates[number] = _LEFT_OUT
    heldout_rows = heldout.rows()
    return Survey(
        kinds=tuple(kinds),
        fates=fates,
        heldout=heldout_rows,
        duplicates=duplicates,
        overlaps=len(overlaps),
        reserved=max(0, len(heldout_texts) - len(heldout_rows)),
    )


class _Lowest:
    """The rows with the lowest hashes: as few as reach `wanted` bytes of text, or all."""

    def __init__(self, wanted: int):
        self._wanted, self._size = wanted, 0
        # (-draw, -row number, bytes, row): heapq removes the smallest, so the highest draw leaves first.
        self._heap: list[tuple[float, int, int, Row]] = []

    def add(self, draw: float, number: int, row: Row) -> None:
        # The highest draws leave as soon as the rest has enough text.
        size = len(row.text.encode())
        heapq.heappush(self._heap, (-draw, -number, size, row))
        self._size += size
        while self._size - self._heap[0][2] >= self._wanted:
            self._size -= heapq.heappop(self._heap)[2]

    def rows(self) -> tuple[Row, ...]:
        return tuple(row for *_, row in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1])))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
