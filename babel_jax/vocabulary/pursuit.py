"""Rows of new tokens from a donor: a model of any family and width whose vocabulary has more of the
languages.

By orthogonal matching pursuit (Pati et al. 1993; for vocabularies arXiv 2506.06607), a donor's row of the new
token is written as a sparse sum of donor rows of tokens that both vocabularies have. The same sum of our own
rows of these tokens is the new row.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open

from babel_jax.errors import BadInput
from babel_jax.progress import Work
from babel_jax.vocabulary.editable import Vocabulary, open_vocabulary
from babel_jax.vocabulary.extension import NewRow
from babel_jax.vocabulary.growth import Growth

TERMS = 8  # old rows in the sum for one new row
_BATCH = 512  # new rows that are worked on together
_LEAST_SHARED = 1_000  # tokens that both vocabularies must have
_EMBEDDING = "embed_tokens.weight"


def donor_growth(
    vocabulary: Vocabulary, rows: Sequence[NewRow], donor: Path | str, old_rows: int, all_rows: int
) -> Growth:
    """The growth by a donor folder: its tokenizer, and safetensors files with its input embedding.

    A new token that the donor writes in several tokens has the mean of their rows. Raises BadInput if the
    donor has no such tensor, or shares fewer than 1,000 tokens with the vocabulary.
    """
    path = Path(donor)
    donor_vocabulary = open_vocabulary(path)
    table = donor_table(path)
    ours, theirs = _shared(vocabulary, donor_vocabulary, len(table))
    if len(ours) < _LEAST_SHARED:
        raise BadInput(
            f"{path}: shares {len(ours):,} tokens with the model; at least {_LEAST_SHARED:,} are needed. "
            'Give another donor, or leave init = "donor" out'
        )
    ordered = sorted(rows, key=lambda row: row.id)
    targets = np.zeros((len(ordered), table.shape[1]), np.float32)
    for number, row in enumerate(ordered):
        content = vocabulary.bytes_of(row.text).decode("utf-8", "ignore")
        pieces = donor_vocabulary.library.encode(content, add_special_tokens=False).ids
        if pieces:
            targets[number] = table[pieces].mean(axis=0)
    chosen, weights = pursue(table[theirs], targets, TERMS)
    ids = np.array([row.id for row in ordered], np.int32)
    return Growth(ids, ours[chosen].astype(np.int32), weights, old_rows, all_rows)


def pursue(atoms: np.ndarray, targets: np.ndarray, terms: int) -> tuple[np.ndarray, np.ndarray]:
    """Sparse sums of `atoms` [count, width] near each of `targets` [new, width]: int64[new, terms] of chosen
    atoms, and float32[new, terms] of their weights.

    Each step takes the atom of the largest cosine with what is left, and fits all weights again.
    """
    lengths = np.linalg.norm(atoms, axis=1, keepdims=True)
    unit = atoms / np.maximum(lengths, 1e-12)
    all_chosen = np.zeros((len(targets), terms), np.int64)
    all_weights = np.zeros((len(targets), terms), np.float32)
    starts = range(0, len(targets), _BATCH)
    for start in Work("matching new rows with a donor's", starts, unit="batches"):
        wanted = targets[start : start + _BATCH]
        chosen = np.zeros((len(wanted), terms), np.int64)
        rest, weights = wanted, np.zeros((len(wanted), 0), np.float32)
        for term in range(terms):
            likeness = np.abs(rest @ unit.T)
            np.put_along_axis(likeness, chosen[:, :term], -1.0, axis=1)
            chosen[:, term] = likeness.argmax(axis=1)
            basis = atoms[chosen[:, : term + 1]]
            gram = basis @ basis.swapaxes(1, 2) + 1e-6 * np.eye(term + 1, dtype=np.float32)
            weights = np.linalg.solve(gram, basis @ wanted[:, :, None])[:, :, 0]
            rest = wanted - np.einsum("nt,ntw->nw", weights, basis)
        all_chosen[start : start + _BATCH], all_weights[start : start + _BATCH] = chosen, weights
    return all_chosen, all_weights


def donor_table(folder: Path) -> np.ndarray:
    """The input embedding of a folder of any family, float32 [rows, width]."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # the object is no dict
                if name.endswith(_EMBEDDING):
                    table: np.ndarray = tensors.get_tensor(name).astype(np.float32)
                    return table
    raise BadInput(
        f"{folder}: no safetensors file with a tensor *{_EMBEDDING}; a donor needs its input embedding"
    )


def _shared(ours: Vocabulary, theirs: Vocabulary, donor_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the tokens with the same bytes: int64[shared] each, ours and the donor's."""
    known = {theirs.bytes_of(text): number for text, number in theirs.ids.items() if number < donor_rows}
    pairs = []
    for text, number in ours.ids.items():
        other = known.get(ours.bytes_of(text))
        if other is not None:
            pairs.append((number, other))
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]
