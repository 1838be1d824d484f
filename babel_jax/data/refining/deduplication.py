"""Equal and nearly equal documents: MinHash signatures, the pairs that share a band, the graph of pairs, and
which copy stays.

MinHash: Broder 1997; banding: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3.
Signatures are rensa's; it is given hashes of character shingles that NumPy computes for many documents at
once, since shingling in Python takes longer than all the rest.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import rensa
import scipy.sparse
from jaxtyping import Bool, Int64, UInt32, UInt64

from babel_jax.config import DeduplicationSettings
from babel_jax.data.refining.characters import code_points, mixed

Digests = UInt64[np.ndarray, "documents 2"]
Signatures = UInt32[np.ndarray, "documents values"]
Links = Int64[np.ndarray, "links 2"]

_SEED = 20250304
# So many groups of alike documents are told apart under one key of a band; a key with more is a common
# phrase, found in other bands too.
_ROUNDS = 64


def digests(texts: Sequence[str]) -> Digests:
    """128 bits of each text: equal for equal texts."""
    hashed = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(hashed, "<u8").reshape(-1, 2)


def signatures(texts: Sequence[str], settings: DeduplicationSettings) -> Signatures:
    """The MinHash values of each text's shingles: runs of characters, of which white space and case make no
    difference.
    """
    size = settings.shingle
    # A text shorter than a shingle is one, filled up.
    folded = [folded.ljust(size) for folded in (" ".join(text.casefold().split()) for text in texts)]
    points = code_points("".join(folded)).astype(np.uint64)
    count = max(len(points) - size + 1, 0)
    hashes = points[:count].copy()
    for place in range(1, size):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += points[place : place + count]
    hashes = mixed(hashes)
    # A run that begins in one text and ends in the next is no shingle of either.
    lengths = np.array([len(text) for text in folded], np.int64)
    ends = np.cumsum(lengths)
    inside = np.ones(count, bool)
    for back in range(1, size):
        inside[ends[:-1] - back] = False
    offsets = np.concatenate([[0], np.cumsum(lengths - size + 1)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes[inside], offsets, settings.bands * settings.rows, _SEED
    )
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), settings.bands * settings.rows)


def band_keys(
    digest: Digests, signature: Signatures | None, settings: DeduplicationSettings
) -> UInt64[np.ndarray, "bands documents"]:
    """Documents with the same key in a band may be alike: band 0 is the text itself, each other one some
    MinHash values.
    """
    keys = [digest[:, 0]]
    if signature is not None:
        bands = signature.reshape(len(signature), settings.bands, settings.rows).astype(np.uint64)
        hashes = np.zeros(bands.shape[:2], np.uint64)
        for place in range(settings.rows):
            hashes = mixed(hashes * np.uint64(0x9E3779B97F4A7C15) + bands[:, :, place])
        keys += list(hashes.T)
    return np.ascontiguousarray(np.stack(keys))


def links_in_band(
    keys: UInt64[np.ndarray, "n"],
    documents: Int64[np.ndarray, "n"],
    are_alike: Callable[..., Bool[np.ndarray, "pairs"]],
) -> Links:
    """Pairs of documents that are alike, among those with the same key; `keys` are sorted.

    Of each key the first document is compared with all others, then the first of those that were not like it,
    and so on.
    """
    starts = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.empty(0, bool)
    group = np.cumsum(starts)
    left = np.flatnonzero(np.bincount(group)[group] > 1) if len(keys) else np.empty(0, np.int64)
    found = [np.empty((0, 2), np.int64)]
    for _ in range(_ROUNDS):
        is_first = (
            np.concatenate([[True], group[left][1:] != group[left][:-1]]) if len(left) else np.empty(0, bool)
        )
        others = ~is_first
        if not others.any():
            break
        first = left[is_first][np.cumsum(is_first) - 1]
        one, other = documents[first[others]], documents[left[others]]
        alike = are_alike(one, other)
        found.append(np.stack([one, other], 1)[alike])
        left = left[others][~alike]
    return np.concatenate(found)


def components(links: Links) -> tuple[Int64[np.ndarray, "linked"], Int64[np.ndarray, "linked"]]:
    """The documents that have any link, ascending, and for each the number of the connected component that it
    is in.
    """
    linked, places = np.unique(links, return_inverse=True)
    places = places.reshape(-1, 2)
    edges = (np.ones(len(places), bool), (places[:, 0], places[:, 1]))
    graph = scipy.sparse.coo_matrix(edges, shape=(len(linked), len(linked)))
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return linked, labels.astype(np.int64)


def survivors(component: Int64[np.ndarray, "n"], *preferences: np.ndarray) -> Int64[np.ndarray, "n"]:
    """For each document the place of the one that stays of its component: of the highest first preference,
    then second, then the first.
    """
    order = np.lexsort(
        (np.arange(len(component)), *(-preference for preference in reversed(preferences)), component)
    )
    best = (
        order[np.concatenate([[True], component[order][1:] != component[order][:-1]])]
        if len(component)
        else order
    )
    stays = np.empty(len(best), np.int64)
    stays[component[best]] = best
    return stays[component]
