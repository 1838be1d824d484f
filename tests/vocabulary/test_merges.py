"""Continued byte-pair encoding against a count of all pairs anew at each step."""

import itertools
import random

from babel_jax.vocabulary.merges import Limits, Word, learn


def recounted(words, texts, steps, least):
    """The merges by a whole recount for each; words: (ids, count)."""
    texts, merges = list(texts), []
    words = [(list(ids), count) for ids, count in words]
    for _ in range(steps):
        counts = {}
        for ids, count in words:
            for pair in itertools.pairwise(ids):
                counts[pair] = counts.get(pair, 0) + count
        counts = {pair: count for pair, count in counts.items() if count >= least}
        if not counts:
            break
        left, right = pair = min(counts, key=lambda pair: (-counts[pair], pair))
        text = texts[left] + texts[right]
        number = texts.index(text) if text in texts else len(texts)
        texts += [text] if number == len(texts) else []
        merges.append((left, right, number))
        for ids, _ in words:
            place = 0
            while place < len(ids) - 1:
                if (ids[place], ids[place + 1]) == pair:
                    ids[place : place + 2] = [number]
                place += 1
    return merges


def test_counts_that_are_kept_up_to_date_are_those_of_a_recount():
    draw = random.Random(7)
    for _ in range(60):
        words = [
            ([draw.randrange(3) for _ in range(draw.randrange(1, 14))], draw.randrange(1, 6))
            for _ in range(15)
        ]
        ours = learn(
            [Word(ids, {0: count}) for ids, count in words], "abc", Limits({0: 9}, 2, lambda _: True)
        )
        theirs = recounted(words, "abc", len(ours.merges), 2)
        assert list(ours.merges) == theirs


def test_quotas_are_filled_in_turn_and_the_rest_goes_to_others():
    words = [Word([0, 1, 0, 1], {0: 9}), Word([2, 3], {1: 5})]
    learned = learn(words, "abcd", Limits({0: 2, 1: 2}, 1, lambda _: True))
    # Group 1 has one pair only.
    assert [(token.text, token.group) for token in learned.tokens] == [("ab", 0), ("cd", 1), ("abab", 0)]


def test_protected_words_change_only_as_far_as_they_may():
    words = [Word([0, 1], {0: 50, 2: 1}), Word([0, 2], {0: 40}), Word([3, 4], {2: 99})]
    strict = learn(words, "abcde", Limits({0: 5}, 1, lambda _: True, protected=2, tolerance=0.0))
    assert [token.text for token in strict.tokens] == ["ac"]
    lenient = learn(words, "abcde", Limits({0: 5}, 1, lambda _: True, protected=2, tolerance=0.01))
    assert [token.text for token in lenient.tokens] == ["ab", "ac"]


def test_forbidden_pairs_and_texts_are_never_merged():
    words = [Word([0, 1, 2], {0: 9})]
    learned = learn(words, "abc", Limits({0: 5}, 1, lambda text: text != "bc", forbidden=frozenset({(0, 1)})))
    assert not learned.tokens
