"""Prompts to be continued, in groups that begin alike and batches of few shapes."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from babel_jax.evaluation.prefix_trees import shared_prefixes
from babel_jax.inference.generation import bucket

SHAPES, SHORTEST = 3, 64  # how many shapes of prompts there are at most, and the least padded length


class AlikePrompts(NamedTuple):
    """Groups of prompts (by their numbers) that begin with the same `shared` tokens, and have up to `length`
    further ones.
    """

    shared: int
    length: int
    groups: list[list[int]]


def alike_prompts(
    prompts: Sequence[Sequence[int]], batch_rows: int, new_tokens: int, devices: int = 1
) -> list[AlikePrompts]:
    """All prompts, in at most `SHAPES` combinations of `shared` and `length`, each of which is a program to
    compile.

    Each is chosen, twice in turn, as what spares most tokens beside the others: a length for short prompts,
    or a beginning (the examples of a task) that is computed once for each batch of about `batch_rows`, by
    each of the devices that share the rows. A row costs `new_tokens` too, whether it is empty or not.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda number: tuple(prompts[number]))
    sizes = np.array([len(prompts[number]) for number in order])
    # The last token of a prompt is never shared: something is left to be read.
    common = np.minimum(
        shared_prefixes([np.array(prompts[number]) for number in order])[1:],
        np.minimum(sizes[1:], sizes[:-1]) - 1,
    )
    runs: dict[
        int, np.ndarray
    ] = {}  # of each prompt, which of those with the same beginning of some length it belongs to
    costs: dict[tuple[int, int], np.ndarray] = {}  # tokens that a device computes for each prompt
    for shared in {0, *map(_floor, common.tolist())}:
        runs[shared] = np.cumsum(np.concatenate([[0], common < shared]))[: len(order)]
        mates = np.bincount(runs[shared])[runs[shared]].clip(max=batch_rows)
        for length in {_padded_length(size - shared) for size in sizes[sizes > shared].tolist()}:
            row = (length + new_tokens) / devices
            of_each = (shared + batch_rows * row) / mates if shared else row
            costs[shared, length] = np.where((sizes > shared) & (sizes - shared <= length), of_each, np.inf)
    shapes = [max(key for key in costs if key[0] == 0)] * SHAPES  # which all fit
    for place in [*range(SHAPES)] * 2:
        least = np.min([costs[shape] for number, shape in enumerate(shapes) if number != place], axis=0)
        shapes[place] = min(costs, key=lambda shape: np.minimum(least, costs[shape]).sum())
    shapes = sorted(set(shapes))
    of_each = np.argmin([costs[shape] for shape in shapes], axis=0)
    found = []
    for number, (shared, length) in enumerate(shapes):
        groups: dict[int, list[int]] = defaultdict(list)
        for place in np.flatnonzero(of_each == number):
            groups[runs[shared][place]].append(order[place])
        if groups:
            found.append(
                AlikePrompts(
                    shared,
                    length,
                    [sorted(group, key=lambda one: len(prompts[one])) for group in groups.values()],
                )
            )
    return found


def _floor(size: int) -> int:
    """The greatest of the lengths that `_padded_length` gives which is not above `size`; 0 below the least of
    them.
    """
    power = 1 << max(size, 1).bit_length() - 1
    return 0 if size < SHORTEST else (3 * power // 2 if 2 * size >= 3 * power else power)


def _padded_length(size: int) -> int:
    """The power of two at or above `size`, or three quarters of it where that is enough: padding costs as
    much as tokens.
    """
    power = bucket(size, SHORTEST)
    return max(SHORTEST, 3 * power // 4 if size <= 3 * power // 4 else power)
