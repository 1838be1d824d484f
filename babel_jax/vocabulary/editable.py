"""A tokenizer as a vocabulary that can be extended: its kind, its tokens by id, and its words in tokens."""

import copy
import dataclasses
import functools
import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import tokenizers

from babel_jax.data.tokens.sentencepiece_models import as_tokenizer_json
from babel_jax.data.tokens.special_tokens import read_side_files
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.tokens.tokenizer_json import loaded_tokenizer, parsed_tokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from babel_jax.files import read_bytes
from babel_jax.model_files import MOST_TOKENIZER_BYTES, SENTENCEPIECE_MODEL, TOKENIZER_JSON
from babel_jax.vocabulary.words import SPACE, Splitter

# transformers adds missing special tokens in this order.
_ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class Kind(StrEnum):
    """The method by which a tokenizer splits words into tokens: by merges of bytes (GPT-2, Qwen, Llama 3), by
    merges of characters (Llama 2, Mistral, Gemma), or by the likeliest pieces.
    """

    BYTES = "byte-level BPE"
    PIECES = "BPE of characters"
    UNIGRAM = "unigram"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's content.

    description   the content of its tokenizer.json, or of an equivalent one
    model         the bytes of its tokenizer.model, if the folder has one
    texts         the token of each id, as the file writes it; an empty text for an id without a token
    added         the ids of the added tokens: special and chat tokens
    """

    tokenizer: Tokenizer
    kind: Kind
    description: dict[str, Any]
    model: bytes | None
    texts: list[str]
    added: dict[str, int]

    @property
    def folder(self) -> Path:
        """The folder of the tokenizer's files."""
        return self.tokenizer.path.parent

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token, without the added ones."""
        return {text: number for number, text in enumerate(self.texts) if text and text not in self.added}

    @functools.cached_property
    def library(self) -> tokenizers.Tokenizer:
        """The tokenizer of text, in which no added token counts."""
        description = copy.copy(self.description)
        description["added_tokens"] = []
        return loaded_tokenizer(description, self.tokenizer.path)

    @property
    def splitter(self) -> Splitter:
        """Splits text into the words in which tokens are."""
        return Splitter(self.library, in_pieces=self.kind is not Kind.BYTES)

    def tokens_of(self, word: str) -> list[int]:
        """The ids of a word."""
        return [token.id for token in self.library.model.tokenize(word)]

    def bytes_of(self, token: str) -> bytes:
        """The bytes of UTF-8 that a token stands for, with its space."""
        if self.kind is Kind.BYTES:
            # An added token may have letters that stand for no byte: it is text as it is.
            if not set(token) <= set(_BYTE_OF):
                return token.encode()
            return bytes(_BYTE_OF[letter] for letter in token)
        if _BYTE_PIECE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()


def open_vocabulary(path: Path | str) -> Vocabulary:
    """The vocabulary of a model folder, or of a tokenizer file.

    Raises BadInput as `open_tokenizer` does, and for a tokenizer that is neither BPE nor unigram.
    """
    tokenizer = open_tokenizer(path)
    folder = tokenizer.path.parent
    # A folder with both files keeps both: the model is extended beside its tokenizer.json.
    model = None
    if (folder / SENTENCEPIECE_MODEL).is_file() and tokenizer.path.name in (
        TOKENIZER_JSON,
        SENTENCEPIECE_MODEL,
    ):
        model = read_bytes(folder / SENTENCEPIECE_MODEL, folder, MOST_TOKENIZER_BYTES)
    if tokenizer.path.suffix == ".model":
        model = read_bytes(tokenizer.path, folder, MOST_TOKENIZER_BYTES)
        description = json.loads(as_tokenizer_json(model, str(tokenizer.path)))
    else:
        content = read_bytes(tokenizer.path, folder, MOST_TOKENIZER_BYTES)
        description = parsed_tokenizer(content, tokenizer.path)
    kind = _kind(description, tokenizer.path)
    # A tokenizer.model's user-defined pieces, such as Gemma's <start_of_turn>, are added tokens of its
    # tokenizer.json.
    added = {token["content"]: token["id"] for token in description.get("added_tokens") or ()}
    for token in tokenizer.added_tokens:
        added[token.content] = token.id
    # A unigram model lists its pieces by id; BPE maps texts to ids.
    listed = description["model"]["vocab"]
    ids = {entry[0]: number for number, entry in enumerate(listed)} if isinstance(listed, list) else listed
    texts = [""] * (max([*ids.values(), *added.values()], default=-1) + 1)
    for text, number in [*ids.items(), *added.items()]:
        texts[number] = text
    # These ids are taken: transformers gives them out when it loads the tokenizer.
    nameless = _named_without_id(folder, set(texts))
    entries = [*(description.get("added_tokens") or ())]
    for number, text in enumerate(nameless, len(texts)):
        added[text] = number
        entries.append(_special(text, number))
    description = description | {"added_tokens": entries}
    return Vocabulary(tokenizer, kind, description, model, [*texts, *nameless], added)


def _named_without_id(folder: Path, known: set[str]) -> list[str]:
    """Special tokens that a folder names and its tokenizer lacks, such as a [PAD] of a fine-tuned Llama.

    transformers gives them the ids after the last one, in the order of special_tokens_map.json. New tokens
    must not take these ids.
    """
    side = read_side_files(folder)
    names = sorted(side.named, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    tokens = [*(side.named[name] for name in names), *side.extra]
    return [token for token in dict.fromkeys(tokens) if token and token not in known]


def _special(token: str, number: int) -> dict[str, Any]:
    """A special token as tokenizer.json lists it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


def _kind(description: dict[str, Any], path: Path) -> Kind:
    model = description["model"]
    kind = model.get("type")
    if kind == "Unigram":
        return Kind.UNIGRAM
    affixes = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if kind != "BPE" or affixes:
        what = f"a BPE tokenizer with a {affixes[0]}" if kind == "BPE" else f"a tokenizer of type {kind}"
        raise BadInput(f"{path}: {what}; BPE of bytes or characters, and unigram, are supported")
    return Kind.BYTES if _has_byte_level(description.get("pre_tokenizer")) else Kind.PIECES


def _has_byte_level(pre_tokenizer: Any) -> bool:
    if not isinstance(pre_tokenizer, dict):
        return False
    inner = pre_tokenizer.get("pretokenizers") or []
    return pre_tokenizer.get("type") == "ByteLevel" or any(map(_has_byte_level, inner))


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2, Radford et al. 2019): printable
    Latin-1 letters for themselves, all others by letters from U+0100 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + number) for number, byte in enumerate(others)}


_BYTE_OF = {letter: byte for byte, letter in byte_letters().items()}
