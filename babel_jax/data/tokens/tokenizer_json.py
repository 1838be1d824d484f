"""Reads a tokenizer.json, which may come from a stranger, within bounds, and adds the added tokens of the
files beside it.
"""

import base64
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from babel_jax.data.tokens.special_tokens import ADDED_TOKENS, TOKENIZER_CONFIG, AddedToken, SideFiles
from babel_jax.errors import BadInput, one_line

MOST_TEMPLATE_IDS = 1_000  # that a post_processor adds to a text; published ones add at most 4
MOST_GROWTH = 1_000  # a normalizer may make a text so many times as long; U+2581 for a space is 3 in UTF-8


def loaded_tokenizer(description: Mapping[str, object], path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json's content, without padding and truncation.

    Raises BadInput if it cannot be read.
    """
    _check_bounds(description, path)
    try:
        with no_panic(path), quiet():
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    except BadInput:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise BadInput(f"{path}: not a readable tokenizer: {one_line(error, 200)}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def no_panic(path: Path) -> Iterator[None]:
    """Turns panics of the library, which are no Exception, into BadInput. Some damage shows with some texts
    only.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise BadInput(
            f"{path}: the tokenizer fails: {one_line(error, 200)}; fetch its files again"
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the library's report of a panic, some hundred lines, off the terminal. Used only while a
    tokenizer is opened.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_bounds(description: Mapping[str, Any], path: Path) -> None:
    """Raises BadInput for a tokenizer with random ids, with a normalizer or post_processor that lengthens a
    text without bound, or with a number by which the library would allocate memory without bound.
    """
    model = description.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise BadInput(
            f"{path}: model.dropout is {model['dropout']}: one text would get other ids each time; set it "
            "to null"
        )

    # Each replacement may be applied to the result of the one before, so their lengths multiply.
    growth = 1
    for part in _parts_of(description.get("normalizer")):
        for name in ("content", "prepend"):
            if isinstance(part.get(name), str):
                growth *= max(1, len(part[name].encode("utf-8", "replace")))
        if growth > MOST_GROWTH:
            raise BadInput(
                f"{path}: the normalizer can make a text over {MOST_GROWTH:,} times as long; fetch the "
                "tokenizer again"
            )
        if "precompiled_charsmap" in part and not _is_charsmap(part["precompiled_charsmap"]):
            raise BadInput(
                f"{path}: the normalizer's precompiled_charsmap is damaged; fetch the tokenizer again"
            )
    if (added := _template_ids(description.get("post_processor"))) > MOST_TEMPLATE_IDS:
        raise BadInput(
            f"{path}: the post_processor adds {added:,} tokens to a text; at most {MOST_TEMPLATE_IDS:,} are "
            "read"
        )


def _is_charsmap(charsmap: object) -> bool:
    """Whether a SentencePiece charsmap in base64 is as long as it says: the library allocates that much and
    aborts where memory ends.

    It begins with the bytes of its trie as uint32, little-endian (SentencePiece's normalizer.cc).
    """
    try:
        data = base64.b64decode(charsmap, validate=True) if isinstance(charsmap, str) else b""
    except ValueError:
        return False
    return len(data) >= 4 and int.from_bytes(data[:4], "little") <= len(data) - 4


def _template_ids(processor: object) -> int:
    """How many ids the templates of a post_processor add to a text."""
    added, waiting = 0, [processor]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        # A sequence of processors has others inside. A template names special tokens, each of which may be
        # many ids.
        inner, single, special = part.get("processors"), part.get("single"), part.get("special_tokens")
        waiting += inner if isinstance(inner, list) else []
        if not isinstance(single, list) or not isinstance(special, dict):
            continue
        for piece in single:
            named = piece.get("SpecialToken") if isinstance(piece, dict) else None
            entry = special.get(str(named.get("id"))) if isinstance(named, dict) else None
            ids = entry.get("ids") if isinstance(entry, dict) else None
            added += len(ids) if isinstance(ids, list) else 0
    return added


def _parts_of(normalizer: object) -> Iterator[dict[str, Any]]:
    """A normalizer of a tokenizer.json and all normalizers within it."""
    waiting = [normalizer]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part["normalizers"] if isinstance(part.get("normalizers"), list) else []


def parsed_tokenizer(content: bytes, path: Path) -> Any:
    """The value of a tokenizer.json.

    It uses plain json.loads: the checks of `files.parse_json` take a second for a vocabulary of 150,000.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable tokenizer: {one_line(error, 200)}") from None


def merged_tokens(
    description: object, side: SideFiles, path: Path
) -> tuple[list[AddedToken], list[AddedToken]]:
    """All added tokens, and those that side files add or change.

    They are also written into `description`, a tokenizer.json's content.
    """
    listed = description.get("added_tokens") if isinstance(description, dict) else None
    if not isinstance(description, dict) or not isinstance(listed, list | None):
        raise BadInput(f"{path}: not a readable tokenizer: an object with a list of added_tokens is needed")

    tokens: dict[str, AddedToken] = {}
    for token in listed or []:
        if (
            not isinstance(token, dict)
            or not isinstance(token.get("content"), str)
            or not isinstance(token.get("id"), int)
        ):
            raise BadInput(
                f"{path}: not a readable tokenizer: the added token {one_line(token, 100)} has no content "
                "and id"
            )
        flags = {
            name: bool(token.get(name))
            for name in ("special", "single_word", "lstrip", "rstrip", "normalized")
        }
        tokens[token["content"]] = AddedToken(token["content"], token["id"], **flags)

    # The same token with the same flags in both files needs no change.
    changed = [token for token in side.added if tokens.get(token.content) != token]
    for token in changed:
        known = tokens.get(token.content)
        if known is not None and known.id != token.id:
            raise BadInput(
                f"{path.parent}: the added token {token.content!r} has the id {known.id} in {path.name} and "
                f"{token.id} in the files beside it; correct {ADDED_TOKENS} or {TOKENIZER_CONFIG}"
            )
        # As in transformers, the flags of tokenizer_config.json are used; added_tokens.json has ids alone.
        if known is None or side.added_flags_hold:
            tokens[token.content] = token
    changed = [token for token in changed if tokens[token.content] is token]

    # A special token in the vocabulary counts as an added token even if no file lists it as one.
    for content in dict.fromkeys([*side.named.values(), *side.extra]):
        number = _vocabulary_id(description, content)
        if content not in tokens and number is not None:
            tokens[content] = AddedToken(content, number, special=True)
    description["added_tokens"] = [dataclasses.asdict(token) for token in tokens.values()]
    return list(tokens.values()), changed


def _vocabulary_id(description: Mapping[str, Any], token: str) -> int | None:
    """The id of a token in the vocabulary of a tokenizer.json: {token: id}, or [[token, score], ..] for
    unigram.
    """
    model = description.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        for index, entry in enumerate(vocabulary):
            if isinstance(entry, list) and entry[:1] == [token]:
                return index
        return None
    number = vocabulary.get(token) if isinstance(vocabulary, dict) else None
    return number if isinstance(number, int) else None


def check_ids(made: tokenizers.Tokenizer, added: Sequence[AddedToken], path: Path) -> None:
    """Raises BadInput if the library gives an added token another id than its file: the model would not know
    it.
    """
    for token in added:
        if made.token_to_id(token.content) != token.id:
            raise BadInput(
                f"{path.parent}: the added token {token.content!r} has the id {token.id} and the tokenizer "
                f"gives it {made.token_to_id(token.content)}; the ids of added tokens follow the vocabulary "
                "without a gap"
            )
