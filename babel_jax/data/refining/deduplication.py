"""Equal and nearly equal documents: MinHash signatures, pairs that share a band, the graph of pairs, and the
choice of the copy that stays.

MinHash: Broder 1997; banding: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3. rensa
computes the signatures. NumPy computes the hashes of shingles for many documents at once, because shingling
in Python takes longer than all other steps.
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
# Rounds of comparison under one key of a band. After these, the remaining documents of the key are not
# compared: such a key is a common phrase, and duplicates nearly always share another band.
_ROUNDS = 64


def digests(texts: Sequence[str]) -> Digests:
    """128 bits of each text: equal for equal texts."""
    hashed = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(hashed, "<u8").reshape(-1, 2)


def signatures(texts: Sequence[str], settings: DeduplicationSettings) -> Signatures:
    """The MinHash values of each text's shingles: runs of characters, with white space and case
    normalized.
    """
    size = settings.shingle
    # A text shorter than a shingle is padded to one.
    folded = [" ".join(text.casefold().split()).ljust(size) for text in texts]

    # Shingles of all texts at once, as if they were one.
    points = code_points("".join(folded)).astype(np.uint64)
    count = max(len(points) - size + 1, 0)
    hashes = points[:count].copy()
    for offset in range(1, size):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += points[offset : offset + count]
    hashes = mixed(hashes)

    # A run that begins in one text and ends in the next is no shingle.
    lengths = np.array([len(text) for text in folded], np.int64)
    ends = np.cumsum(lengths)
    inside = np.ones(count, bool)
    for back in range(1, size):
        inside[ends[:-1] - back] = False
    # Where the shingles of each text begin: a text has size - 1 fewer shingles than characters.
    offsets = np.concatenate([[0], np.cumsum(lengths - size + 1)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes[inside], offsets, settings.bands * settings.rows, _SEED
    )
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), settings.bands * settings.rows)


def band_keys(
    digest: Digests, signature: Signatures | None, settings: DeduplicationSettings
) -> UInt64[np.ndarray, "bands documents"]:
    """The keys of each document by band. Documents with the same key in a band may be duplicates.

    Band 0 is a digest of the text; each other band is a hash of some MinHash values.
    """
    keys = [digest[:, 0]]
    if signature is not None:
        # Documents share a key of a band only if all MinHash values of the band are equal.
        bands = signature.reshape(len(signature), settings.bands, settings.rows).astype(np.uint64)
        hashes = np.zeros(bands.shape[:2], np.uint64)
        for row in range(settings.rows):
            hashes = mixed(hashes * np.uint64(0x9E3779B97F4A7C15) + bands[:, :, row])
        keys += list(hashes.T)
    return np.ascontiguousarray(np.stack(keys))


def links_in_band(
    keys: UInt64[np.ndarray, "n"],
    documents: Int64[np.ndarray, "n"],
    are_alike: Callable[..., Bool[np.ndarray, "pairs"]],
) -> Links:
    """The pairs of duplicates among the documents with the same key; `keys` must be sorted.

    For each key, the first document is compared with all others. Then the first of the documents that differ
    from it is compared with the rest of them, and so on.
    """
    # The group of each document: its key's number. Documents alone in their group have no pair.
    group = np.cumsum(_starts_of_runs(keys))
    remaining = np.flatnonzero(np.bincount(group)[group] > 1) if len(keys) else np.empty(0, np.int64)

    links = [np.empty((0, 2), np.int64)]
    for _ in range(_ROUNDS):
        is_first = _starts_of_runs(group[remaining])
        others = ~is_first
        if not others.any():
            break
        # For each other document, the first remaining one of its group.
        first = remaining[is_first][np.cumsum(is_first) - 1]
        left, right = documents[first[others]], documents[remaining[others]]
        alike = are_alike(left, right)
        links.append(np.stack([left, right], 1)[alike])
        remaining = remaining[others][~alike]
    return np.concatenate(links)


def _starts_of_runs(values: np.ndarray) -> Bool[np.ndarray, "n"]:
    """True for each value that differs from the value before it."""
    if not len(values):
        return np.empty(0, bool)
    return np.concatenate([[True], values[1:] != values[:-1]])


def components(links: Links) -> tuple[Int64[np.ndarray, "linked"], Int64[np.ndarray, "linked"]]:
    """The documents with any link, ascending, and the number of the connected component of each."""
    linked, indices = np.unique(links, return_inverse=True)
    indices = indices.reshape(-1, 2)
    # Indices among the linked documents: the graph has no node for the many documents without a link.
    edges = (np.ones(len(indices), bool), (indices[:, 0], indices[:, 1]))
    graph = scipy.sparse.coo_matrix(edges, shape=(len(linked), len(linked)))
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return linked, labels.astype(np.int64)


def survivors(component: Int64[np.ndarray, "n"], *preferences: np.ndarray) -> Int64[np.ndarray, "n"]:
    """For each document, the index of the document that its component keeps: the document with the highest
    first preference; among equal ones the highest second preference, and so on; at last the lowest index.
    """
    # lexsort sorts by its last key first: by component, then by preference, then by index.
    descending = [-preference for preference in reversed(preferences)]
    order = np.lexsort((np.arange(len(component)), *descending, component))
    best = order[_starts_of_runs(component[order])]
    stays = np.empty(len(best), np.int64)
    stays[component[best]] = best
    result: Int64[np.ndarray, "n"] = stays[component]
    return result
