"""Prompts in groups that begin alike: what every grouping keeps, and what it spares."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.evaluation.benchmarks.prompt_shapes import SHAPES, alike_prompts

ROWS = 4
# Beginnings of a few tasks, and ends of their own; few different tokens, so that ends are often alike too.
PROMPTS = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, 300), st.lists(st.integers(0, 1), min_size=1, max_size=90)
    ).map(lambda parts: [5 + parts[0]] * parts[1] + parts[2]),
    max_size=30,
)


@given(PROMPTS)
def test_every_prompt_is_in_one_group_whose_beginning_it_has(prompts):
    found = alike_prompts(prompts, ROWS, 16)
    assert len(found) <= SHAPES
    assert len({(shape.shared, shape.length) for shape in found}) == len(found)
    numbers = [number for shape in found for group in shape.groups for number in group]
    assert sorted(numbers) == list(range(len(prompts)))
    for shape in found:
        for group in shape.groups:
            assert len({tuple(prompts[number][: shape.shared]) for number in group}) == 1
            assert all(0 < len(prompts[number]) - shape.shared <= shape.length for number in group)


def test_examples_of_each_task_are_computed_once_a_batch():
    """Two tasks with examples of 500 and 700 tokens, in turn, and a few prompts without any."""
    random = np.random.default_rng(0)
    examples = [random.integers(0, 1000, size).tolist() for size in (500, 700)]
    prompts = [[*examples[number % 2], *random.integers(0, 1000, 30).tolist()] for number in range(100)]
    prompts += [random.integers(0, 1000, 40).tolist() for _ in range(5)]
    found = alike_prompts(prompts, 16, 64)
    computed = sum(
        shape.shared * -(-len(group) // 16) + shape.length * len(group)
        for shape in found
        for group in shape.groups
        if shape.shared
    )
    assert 0 < computed < 0.5 * sum(map(len, prompts))
    assert sum(len(group) for shape in found if not shape.shared for group in shape.groups) == 5
