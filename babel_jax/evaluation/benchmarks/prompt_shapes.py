"""Prompts for generation, in groups with a common beginning and in batches of few shapes."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from babel_jax.evaluation.prefix_trees import shared_prefixes
from babel_jax.inference.generation import bucket

Costs = dict[tuple[int, int], np.ndarray]  # by (shared, length)

SHAPES, SHORTEST = 3, 64  # the most shapes of prompts, and the least padded length in tokens


class AlikePrompts(NamedTuple):
    """Groups of prompts, by number. The prompts of a group begin with the same `shared` tokens and have at
    most `length` further tokens.
    """

    shared: int
    length: int
    groups: list[list[int]]


def alike_prompts(
    prompts: Sequence[Sequence[int]], batch_rows: int, new_tokens: int, devices: int = 1
) -> list[AlikePrompts]:
    """All prompts, in at most `SHAPES` combinations of `shared` and `length`; each is a program to compile.

    In two rounds, each shape is replaced by the shape that saves most tokens beside the others. It has a
    short length for short prompts, or a common beginning (the examples of a task), which each of the
    `devices` computes once for each batch of about `batch_rows`. A row also costs `new_tokens`, even if it is
    empty.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda number: tuple(prompts[number]))
    sizes = np.array([len(prompts[number]) for number in order])
    # The last token of a prompt is never shared, because each row must have a token to read.
    common = np.minimum(
        shared_prefixes([np.array(prompts[number]) for number in order])[1:],
        np.minimum(sizes[1:], sizes[:-1]) - 1,
    )

    # runs[shared]: the number of the run of prompts with the same first `shared` tokens, for each prompt.
    runs: dict[int, np.ndarray] = {}
    # costs[shared, length]: the tokens that a device computes for each prompt in this shape.
    costs: Costs = {}
    # Only some lengths of beginnings are tried, because each pair of lengths is an array over all prompts.
    for shared in {0, *map(_floor, common.tolist())}:
        runs[shared] = np.cumsum(np.concatenate([[0], common < shared]))[: len(order)]
        # Prompts with the same beginning share its cost, as many as a batch has rows.
        mates = np.bincount(runs[shared])[runs[shared]].clip(max=batch_rows)
        padded_lengths = {_padded_length(size - shared) for size in sizes[sizes > shared].tolist()}
        for length in padded_lengths:
            row = (length + new_tokens) / devices
            of_each = (shared + batch_rows * row) / mates if shared else row
            costs[shared, length] = np.where((sizes > shared) & (sizes - shared <= length), of_each, np.inf)

    # Each prompt takes its cheapest shape.
    shapes = _best_shapes(costs)
    cheapest = np.argmin([costs[shape] for shape in shapes], axis=0)
    chosen = []
    for number, (shared, length) in enumerate(shapes):
        groups: dict[int, list[int]] = defaultdict(list)
        for index in np.flatnonzero(cheapest == number):
            groups[runs[shared][index]].append(order[index])
        if groups:
            # Batches are cut from a group in order, so that rows of one batch have similar lengths.
            for group in groups.values():
                group.sort(key=lambda number: len(prompts[number]))
            chosen.append(AlikePrompts(shared, length, list(groups.values())))
    return chosen


def _best_shapes(costs: Costs) -> list[tuple[int, int]]:
    """At most `SHAPES` shapes, which together cost little."""
    # Begin with the longest shape, which all prompts fit, and replace each shape in turn: there are too many
    # sets of shapes to compare all.
    shapes = [max(shape for shape in costs if shape[0] == 0)] * SHAPES
    for replaced in [*range(SHAPES)] * 2:
        others = [costs[shape] for number, shape in enumerate(shapes) if number != replaced]
        least = np.min(others, axis=0)
        shapes[replaced] = min(costs, key=lambda shape: np.minimum(least, costs[shape]).sum())
    return sorted(set(shapes))


def _floor(size: int) -> int:
    """The greatest output of `_padded_length` that is not above `size`; 0 if there is none."""
    power = 1 << max(size, 1).bit_length() - 1
    return 0 if size < SHORTEST else (3 * power // 2 if 2 * size >= 3 * power else power)


def _padded_length(size: int) -> int:
    """The power of two at or above `size`, or three quarters of it if that is enough: padding costs as much
    as tokens.
    """
    power = bucket(size, SHORTEST)
    return max(SHORTEST, 3 * power // 4 if size <= 3 * power // 4 else power)
