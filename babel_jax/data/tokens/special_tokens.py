"""The special tokens that the files of a model folder name, read as `transformers` reads them: for the start
and end of a text and for padding.

    tokenizer_config.json     bos_token, eos_token, ..; added_tokens_decoder; add_bos_token
    special_tokens_map.json   the same names; read, as in transformers, only without an added_tokens_decoder
    added_tokens.json         {token: id}; read in the same case
    generation_config.json, config.json   eos_token_id, one id or several
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.errors import BadInput
from babel_jax.files import read_json
from babel_jax.model_files import CONFIG

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
GENERATION_CONFIG = "generation_config.json"
# The id that ends a document is taken from the first of these files that has one. Generation stops at the
# ids of generation_config.json, so this file comes first.
EOS_FILES = (GENERATION_CONFIG, CONFIG, TOKENIZER_CONFIG)
MOST_ADDED_TOKENS = 1_000_000  # in one folder; published tokenizers have at most some thousands
MOST_TOKEN_CHARACTERS = 1_000  # of one added token
HIGHEST_ID = 2**31 - 1  # ids are int32
_STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_LISTS = ("extra_special_tokens", "additional_special_tokens")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is matched in a text before the tokenizer's rules apply; the flags are those of
    `tokenizers`.
    """

    content: str
    id: int
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclasses.dataclass(frozen=True)
class SideFiles:
    """The content of the files beside a tokenizer.

    - named: the tokens whose names a chat template may use, such as {"bos_token": "<s>"}
    - extra: further special tokens
    - added: the added tokens
    - added_flags_hold: True if the file of the added tokens has their flags, not only their ids
    - eos_ids: the ids of generation_config.json, else of config.json; the first ends a document
    - stop_ids: the ids of both files
    - add_bos_token: None if no file has it
    """

    folder: Path
    named: Mapping[str, str]
    extra: Sequence[str]
    added: Sequence[AddedToken]
    added_flags_hold: bool
    eos_ids: Sequence[int]
    stop_ids: Sequence[int]
    pad_id: int | None
    add_bos_token: bool | None


def read_side_files(folder: Path) -> SideFiles:
    """The side files of a model folder; any of them may be missing.

    Raises BadInput for values of the wrong type.
    """
    config = read_object(folder / TOKENIZER_CONFIG)
    named, extra = _names(config, folder / TOKENIZER_CONFIG)
    # Newer tokenizers list all added tokens here; older ones have two more files.
    if config.get("added_tokens_decoder") is not None:
        added = _decoder_tokens(config["added_tokens_decoder"], folder / TOKENIZER_CONFIG)
    else:
        path = folder / SPECIAL_TOKENS_MAP
        more_named, more_extra = _names(read_object(path), path)
        named |= more_named
        extra += [token for token in more_extra if token not in extra]
        added = _listed_tokens(
            read_object(folder / ADDED_TOKENS), {*named.values(), *extra}, folder / ADDED_TOKENS
        )
    if len(added) > MOST_ADDED_TOKENS:
        raise BadInput(f"{folder}: {len(added):,} added tokens; at most {MOST_ADDED_TOKENS:,} are read")

    # The ids of generation_config.json come before those of config.json.
    generation, model = folder / GENERATION_CONFIG, folder / CONFIG
    generation_eos = _ids(read_object(generation), "eos_token_id", generation)
    model_eos = _ids(read_object(model), "eos_token_id", model)
    pad_ids = _pad_ids(read_object(generation), generation) + _pad_ids(read_object(model), model)
    return SideFiles(
        folder,
        named,
        extra,
        added,
        added_flags_hold=config.get("added_tokens_decoder") is not None,
        eos_ids=generation_eos or model_eos,
        stop_ids=list(dict.fromkeys([*generation_eos, *model_eos])),
        pad_id=pad_ids[0] if pad_ids else None,
        add_bos_token=_flag(config, "add_bos_token", folder / TOKENIZER_CONFIG),
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file in a model folder; empty if there is no such file.

    Raises BadInput if it cannot be read.
    """
    try:
        values = read_json(path, below=path.parent)
    except FileNotFoundError:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"{path}: a JSON object is needed")
    return values


def _names(values: Mapping[str, Any], path: Path) -> tuple[dict[str, str], list[str]]:
    """The named special tokens, and the further ones, of tokenizer_config.json or special_tokens_map.json."""
    named: dict[str, str] = {}
    for name, value in values.items():
        # Models may name tokens of their own, such as image_token. A flag such as add_bos_token is no token.
        if name not in _STANDARD_NAMES and not (name.endswith("_token") and isinstance(value, str | dict)):
            continue
        if value is not None:
            named[name] = _content(value, name, path)
    extra: list[str] = []
    for name in _EXTRA_LISTS:
        value = values.get(name)
        if isinstance(value, dict):
            named |= {key: _content(token, f"{name}.{key}", path) for key, token in value.items()}
        elif isinstance(value, list):
            extra += [_content(token, name, path) for token in value]
        elif value is not None:
            raise BadInput(f"{path}: {name} is {value!r}; a list of tokens is needed")
    return named, extra


def _content(value: Any, name: str, path: Path) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise BadInput(f"{path}: {name} is {value!r}; a token as a string is needed")
    if len(text) > MOST_TOKEN_CHARACTERS:
        raise BadInput(
            f"{path}: {name} has {len(text):,} characters; at most {MOST_TOKEN_CHARACTERS:,} are read"
        )
    return text


def _decoder_tokens(values: Any, path: Path) -> list[AddedToken]:
    """The tokens of an added_tokens_decoder: {"151643": {"content": "<|endoftext|>", "special": true, ..},
    ..}.
    """
    if not isinstance(values, dict):
        raise BadInput(f"{path}: added_tokens_decoder is no JSON object")
    tokens = []
    for number, value in values.items():
        name = f"added_tokens_decoder.{number}"
        if not number.isascii() or not number.isdigit() or not isinstance(value, dict):
            raise BadInput(
                f"{path}: {name} is {value!r}; an id with an object that has its content is needed"
            )
        # Without a flag `normalized`, transformers normalizes a token unless it is special.
        special = value.get("special", False)
        flags = {"normalized": not special} | {
            key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in value
        }
        if not all(isinstance(flag, bool) for flag in (special, *flags.values())):
            raise BadInput(f"{path}: {name} has a flag that is neither true nor false")
        tokens.append(
            AddedToken(
                _content(value, name, path), _checked_id(int(number[:12]), name, path), special, **flags
            )
        )
    return sorted(tokens, key=lambda token: token.id)


def _listed_tokens(values: Mapping[str, Any], special: set[str], path: Path) -> list[AddedToken]:
    """The tokens of an added_tokens.json: {"<pad>": 32000, ..}."""
    tokens = []
    for content, number in values.items():
        # This file has ids alone; whether a token is special is known from the names.
        is_special = content in special
        number = _checked_id(number, content, path)
        tokens.append(
            AddedToken(_content(content, content, path), number, is_special, normalized=not is_special)
        )
    return sorted(tokens, key=lambda token: token.id)


def _ids(values: Mapping[str, Any], name: str, path: Path) -> list[int]:
    """The ids under a name: one id, or a list of them; empty if the value is null or missing."""
    value = values.get(name)
    if value is None:
        return []
    numbers = value if isinstance(value, list) else [value]
    return [_checked_id(number, name, path) for number in numbers]


def _pad_ids(values: Mapping[str, Any], path: Path) -> list[int]:
    """The id of padding, if any; Llama's first configs have -1 for none."""
    return [] if values.get("pad_token_id") == -1 else _ids(values, "pad_token_id", path)


def _checked_id(number: Any, name: str, path: Path) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= HIGHEST_ID:
        raise BadInput(f"{path}: {name} is {number!r}; a token id from 0 to {HIGHEST_ID:,} is needed")
    return number


def _flag(values: Mapping[str, Any], name: str, path: Path) -> bool | None:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadInput(f"{path}: {name} is {value!r}; true or false is needed")
    return value
