"""Checks that a model folder's tokenizer fits its embedding.

The files are read as data only, because libraries that run tokenizers may end the process on damaged ones.
"""

import logging
import re
from pathlib import Path
from typing import Any

from babel_jax.errors import BadInput
from babel_jax.files import read_bytes, read_json
from babel_jax.model_files import MOST_TOKENIZER_BYTES, SENTENCEPIECE_MODEL, TOKENIZER_JSON

_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
_PADDING = re.compile(r"[<\[]\|?pad\|?[>\]]", re.IGNORECASE)

log = logging.getLogger("babel")


def check_vocabulary(folder: Path, embedding_rows: int, needed: bool = False) -> None:
    """Raises BadInput if the tokenizer in `folder` has ids without a row in the embedding, or if it is
    `needed` and missing.

    More rows than tokens are usual: Qwen2.5 has 152,064 rows for 151,665 tokens. A padding token without a
    row is only logged: some models (WizardLM) have one that was added to the tokenizer but not to the
    embedding, and no text has it.
    """
    ids = _ids(folder)
    if ids is None and needed:
        raise BadInput(
            f"{folder}: no tokenizer ({TOKENIZER_JSON} or {SENTENCEPIECE_MODEL}); copy the model's "
            "tokenizer files there"
        )

    # An id beyond the rows would read another row without an error.
    beyond = {token: number for token, number in (ids or {}).items() if number >= embedding_rows}
    if beyond and all(map(is_padding, beyond)):
        log.warning(
            "%s: the padding token %s has no row in the embedding; it is never used here",
            folder,
            next(iter(beyond)),
        )
    elif beyond:
        raise BadInput(
            f"{folder}: the tokenizer has ids up to {max(beyond.values())} and the embedding has "
            f"{embedding_rows} rows (vocab_size in config.json); one of the two belongs to another model"
        )


def tokenizer_size(folder: Path) -> int | None:
    """The highest id of a folder's tokenizer + 1; None if there is no tokenizer that this project reads."""
    ids = _ids(folder)
    return max(ids.values(), default=-1) + 1 if ids is not None else None


def is_padding(token: str) -> bool:
    """True if a token is named as a padding token: <pad>, [PAD], <|pad|>."""
    return bool(_PADDING.fullmatch(token))


def _ids(folder: Path) -> dict[str, int] | None:
    """The ids of all tokens; None if there is no tokenizer in a form that this project reads."""
    try:
        try:
            values = read_json(folder / TOKENIZER_JSON, folder, MOST_TOKENIZER_BYTES, unique_keys=False)
        except BadInput as error:
            raise BadInput(f"{folder}: the tokenizer cannot be read: {error}") from None
        ids = _ids_of_json(values, folder / TOKENIZER_JSON)
    except FileNotFoundError:
        try:
            pieces = read_bytes(folder / SENTENCEPIECE_MODEL, folder, MOST_TOKENIZER_BYTES)
        except FileNotFoundError:
            return None
        ids = _ids_of_pieces(pieces, folder / SENTENCEPIECE_MODEL)
    # Tokens of the files beside it count too: a tokenizer of transformers has them.
    return {**ids, **_added(folder)}


def _ids_of_json(values: Any, path: Path) -> dict[str, int]:
    try:
        vocabulary = values["model"]["vocab"]
        # A unigram model has a list of pairs (piece, score), other models {token: id}.
        if isinstance(vocabulary, list):
            ids = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        else:
            ids = {str(token): int(number) for token, number in vocabulary.items()}
        for token in values.get("added_tokens") or ():
            ids[str(token["content"])] = int(token["id"])
        return ids
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{path}: the tokenizer cannot be read: no vocabulary of tokens with ids ({error!r}); fetch it "
            "again"
        ) from None


def _ids_of_pieces(model: bytes, path: Path) -> dict[str, int]:
    # Imported where they are used: most folders have a tokenizer.json.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        parsed = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise BadInput(f"{path}: the tokenizer cannot be read: {error}; fetch it again") from None
    return {piece.piece: number for number, piece in enumerate(parsed.pieces)}


def _added(folder: Path) -> dict[str, int]:
    """The ids of tokens that only the files beside the tokenizer name."""
    try:
        added = _object(folder, _ADDED)
        by_id = _object(folder, _CONFIG).get("added_tokens_decoder") or {}
        added = {token: int(number) for token, number in added.items()}
        return {**added, **{token["content"]: int(number) for number, token in by_id.items()}}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{folder}: {_ADDED} or added_tokens_decoder in {_CONFIG} does not give tokens with their ids "
            f"({error!r})"
        ) from None


def _object(folder: Path, name: str) -> dict[str, Any]:
    try:
        values = read_json(folder / name, folder)
    except FileNotFoundError:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"{folder / name}: a JSON object is needed")
    return values
