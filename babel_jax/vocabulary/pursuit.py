"""Rows of new tokens from a donor: a model of any family and width whose vocabulary has more of the
languages.

By orthogonal matching pursuit (Pati et al. 1993; for vocabularies arXiv 2506.06607), a donor's row of the new
token is written as a sparse sum of donor rows of tokens that both vocabularies have. The same sum of our own
rows of these tokens is the new row. Both are counted from the mean of all rows. In SmolLM2 this mean is over
half as long as a row: without it the new tokens are too likely everywhere.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from babel_jax.buckets import is_url
from babel_jax.config import RowInit
from babel_jax.errors import BadInput
from babel_jax.hub.models import hub_model
from babel_jax.hub.names import hub_name
from babel_jax.model_folders.object_storage import stand_in
from babel_jax.model_folders.safetensors_files import StoredTensors
from babel_jax.progress import Work
from babel_jax.vocabulary.editable import Vocabulary, open_vocabulary
from babel_jax.vocabulary.extension import NewRow
from babel_jax.vocabulary.growth import Growth, mean_growth

TERMS = 8  # old rows in the sum for one new row
_BATCH = 512  # new rows that are worked on together
_LEAST_SHARED = 1_000  # tokens that both vocabularies must have
# The ends of the names of an input embedding: of Llama, Qwen, Mistral and Gemma; BERT, XLM-R, E5 and BLOOM;
# GPT-2; GPT-NeoX; T5.
_EMBEDDINGS = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
    "shared.weight",
)


class Donor(NamedTuple):
    """A donor's vocabulary, its input embedding float32 [rows, width], and the ids of the tokens that both
    vocabularies have, in ours and in the donor's: int64[shared] each.
    """

    vocabulary: Vocabulary
    table: np.ndarray
    ours: np.ndarray
    theirs: np.ndarray


def open_donor(vocabulary: Vocabulary, donor: Path | str) -> Donor:
    """A donor: its tokenizer, and its input embedding in safetensors files.

    donor: a folder, a bucket's URL, or a name on the hub. Raises BadInput if the donor has no such tensor, or
    shares fewer than 1,000 tokens with the vocabulary.
    """
    path = donor_place(donor)
    donor_vocabulary = open_vocabulary(path)
    table = donor_table(path)
    ours, theirs = _shared(vocabulary, donor_vocabulary, len(table))
    if len(ours) < _LEAST_SHARED:
        raise BadInput(
            f"{path}: shares {len(ours):,} tokens with the model; at least {_LEAST_SHARED:,} are needed. "
            'Give another donor, or leave init = "donor" out'
        )
    return Donor(donor_vocabulary, table, ours, theirs)


def donor_growth(
    vocabulary: Vocabulary, rows: Sequence[NewRow], donor: Donor, old_rows: int, all_rows: int
) -> Growth:
    """The growth by a donor.

    A new token that the donor writes in several tokens has the mean of their rows. One that is no whole text,
    such as half of a character, is the mean of its parts.
    """
    # Counted from the mean: see the top of this file.
    ours, center = donor.ours, donor.table[donor.theirs].mean(axis=0)
    table = donor.table - center
    growth = mean_growth(rows, RowInit.PARTS, old_rows, all_rows)
    numbers, targets = [], []
    for number, row in enumerate(sorted(rows, key=lambda row: row.id)):
        pieces = _pieces(donor.vocabulary, vocabulary.bytes_of(row.text), len(table))
        target = table[pieces].mean(axis=0) if pieces else np.zeros(table.shape[1], np.float32)
        if np.any(target):
            numbers.append(number)
            targets.append(target)

    # Rows that the donor cannot give keep the means of `growth`, so both share its columns.
    chosen, weights = pursue(table[donor.theirs], np.stack(targets) if targets else table[:0], TERMS)
    columns = ((0, 0), (0, max(0, TERMS - growth.sources.shape[1])))
    sources, factors = np.pad(growth.sources, columns), np.pad(growth.weights, columns)
    sources[numbers], factors[numbers] = 0, 0
    sources[numbers, :TERMS], factors[numbers, :TERMS] = ours[chosen], weights
    return dataclasses.replace(growth, sources=sources, weights=factors)


def donor_place(donor: Path | str) -> Path:
    """The donor's folder on disk, or the one that stands in for it."""
    name, text = hub_name(donor), str(donor)
    if name is not None:
        return hub_model(name)
    return Path(stand_in(text)) if is_url(text) else Path(donor)


def _pieces(donor: Vocabulary, content: bytes, rows: int) -> list[int]:
    """The donor's ids of a token's text; empty if the token is no whole text, or an id has no row."""
    try:
        ids = donor.library.encode(content.decode(), add_special_tokens=False).ids
    except UnicodeDecodeError:
        return []
    # Some donors put a space before every text, as a piece of its own.
    letters = [number for number in ids if donor.bytes_of(donor.texts[number]).strip()]
    ids = letters or ids
    return ids if all(number < rows for number in ids) else []


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
            # An atom that is chosen already would make the system of weights singular.
            np.put_along_axis(likeness, chosen[:, :term], -1.0, axis=1)
            chosen[:, term] = likeness.argmax(axis=1)
            basis = atoms[chosen[:, : term + 1]]
            # The small number keeps it solvable if two atoms are nearly the same.
            gram = basis @ basis.swapaxes(1, 2) + 1e-6 * np.eye(term + 1, dtype=np.float32)
            weights = np.linalg.solve(gram, basis @ wanted[:, :, None])[:, :, 0]
            # What the chosen atoms together do not explain, for the next step.
            rest = wanted - np.einsum("nt,ntw->nw", weights, basis)
        all_chosen[start : start + _BATCH], all_weights[start : start + _BATCH] = chosen, weights
    return all_chosen, all_weights


def donor_table(folder: Path) -> np.ndarray:
    """The input embedding of a folder of any family, float32 [rows, width]."""
    stored = StoredTensors(folder)
    for end in _EMBEDDINGS:
        for name in stored.file_of:
            if name.endswith(end) and len(stored.shape(name)) == 2:
                return stored.read_rows(name, 0, stored.shape(name)[0]).astype(np.float32)
    raise BadInput(
        f"{folder}: no tensor is named *{', *'.join(_EMBEDDINGS)}; a donor needs its input embedding"
    )


def _shared(ours: Vocabulary, theirs: Vocabulary, donor_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the tokens with the same bytes: int64[shared] each, ours and the donor's."""
    # A tokenizer may have more ids than its model has rows.
    known = {}
    for text, number in theirs.ids.items():
        if number < donor_rows:
            known[theirs.bytes_of(text)] = number
    pairs = []
    for text, number in ours.ids.items():
        other = known.get(ours.bytes_of(text))
        if other is not None:
            pairs.append((number, other))
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]
