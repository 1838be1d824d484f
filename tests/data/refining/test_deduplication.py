import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.config import DeduplicationSettings
from babel_jax.data.refining.deduplication import (
    band_keys,
    components,
    digests,
    links_in_band,
    signatures,
    survivors,
)
from babel_jax.data.sources.embedded import embedded_corpus

SETTINGS = DeduplicationSettings()


def shingles(text, size=5):
    """The set that the signatures stand for, by hand."""
    folded = " ".join(text.casefold().split()).ljust(size)
    return {folded[place : place + size] for place in range(len(folded) - size + 1)}


def jaccard(one, other):
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


@pytest.fixture(scope="module")
def some_texts():
    """Texts of six scripts, each with copies in which a share of the words was replaced."""
    draw = random.Random(1)
    texts = []
    for language in ("en", "zh", "hi", "ar", "th", "ta"):
        rows = [row.text for row in embedded_corpus()[language]]
        letters = sorted({letter for row in rows for letter in row if letter.isalpha()})
        for row in rows[:6]:
            texts.append(row)
            for share in (0.01, 0.04, 0.1):
                texts.append(
                    "".join(draw.choice(letters) if draw.random() < share else letter for letter in row)
                )
    return texts


def test_signatures_estimate_the_jaccard_similarity(some_texts):
    found = signatures(some_texts, SETTINGS)
    values = found.shape[1]
    differences = []
    for one, other in itertools.combinations(range(len(some_texts)), 2):
        true = jaccard(some_texts[one], some_texts[other])
        estimate = (found[one] == found[other]).mean()
        differences.append((estimate - true) / max(np.sqrt(true * (1 - true) / values), 1 / values))
    assert np.abs(differences).max() < 5
    assert abs(np.mean(differences)) < 0.1


def test_a_signature_does_not_depend_on_the_texts_beside_it(some_texts):
    together = signatures(some_texts, SETTINGS)
    for number in (0, 7, len(some_texts) - 1):
        assert (signatures(some_texts[number : number + 1], SETTINGS)[0] == together[number]).all()
    short = ["", "a", "ab c", "ABC D", "abc  d"]
    found = signatures(short, SETTINGS)
    for (one, text), (other, other_text) in itertools.product(zip(found, short, strict=True), repeat=2):
        assert (one == other).all() == (shingles(text) == shingles(other_text))


def test_bands_hold_what_is_equal_in_them():
    draw = np.random.default_rng(0)
    found = draw.integers(0, 2, (40, SETTINGS.bands * SETTINGS.rows)).astype(np.uint32)
    keys = band_keys(digests([str(number) for number in range(40)]), found, SETTINGS)
    assert keys.shape == (1 + SETTINGS.bands, 40)
    for band in range(SETTINGS.bands):
        rows = found[:, band * SETTINGS.rows : (band + 1) * SETTINGS.rows]
        equal = (rows[:, None] == rows[None]).all(-1)
        assert (equal == (keys[1 + band][:, None] == keys[1 + band][None])).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=30))
def test_links_join_what_has_the_same_key_and_is_alike(documents):
    """Documents (key, value) are alike when their values are equal: the groups must be
    those of equal pairs.
    """
    documents.sort(key=lambda pair: pair[0])
    keys = np.array([key for key, _ in documents], np.uint64)
    values = np.array([value for _, value in documents], np.int64)
    numbers = np.arange(len(documents), dtype=np.int64) * 7
    links = links_in_band(keys, numbers, lambda one, other: values[one // 7] == values[other // 7])
    linked, component = components(links)
    groups = {frozenset((linked[component == label] // 7).tolist()) for label in np.unique(component)}
    expected = {}
    for place, pair in enumerate(documents):
        expected.setdefault(pair, []).append(place)
    assert groups == {frozenset(places) for places in expected.values() if len(places) > 1}


@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 60)).filter(lambda pair: pair[0] != pair[1]), max_size=60
    )
)
def test_components_are_those_of_a_walk(pairs):
    linked, component = components(np.array(pairs, np.int64).reshape(-1, 2))
    parent = {number: number for pair in pairs for number in pair}

    def root(number):
        while parent[number] != number:
            number = parent[number]
        return number

    for one, other in pairs:
        parent[root(one)] = root(other)
    assert linked.tolist() == sorted(parent)
    for one, other in itertools.combinations(range(len(linked)), 2):
        assert (component[one] == component[other]) == (root(linked[one]) == root(linked[other]))


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 2), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    )
)
def test_the_best_of_each_component_stays(documents):
    labels = sorted({component for component, *_ in documents})
    component, weight, score, length = np.array(documents, np.int64).T
    component = np.searchsorted(labels, component)
    stays = survivors(component, weight, score.astype(float), length)
    for label in range(len(labels)):
        places = np.flatnonzero(component == label)
        best = max(places, key=lambda place: (weight[place], score[place], length[place], -place))
        assert set(stays[places].tolist()) == {best}


def test_the_threshold_is_what_is_asked_for():
    with pytest.raises(ValueError, match="similarity = 0"):
        DeduplicationSettings(similarity=0.0)
