"""The files of an extended tokenizer, so written that `tokenizers`, transformers (fast and slow),
SentencePiece and llama.cpp read the same ids from them.

- Added tokens are entries of the vocabulary too, with their own ids: `tokenizers` gives an added token that
  the vocabulary lacks the first id after the vocabulary, which would now be another one.
- New merges come after all old ones, in the spelling of the file.
- vocab.json and merges.txt, from which slow tokenizers read, are written where the folder has them.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Protocol buffers make this class at import, so mypy does not see it.
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from babel_jax.data.tokens.special_tokens import TOKENIZER_CONFIG, read_object
from babel_jax.data.tokens.tokenizer import write_config
from babel_jax.files import read_text, write_bytes, write_text
from babel_jax.model_files import SENTENCEPIECE_MODEL, TOKENIZER_JSON
from babel_jax.vocabulary.editable import Kind, Vocabulary
from babel_jax.vocabulary.marks import GPT2_PATTERN, QWEN2_PATTERN, patterns
from babel_jax.vocabulary.merges import Learned
from babel_jax.vocabulary.unigram_scores import new_scores

_EXACT = -(2.0**23)  # float32 has all whole numbers above it, and room for as many new ones
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Classes of transformers with a pattern of their own.
_PATTERN_OF = {"GPT2Tokenizer": GPT2_PATTERN, "Qwen2Tokenizer": QWEN2_PATTERN}
VOCAB_JSON, MERGES_TXT = "vocab.json", "merges.txt"


def extended_description(
    base: Vocabulary,
    new: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    learned: Learned,
) -> dict[str, Any]:
    """The content of tokenizer.json with new tokens. base: its `texts` are empty where a token is replaced.

    new: the id of each new token. merges: the new merges, in order."""
    description = copy.copy(base.description)
    model = description["model"] = copy.copy(description["model"])
    if base.kind is Kind.UNIGRAM:
        model["vocab"] = new_scores(base, new, learned)
        return description

    # Without the tokens that are replaced; with the added ones, whose ids must not move.
    kept = set(base.texts)
    vocabulary = {text: number for text, number in model["vocab"].items() if text in kept}
    # Ids after the last entry: added tokens among them need entries too (see the top of this file).
    if new and max(new.values()) >= len(vocabulary):
        vocabulary |= base.added
    model["vocab"] = dict(sorted({**vocabulary, **new}.items(), key=lambda entry: entry[1]))
    # Older files write a merge as "a b", newer ones as ["a", "b"].
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    old = model["merges"]
    if len(vocabulary) < len(model["vocab"]) - len(new) or "" in base.texts:
        old = [entry for entry in old if _is_kept(entry, kept)]
    # SentencePiece may reach a piece by any of its splits, so all of them are listed.
    ordered = merges if base.kind is Kind.BYTES else _all_splits(base, new, merges)
    model["merges"] = [*old, *(" ".join(pair) if as_text else list(pair) for pair in ordered)]
    return description


def _is_kept(entry: Any, kept: set[str]) -> bool:
    left, right = entry.split(" ", 1) if isinstance(entry, str) else entry
    return {left, right, left + right} <= kept


def _all_splits(
    base: Vocabulary, new: Mapping[str, int], merges: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The merges of new pieces as SentencePiece has them: any two pieces that make a new one, in the order of
    the new ones. Merges into old pieces come first.
    """
    known = {text for text in base.texts if text} | set(new)
    into_old = [pair for pair in merges if pair[0] + pair[1] not in new]
    splits = list(dict.fromkeys(into_old))
    for piece in new:
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                splits.append((piece[:cut], piece[cut:]))
    return splits


def extended_model(base: Vocabulary, new: Mapping[str, int], description: Mapping[str, Any]) -> bytes:
    """The tokenizer.model with new pieces. A piece's score decides when it is made: each new one comes after
    all before it. Ids of added tokens beyond the model become control pieces of these names.
    """
    assert base.model is not None
    proto = ModelProto.FromString(base.model)
    kinds = ModelProto.SentencePiece
    texts = dict(enumerate(base.texts)) | {number: text for text, number in new.items()}
    # In published models the scores of merged pieces are their ranks. Some characters and runs of spaces have
    # -1e9, where float32 knows no steps of 1: they do not count.
    ranks = [piece.score for piece in proto.pieces if piece.type == kinds.NORMAL]
    lowest = min((score for score in ranks if score > _EXACT), default=0.0)
    scores = dict(description["model"]["vocab"]) if base.kind is Kind.UNIGRAM else {}
    order = {text: number for number, text in enumerate(new)}
    for number in range(len(proto.pieces), max(texts) + 1):
        proto.pieces.add(piece=texts[number], score=0.0, type=kinds.CONTROL)
    for text, number in new.items():
        score = scores[text] if scores else lowest - 1.0 - order[text]
        proto.pieces[number].piece, proto.pieces[number].type = text, kinds.NORMAL
        proto.pieces[number].score = score
    proto.trainer_spec.vocab_size = len(proto.pieces)
    result: bytes = proto.SerializeToString(deterministic=True)
    return result


def _is_read_as_it_is(base: Vocabulary, folder: Path) -> bool:
    """False if the class in tokenizer_config.json may replace the pre-tokenizer of tokenizer.json.

    transformers 5 does that for classes of one model family without a word (its issue 45488). For the parent
    it may change little; new tokens need the words that they were learned from.
    """
    name = read_object(folder / TOKENIZER_CONFIG).get("tokenizer_class")
    if base.kind is not Kind.BYTES or not isinstance(name, str) or name in _GENERIC_CLASSES:
        return True
    return patterns(base.description["pre_tokenizer"]) == [_PATTERN_OF.get(name.removesuffix("Fast"))]


def write_tokenizer_files(
    base: Vocabulary, description: Mapping[str, Any], model: bytes | None, folder: Path
) -> None:
    """Writes the tokenizer's files into a folder that already has the other files of the old tokenizer."""
    is_json = base.tokenizer.path.suffix == ".json"
    if is_json:
        write_text(folder / TOKENIZER_JSON, json.dumps(description, ensure_ascii=False, indent=2) + "\n")
    if model is not None:
        write_bytes(folder / SENTENCEPIECE_MODEL, model)
        # The folder's tokenizer is its model; a tokenizer.json beside it would be the old one's.
        if not is_json and (folder / TOKENIZER_JSON).is_file():
            (folder / TOKENIZER_JSON).unlink()
    if (folder / VOCAB_JSON).is_file():
        write_text(folder / VOCAB_JSON, json.dumps(description["model"]["vocab"], ensure_ascii=False))
    if (folder / MERGES_TXT).is_file():
        # The first line names the version of the format.
        head = read_text(folder / MERGES_TXT, folder, 2**27).partition("\n")[0]
        lines = [head] if head.startswith("#version") else []
        for entry in description["model"]["merges"]:
            lines.append(entry if isinstance(entry, str) else " ".join(entry))
        write_text(folder / MERGES_TXT, "\n".join(lines) + "\n")
    changed = description["pre_tokenizer"] != base.description["pre_tokenizer"]
    if is_json and (changed or not _is_read_as_it_is(base, folder)):
        # The settings of our class replace those of the same name; all others stay.
        before = read_object(folder / TOKENIZER_CONFIG)
        write_config(folder, {})
        after = read_object(folder / TOKENIZER_CONFIG)
        write_text(folder / TOKENIZER_CONFIG, json.dumps({**before, **after}, indent=2) + "\n")
