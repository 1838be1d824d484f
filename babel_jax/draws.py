"""Random choices that depend on an id alone, each independent of all others.

Two decisions that share one hash are not independent: a judge that samples the documents with the lowest
hashes, and a classifier that holds out the documents whose hash is below 0.1, would choose the same
documents. So each decision has a purpose of its own here.
"""

import hashlib
from enum import StrEnum


class Purpose(StrEnum):
    """The decisions that are drawn.

    The value is the key of the hash (at most 64 bytes of UTF-8); no two may be equal.
    """

    HELDOUT = ""  # no key: prepared folders of earlier versions held out the same rows
    JUDGE_SAMPLE = "judge sample"
    PARALLEL = "translation first"
    CLASSIFIER_HELDOUT = "classifier held-out documents"


def unit_draw(purpose: Purpose, identifier: str) -> float:
    """A number in [0, 1), a multiple of 2**-48. It is the same for the same purpose and id, and independent
    for any other pair.
    """
    digest = hashlib.blake2b(identifier.encode(), digest_size=6, key=purpose.value.encode()).digest()
    return int.from_bytes(digest, "big") / 2**48
