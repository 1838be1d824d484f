"""A tokenizer.json that may be a stranger's: read within bounds, with the added tokens of the files beside
it.
"""

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

MOST_GROWTH = 1_000  # times that normalization may lengthen a text by its replacements; 3 for U+2581 in UTF-8


def loaded_tokenizer(description: Mapping[str, object], path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json's content, without padding and truncation.

    Raises BadInput for one that cannot be read.
    """
    _check_bounds(description, path)
    try:
        with no_panic(path), quiet():
            made = tokenizers.Tokenizer.from_str(json.dumps(description))
    except BadInput:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise BadInput(f"{path}: not a readable tokenizer: {one_line(error, 200)}") from error
    made.no_padding()
    made.no_truncation()
    return made


@contextlib.contextmanager
def no_panic(path: Path) -> Iterator[None]:
    """The library's panics, which are no Exception, as BadInput: a tokenizer can be damaged so that only some
    text shows it.
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
    """Keeps the library's own report of a panic, some hundred lines, from the terminal; only where a
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
    """Raises BadInput for a tokenizer that would draw ids at random, or make a text longer without bound."""
    model = description.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise BadInput(
            f"{path}: model.dropout is {model['dropout']}: one text would get other ids each time; set it "
            "to null"
        )
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


def _parts_of(normalizer: object) -> Iterator[dict[str, Any]]:
    """A normalizer of a tokenizer.json and all that it holds."""
    waiting = [normalizer]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part["normalizers"] if isinstance(part.get("normalizers"), list) else []


def parsed_tokenizer(content: bytes, path: Path) -> Any:
    """The value of a tokenizer.json.

    Plain json.loads: the checks of `files.parse_json` cost a second for a vocabulary of 150,000.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable tokenizer: {one_line(error, 200)}") from None


def merged_tokens(
    description: object, side: SideFiles, path: Path
) -> tuple[list[AddedToken], list[AddedToken]]:
    """All added tokens, and those of them that side files add or change.

    They are put into `description`, a tokenizer.json's content.
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
    changed = [token for token in side.added if tokens.get(token.content) != token]
    for token in changed:
        known = tokens.get(token.content)
        if known is not None and known.id != token.id:
            raise BadInput(
                f"{path.parent}: the added token {token.content!r} has the id {known.id} in {path.name} and "
                f"{token.id} in the files beside "
                f"it; correct {ADDED_TOKENS} or {TOKENIZER_CONFIG}"
            )
        # What tokenizer_config.json says of a token holds, as in transformers; added_tokens.json says only
        # its id.
        if known is None or side.added_flags_hold:
            tokens[token.content] = token
    changed = [token for token in changed if tokens[token.content] is token]
    # A special token of the vocabulary that no file lists as added is one all the same.
    for content in dict.fromkeys([*side.named.values(), *side.extra]):
        number = _vocabulary_id(description, content)
        if content not in tokens and number is not None:
            tokens[content] = AddedToken(content, number, special=True)
    description["added_tokens"] = [dataclasses.asdict(token) for token in tokens.values()]
    return list(tokens.values()), changed


def _vocabulary_id(description: Mapping[str, Any], token: str) -> int | None:
    """The id of a token in the vocabulary of a tokenizer.json's model: {token: id}, or for a unigram model
    [[token, score], ..].
    """
    model = description.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        return next(
            (
                number
                for number, entry in enumerate(vocabulary)
                if isinstance(entry, list) and entry[:1] == [token]
            ),
            None,
        )
    number = vocabulary.get(token) if isinstance(vocabulary, dict) else None
    return number if isinstance(number, int) else None


def check_ids(made: tokenizers.Tokenizer, added: Sequence[AddedToken], path: Path) -> None:
    """The library numbers added tokens itself, so one whose file names another id would be a token that the
    model does not know.
    """
    for token in added:
        if made.token_to_id(token.content) != token.id:
            raise BadInput(
                f"{path.parent}: the added token {token.content!r} has the id {token.id} and the tokenizer "
                "gives it "
                f"{made.token_to_id(token.content)}; the ids of added tokens follow the vocabulary without "
                "a gap"
            )
