"""Token sequences in rows of one length, with every prefix that several share computed once.

Sorted sequences are the branches of a tree, and a run of them is written out depth first: each adds to its
row only what it does not share with the one before it. So the choices of a question cost its context once,
the questions of a task its examples once, and sequences that share nothing are simply packed. Attention goes
along branches (`model.attention.tree_masks`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

SHORTEST, LONGEST_PACKED = 256, 4096


@dataclasses.dataclass(frozen=True)
class Scored:
    """A sequence whose last tokens are to be scored: `tokens` are what the model reads, `targets` what it
    should say at the last places: the tokens that follow."""

    tokens: Int[np.ndarray, "time"]
    targets: Int[np.ndarray, "scored"]


@dataclasses.dataclass
class Row:
    """One row of prefix trees: what `tree_masks` needs of each token, and of each entry to be scored the
    place and target.

    Sequences that are scored on a prefix that they share have its entries in common.
    """

    tokens: Int[np.ndarray, "time"]
    positions: Int[np.ndarray, "time"]
    ends: Int[np.ndarray, "time"]
    places: Int[np.ndarray, "time"]
    targets: Int[np.ndarray, "time"]
    owners: list[tuple[int, Int[np.ndarray, "scored"]]] = dataclasses.field(
        default_factory=list
    )  # sequence, and its entries in order
    entries: int = 0


def planned_rows(
    sequences: Sequence[Scored], lengths: Sequence[int], cost: Callable[[int, int], float]
) -> dict[int, list[Row]]:
    """Rows of all sequences by their length, which is one of `lengths` (powers of two, ascending).

    Sequences of about one length go together, in the rows that cost least: `cost` is that of so many rows of
    some length.
    """
    classes: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        classes.setdefault(min(length for length in lengths if length >= len(sequence.tokens)), []).append(
            number
        )
    planned: dict[int, list[Row]] = {}
    for least, members in sorted(classes.items()):
        ordered = sorted(members, key=lambda number: sequences[number].tokens.astype(">u4").tobytes())
        shared = shared_prefixes([sequences[number].tokens for number in ordered])
        counts = [len(sequences[number].targets) for number in ordered]
        sizes = [len(sequences[number].tokens) for number in ordered]
        candidates = [length for length in lengths if least <= length <= max(least, LONGEST_PACKED)]
        runs = {length: list(_runs(sizes, shared, counts, length)) for length in candidates}
        best = min(candidates, key=lambda length: cost(len(runs[length]), length))
        rows = [_row(sequences, ordered[start:stop], shared[start:stop], best) for start, stop in runs[best]]
        planned.setdefault(best, []).extend(rows)
    return dict(sorted(planned.items()))


def shared_prefixes(ordered: Sequence[np.ndarray]) -> list[int]:
    """How many first tokens each sequence shares with the one before it."""
    shared = [0]
    for before, now in itertools.pairwise(ordered):
        common = min(len(before), len(now))
        differ = before[:common] != now[:common]
        shared.append(int(differ.argmax()) if differ.any() else common)
    return shared[: len(ordered)]


def _runs(
    sizes: Sequence[int], shared: Sequence[int], counts: Sequence[int], length: int
) -> Iterator[tuple[int, int]]:
    """Runs of sequences that fit rows of `length`, as (first, one behind the last)."""
    start, filled, entries, first_before = 0, 0, 0, 0
    for number, (size, common, count) in enumerate(zip(sizes, shared, counts, strict=True)):
        first = size - count
        # Of the shared tokens only the last can have another target; the entries of the others are there, if
        # all were scored before.
        new = min(count, size - common + 1) if first_before <= first else count
        if number > start and (filled + size - common > length or entries + new > length):
            yield start, number
            start, filled, entries = number, 0, 0
        filled += size - (common if number > start else 0)
        entries += new if number > start else count
        first_before = first
    if sizes:
        yield start, len(sizes)


def empty_row(length: int) -> Row:
    """A row without sequences, whose tokens see themselves alone."""
    tokens, positions, places, targets = np.zeros((4, length), np.int32)
    return Row(tokens, positions, np.arange(1, length + 1, dtype=np.int32), places, targets)


def _row(sequences: Sequence[Scored], members: Sequence[int], shared: Sequence[int], length: int) -> Row:
    row, branch, filled = empty_row(length), np.zeros(0, np.int32), 0
    entry_of: dict[tuple[int, int], int] = {}
    for first, number, common in zip([True] + [False] * len(members), members, shared, strict=False):
        tokens, targets = sequences[number].tokens, sequences[number].targets
        common = 0 if first else common
        row.ends[branch[common:]] = filled
        more = len(tokens) - common
        row.tokens[filled : filled + more] = tokens[common:]
        row.positions[filled : filled + more] = np.arange(common, len(tokens))
        branch = np.concatenate([branch[:common], np.arange(filled, filled + more, dtype=np.int32)])
        filled += more
        wanted = zip(branch[len(branch) - len(targets) :].tolist(), targets.tolist(), strict=True)
        row.owners.append(
            (number, np.array([entry_of.setdefault(entry, len(entry_of)) for entry in wanted], np.int32))
        )
    row.ends[branch] = filled
    row.entries = len(entry_of)
    row.places[: row.entries], row.targets[: row.entries] = (
        np.array(list(entry_of), np.int32).reshape(-1, 2).T
    )
    return row
