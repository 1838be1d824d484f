"""The figures of one language in a folder of prepared data.

Quality scores and samples are of the held-out documents, which are a random choice (by the hash of their
ids).
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from babel_jax.config import Source
from babel_jax.data.windows.prepared import PreparedData

_SAMPLES, _SAMPLE_CHARACTERS, BINS = 3, 400, 10
# Rows that are no training text, beside those that cleaning drops: the key in a language's part of the
# report, its name for readers, and the reason.
FATES = {
    "bad": ("unreadable", "the row cannot be read; data.bad_rows"),
    "empty": ("empty", "no text in the row"),
    "duplicates": ("duplicates", "the text of another row; [data.deduplication]"),
    "overlaps": ("also held out", "the text is held out under another id"),
    "reserved": ("held out in other languages", "chosen by data.heldout_fraction, after data.heldout_bytes"),
}


@dataclasses.dataclass(frozen=True)
class LanguageStatistics:
    """The figures of one language.

    - kinds: documents, tokens, bytes and windows of each kind
    - dropped: documents by the rule that dropped them
    - sources: the counts of each source
    - scores: the number of documents in each tenth of the quality score, from low to high; empty if rows have
      no score
    - samples: the beginnings of some texts
    """

    code: str
    kinds: dict[str, dict[str, int]]
    rows: int
    heldout_documents: int
    fates: dict[str, int]
    dropped: dict[str, int]
    sources: dict[str, dict[str, Any]]
    tokens_per_character: float | None
    scores: list[int]
    samples: list[str]

    def total(self, name: str) -> int:
        """The sum over all kinds of documents, tokens, bytes or windows."""
        return sum(counts[name] for counts in self.kinds.values())

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 per token. A high value means that the tokenizer suits the language."""
        return self.total("bytes") / max(1, self.total("tokens"))


def language_statistics(prepared: PreparedData, code: str) -> LanguageStatistics:
    """The figures of one language."""
    entry, heldout = prepared.report["languages"][code], prepared.heldout(code)
    cleaning: dict[str, dict[str, Any]] = entry.get("cleaning", {})
    dropped = sum((Counter(source["dropped"]) for source in cleaning.values()), Counter[str]())
    kinds = {}
    for kind, counts in entry["kinds"].items():
        kinds[kind] = {name: counts[name] for name in ("documents", "tokens", "bytes", "windows")}

    # The report counts bytes but no characters: characters per byte are those of the held-out text.
    heldout_characters = sum(len(row.text) for row in heldout)
    heldout_bytes = sum(len(row.text.encode()) for row in heldout)
    tokens = sum(counts["tokens"] for counts in kinds.values())
    text_bytes = sum(counts["bytes"] for counts in kinds.values())
    tokens_per_character = None
    if heldout_characters and text_bytes:
        tokens_per_character = tokens / text_bytes * heldout_bytes / heldout_characters

    scores = [row.score for row in heldout if row.score is not None]
    return LanguageStatistics(
        code=code,
        kinds=kinds,
        rows=entry["rows"],
        heldout_documents=entry["heldout_documents"],
        fates={name: entry[name] for name in FATES},
        dropped=dict(dropped.most_common()),
        sources=cleaning or _sources(entry["sources"]),
        tokens_per_character=tokens_per_character,
        scores=_histogram(scores),
        samples=[_shortened(row.text) for row in heldout[:_SAMPLES]],
    )


def _sources(made_from: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The licence of each source, by the label that reports use."""
    licences = {}
    for entry in made_from:
        # The entry also has the origin of the text, which is no setting.
        settings = {name: value for name, value in entry.items() if name in Source.model_fields}
        source = Source(**settings)
        licences[source.label] = {"licence": source.licence}
    return licences


def _histogram(scores: Sequence[float]) -> list[int]:
    """The number of scores in each tenth from 0 to 1; scores outside count in the first or last tenth."""
    return np.histogram(np.clip(scores, 0.0, 1.0), BINS, (0.0, 1.0))[0].tolist() if scores else []


def _shortened(text: str) -> str:
    return text if len(text) <= _SAMPLE_CHARACTERS else text[:_SAMPLE_CHARACTERS] + " …"
