"""Draws by id: independent of each other, and those of held-out text as ever."""

import hashlib
import itertools

import numpy as np
import pytest

from babel_jax.draws import Purpose, unit_draw

IDS = [f"document-{number}" for number in range(20_000)]


def test_held_out_text_is_that_of_earlier_versions():
    """By hashlib alone: prepared folders must hold out the same rows as before."""
    for identifier in ("a", "sw-1", "ý"):
        plain = hashlib.blake2b(identifier.encode(), digest_size=6).digest()
        assert unit_draw(Purpose.HELDOUT, identifier) == int.from_bytes(plain, "big") / 2**48


def test_every_purpose_has_a_key_of_its_own():
    assert len({purpose.value for purpose in Purpose}) == len(Purpose)
    assert all(len(purpose.value.encode()) <= 64 for purpose in Purpose)


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(Purpose, 2)))
def test_draws_of_two_purposes_are_independent(one, other):
    """The lowest 1% by one purpose are spread evenly by the other: a tenth lies below 0.1, to four
    deviations.
    """
    first = np.array([unit_draw(one, identifier) for identifier in IDS])
    second = np.array([unit_draw(other, identifier) for identifier in IDS])
    lowest = np.argsort(first)[:200]
    below = int((second[lowest] < 0.1).sum())
    assert abs(below - 20) < 4 * np.sqrt(200 * 0.1 * 0.9)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(len(IDS))
