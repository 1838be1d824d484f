"""Token sequences packed into rows of one length; a prefix that several sequences share is computed once.

Sorted sequences are the branches of a tree. A run of them is written depth first: each adds to the row only
the tokens that it does not share with the sequence before it. So the choices of a question pay for its
context once, and the questions of a task for its examples once; sequences without a common prefix are simply
packed. Attention follows the branches (`model.attention.tree_masks`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

SHORTEST, LONGEST_PACKED = 256, 4096


@dataclasses.dataclass(frozen=True)
class Scored:
    """A sequence whose last tokens are scored: the model reads `tokens`; `targets` are the correct next
    tokens at the last positions.
    """

    tokens: Int[np.ndarray, "time"]
    targets: Int[np.ndarray, "scored"]


@dataclasses.dataclass
class Row:
    """One row of prefix trees: for each token the inputs of `tree_masks`; for each entry (a scored target)
    its place in the row and its token.

    If two sequences share a prefix with the same targets, they share its entries.
    """

    tokens: Int[np.ndarray, "time"]
    positions: Int[np.ndarray, "time"]
    ends: Int[np.ndarray, "time"]
    places: Int[np.ndarray, "time"]
    targets: Int[np.ndarray, "time"]
    # The number of each sequence, with its entries in order.
    owners: list[tuple[int, Int[np.ndarray, "scored"]]] = dataclasses.field(default_factory=list)
    entries: int = 0


def planned_rows(
    sequences: Sequence[Scored], lengths: Sequence[int], cost: Callable[[int, int], float]
) -> dict[int, list[Row]]:
    """The rows of all sequences, by row length, which is one of `lengths` (powers of two, ascending).

    Sequences of similar length share rows. Of the possible row lengths, the cheapest is chosen: `cost(rows,
    length)`.
    """
    # Sequences by the shortest row that holds them.
    classes: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        shortest = min(length for length in lengths if length >= len(sequence.tokens))
        classes.setdefault(shortest, []).append(number)

    planned: dict[int, list[Row]] = {}
    for least, members in sorted(classes.items()):
        # Big-endian bytes sort like the tokens, so sequences with a common prefix are neighbours.
        ordered = sorted(members, key=lambda number: sequences[number].tokens.astype(">u4").tobytes())
        shared = shared_prefixes([sequences[number].tokens for number in ordered])
        counts = [len(sequences[number].targets) for number in ordered]
        sizes = [len(sequences[number].tokens) for number in ordered]

        # A row beyond LONGEST_PACKED is made only for a sequence that needs it: attention costs the square.
        most = max(least, LONGEST_PACKED)
        candidates = [length for length in lengths if least <= length <= most]
        runs = {length: list(_runs(sizes, shared, counts, length)) for length in candidates}
        best = min(candidates, key=lambda length: cost(len(runs[length]), length))
        rows = planned.setdefault(best, [])
        for start, stop in runs[best]:
            rows.append(_row(sequences, ordered[start:stop], shared[start:stop], best))
    return dict(sorted(planned.items()))


def shared_prefixes(ordered: Sequence[np.ndarray]) -> list[int]:
    """The number of first tokens that each sequence shares with the sequence before it."""
    shared = [0]
    for before, now in itertools.pairwise(ordered):
        common = min(len(before), len(now))
        differ = before[:common] != now[:common]
        shared.append(int(differ.argmax()) if differ.any() else common)
    return shared[: len(ordered)]


def _runs(
    sizes: Sequence[int], shared: Sequence[int], counts: Sequence[int], length: int
) -> Iterator[tuple[int, int]]:
    """Runs of sequences that fit into rows of `length`, as (first, last + 1)."""
    start, filled, entries, first_before = 0, 0, 0, 0
    for number, (size, common, count) in enumerate(zip(sizes, shared, counts, strict=True)):
        first = size - count
        # Of the shared tokens, only the last can have a new target. The other entries exist already, if the
        # sequence before scored all these tokens.
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
    """A row without sequences, in which each token attends to itself alone."""
    tokens, positions, places, targets = np.zeros((4, length), np.int32)
    return Row(tokens, positions, np.arange(1, length + 1, dtype=np.int32), places, targets)


def _row(sequences: Sequence[Scored], members: Sequence[int], shared: Sequence[int], length: int) -> Row:
    """The row of the sequences `members`; `shared` has the tokens that each shares with the one before."""
    # A depth-first walk: a sequence continues the branch of the one before, as far as they are equal.
    row = empty_row(length)
    branch = np.zeros(0, np.int32)  # the index in the row of each token of the current sequence
    filled = 0
    entry_of: dict[tuple[int, int], int] = {}  # the entry of each (index in the row, target)

    for index, number in enumerate(members):
        tokens, targets = sequences[number].tokens, sequences[number].targets
        common = shared[index] if index else 0

        # The branch ends where it leaves the one before; its new tokens are written after all others.
        row.ends[branch[common:]] = filled
        stop = filled + len(tokens) - common
        row.tokens[filled:stop] = tokens[common:]
        row.positions[filled:stop] = np.arange(common, len(tokens))
        branch = np.concatenate([branch[:common], np.arange(filled, stop, dtype=np.int32)])
        filled = stop

        # Two sequences with the same target at the same token share one entry, which is computed once.
        scored_places = branch[len(branch) - len(targets) :]
        entries = []
        for entry in zip(scored_places.tolist(), targets.tolist(), strict=True):
            entries.append(entry_of.setdefault(entry, len(entry_of)))
        row.owners.append((number, np.array(entries, np.int32)))

    row.ends[branch] = filled
    row.entries = len(entry_of)
    places, targets = np.array(list(entry_of), np.int32).reshape(-1, 2).T
    row.places[: row.entries], row.targets[: row.entries] = places, targets
    return row
