"""Scores of new unigram pieces, with which each new piece wins over the pieces that it is made of."""

import math
from collections.abc import Mapping

import tokenizers

from babel_jax.vocabulary.editable import Vocabulary
from babel_jax.vocabulary.merges import Learned

_STEP = 1 / 64  # scores are multiples of this, so that sums are exact in float32 (data/tokens/unigram.py)
_ROUNDS = 8  # of raising pieces that lose; each round is final for shorter pieces


def new_scores(base: Vocabulary, new: Mapping[str, int], learned: Learned) -> list[list[object]]:
    """The vocabulary of a unigram tokenizer.json, [[piece, score], ..] by id, with new pieces.

    The score of a new piece is the logarithm of its relative frequency, but at least a step more than the
    best way to make its text of other pieces.
    """
    listed = base.description["model"]["vocab"]
    scores: dict[str, float] = {piece: float(score) for piece, score in listed}
    counts, total = {}, 0
    for token in learned.tokens:
        counts[token.text] = token.count
        total += token.count
    total = max(1, total)
    # No new piece is less likely than the rarest old one; -1000 is the score of pieces that are never chosen.
    floor = min(score for score in scores.values() if score > -1000.0)
    for text in new:
        scores[text] = max(floor, _rounded(math.log(max(1, counts.get(text, 1)) / total)))

    longer = [text for text in new if len(text) > 1]
    size = max([len(listed) - 1, *new.values()]) + 1
    entries: list[list[object]] = []
    for _ in range(_ROUNDS):
        entries = _entries(base, new, scores, size)
        library = tokenizers.models.Unigram(
            [(str(piece), float(str(score))) for piece, score in entries],
            base.description["model"]["unk_id"],
            base.description["model"].get("byte_fallback", False),
        )
        # All pieces that lose are raised at once: a library for each would take too long to build.
        is_final = True
        for text in longer:
            ids = [token.id for token in library.tokenize(text)]
            if ids != [new[text]]:
                is_final = False
                best = sum(float(str(entries[number][1])) for number in ids)
                scores[text] = _rounded(best + 2 * _STEP)
        if is_final:
            break
    return entries


def _entries(
    base: Vocabulary, new: Mapping[str, int], scores: Mapping[str, float], size: int
) -> list[list[object]]:
    entries: list[list[object]] = [list(entry) for entry in base.description["model"]["vocab"]]
    by_id = {number: text for text, number in new.items()}
    added = {number: text for text, number in base.added.items()}
    for number in range(len(entries), size):
        # An added token beyond the old vocabulary keeps its id; as a piece it is never chosen.
        entries.append([added.get(number, ""), -1000.0])
    for number, text in by_id.items():
        entries[number] = [text, scores[text]]
    return entries


def _rounded(score: float) -> float:
    return round(score / _STEP) * _STEP
