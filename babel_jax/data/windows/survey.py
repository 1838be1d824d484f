"""What becomes of each row of a language, decided before anything is written: trained on, held out, or left
out.
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
    """The fate of a language's rows. `fates` holds a byte a row in reading order: 0 is left out, n is
    training text of `kinds[n - 1]`.

    `heldout` is in the order of the hashes of the ids, so that parallel rows stand in the same order in every
    language. `duplicates` counts rows whose text stood in an earlier one, `overlaps` training rows whose text
    is also held out, `reserved` rows that were chosen beyond the wanted bytes of held-out text: they are left
    out, since the row may be held out in another language.
    """

    kinds: tuple[str, ...]
    fates: bytearray
    heldout: tuple[Row, ...]
    duplicates: int
    overlaps: int
    reserved: int

    @property
    def documents(self) -> dict[str, int]:
        """Training rows of each kind that has any."""
        counts = {kind: self.fates.count(number) for number, kind in enumerate(self.kinds, 1)}
        return {kind: count for kind, count in counts.items() if count}

    def training_rows(self, rows: Iterable[Row], kind: str) -> Iterator[Row]:
        """Of the same rows, read again, those to train on for one kind.

        Raises BadInput when there are not as many rows as before.
        """
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
    """Chooses held-out rows by the hash of a row's id alone, so that the same parallel row is chosen in every
    language.

    Of the chosen rows those with the lowest hashes become the held-out text, until it has `heldout_bytes` of
    UTF-8; where the fraction chooses none of several rows, the one with the lowest hash is taken. Memory: a
    digest for each row, and the held-out text; of rows that `are_distinct`, as deduplication leaves them, a
    byte for each.
    """
    kinds: dict[str, int] = {}
    fates = bytearray()
    first_seen: dict[bytes, int] = {}
    heldout = _Lowest(heldout_bytes)
    heldout_texts: set[bytes] = set()
    lowest: tuple[float, int, Row] | None = None
    duplicates = training = 0
    for number, row in enumerate(rows):
        place = unit_draw(Purpose.HELDOUT, row.id)
        text = number.to_bytes(8, "big") if are_distinct else _digest(row.text)
        fates.append(_LEFT_OUT)
        is_heldout = place < heldout_fraction
        if text in (heldout_texts if is_heldout else first_seen):
            duplicates += 1
        elif is_heldout:
            heldout_texts.add(text)
            heldout.add(place, number, row)
        else:
            training += 1
            if not are_distinct:
                first_seen[text] = number
            fates[number] = kinds.setdefault(row.kind, len(kinds) + 1)
            if lowest is None or (place, number) < lowest[:2]:
                lowest = place, number, row
    if heldout_fraction > 0 and not heldout_texts and lowest is not None and training > 1:
        heldout.add(*lowest)
        fates[lowest[1]] = _LEFT_OUT
    overlaps = [first_seen[text] for text in heldout_texts & first_seen.keys()]
    for number in overlaps:
        fates[number] = _LEFT_OUT
    return Survey(
        tuple(kinds),
        fates,
        heldout.rows(),
        duplicates,
        len(overlaps),
        max(0, len(heldout_texts) - len(heldout.rows())),
    )


class _Lowest:
    """Rows with the lowest hashes: as few as reach `wanted` bytes of text, or all."""

    def __init__(self, wanted: int):
        self._wanted, self._size = wanted, 0
        self._heap: list[
            tuple[float, int, int, Row]
        ] = []  # negated, so that the highest hash comes out first

    def add(self, place: float, number: int, row: Row) -> None:
        size = len(row.text.encode())
        heapq.heappush(self._heap, (-place, -number, size, row))
        self._size += size
        while self._size - self._heap[0][2] >= self._wanted:
            self._size -= heapq.heappop(self._heap)[2]

    def rows(self) -> tuple[Row, ...]:
        return tuple(row for *_, row in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1])))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
