"""What every tokenizer has: the ids that begin and end texts, and decoding after earlier tokens."""

import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from babel_jax.data.tokens.special_tokens import (
    ADDED_TOKENS,
    EOS_FILES,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    AddedToken,
    SideFiles,
)
from babel_jax.data.tokens.tokenizer_json import (
    no_panic,
)
from babel_jax.errors import BadInput
from babel_jax.files import write_text

_CODE_FILE = "tokenization_babel.py"


_CODE = '''from transformers import PreTrainedTokenizerFast


class BabelTokenizer(PreTrainedTokenizerFast):
    """The tokenizer.json beside this file, as it is."""
'''


OTHER_FILES = (
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    ADDED_TOKENS,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    _CODE_FILE,
)


# Qwen marks <think> and <|fim_prefix|> as ordinary added tokens, though they control a model as special
# tokens do.
_CONTROL = re.compile(r"<[^\s<>]+>")


class Tokenizer(ABC):
    """A tokenizer with the special tokens that the files of its folder name.

    path          the file that it is read from
    vocab_size    the highest id + 1
    eos_id        the id that ends a document
    pad_id        the id for padding; None if the model names none
    bos_id        the id of bos_token; None if the model names none
    begin_ids     the ids at the start of every text: [bos_id] for Llama, Gemma and Mistral, none for Qwen
    stop_ids      generation ends at any of these ids
    fingerprint   a digest of the tokenizer file and of eos_id: equal fingerprints give the same ids
    named_tokens  the tokens whose names a chat template may use: {"bos_token": "<s>", ..}
    """

    vocab_size: int

    def __init__(self, path: Path, side: SideFiles, add_bos_token: bool | None):
        self.path = path
        self._side = side
        self._add_bos_token = add_bos_token
        self.named_tokens = dict(side.named)

    def _finish(self, content: bytes, defaults: Mapping[str, int]) -> None:
        """Sets eos_id, bos_id, pad_id, stop_ids, begin_ids and fingerprint. The subclass must have
        `vocab_size` and `token_id` by then.

        content: the bytes that decide the ids. defaults: the ids of bos_token, eos_token and pad_token, used
        if no side file names them.
        """
        named_eos = self._named_id("eos_token")
        # A model's config may name several ids at which generation stops. The first one ends a document.
        eos_id = _first_id(*self._side.eos_ids[:1], named_eos, defaults.get("eos_token"))
        if eos_id is None:
            folder, named = self.path.parent, self._side.named.get("eos_token")
            if named:
                raise BadInput(
                    f"{folder}: eos_token is {named!r}, which the tokenizer does not have; correct "
                    f"{', '.join(EOS_FILES)}"
                )
            raise BadInput(
                f"{folder}: nothing says which token ends a document; put eos_token into a "
                f"{TOKENIZER_CONFIG} there"
            )
        if not 0 <= eos_id < self.vocab_size:
            raise BadInput(
                f"{self.path.parent}: eos_token_id is {eos_id} and the tokenizer's ids end at "
                f"{self.vocab_size - 1}; correct {', '.join(EOS_FILES)}"
            )

        # Side files come before the tokenizer's own defaults.
        self.eos_id = eos_id
        self.bos_id = _first_id(self._named_id("bos_token"), defaults.get("bos_token"))
        self.pad_id = _first_id(self._side.pad_id, self._named_id("pad_token"), defaults.get("pad_token"))
        stops = {self.eos_id, *self._side.stop_ids}
        self.stop_ids = tuple(sorted(stops if named_eos is None else stops | {named_eos}))
        self.begin_ids = self._begin_ids()
        self.fingerprint = hashlib.sha256(content + f"\n{eos_id}".encode()).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of raw text: no id is added before or after, and no id is a control token."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""

    @property
    @abstractmethod
    def added_tokens(self) -> Sequence[AddedToken]:
        """The added tokens of all files."""

    @property
    @abstractmethod
    def with_controls(self) -> tokenizers.Tokenizer:
        """The tokenizer of prompts, in which an added token in a text is one token.

        Raises BadInput for a SentencePiece model that has no equal tokenizer.json.
        """

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token; None if the vocabulary does not have it."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes files into a model folder with which `transformers.AutoTokenizer` gives the same ids."""

    def encode_prompt(self, text: str, begin: bool | None = None) -> list[int]:
        """The ids of a prompt, in which control tokens count.

        begin: True puts `begin_ids` first, False does not. None does so unless the text begins with them.
        """
        with no_panic(self.path):
            ids = self.with_controls.encode(text, add_special_tokens=False).ids
        if begin is None:
            begin = ids[: len(self.begin_ids)] != self.begin_ids
        return [*self.begin_ids, *ids] if begin else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids.

        Special tokens give no text unless `skip_special` is False. Ids outside the vocabulary give no text.
        """
        hidden = self._special_ids if skip_special else frozenset()
        kept = [int(token) for token in ids if 0 <= token < self.vocab_size and token not in hidden]
        return self._decode(kept)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add after the ids `before`.

        It can differ from `decode(ids)`: the decoders of Llama 2 and Mistral drop the space before the first
        word.
        """
        first, whole = self.decode(before), self.decode([*before, *ids])
        # If `before` ends within a character, that character is complete only in `whole`: the two texts
        # differ from there on.
        common = 0
        while common < min(len(first), len(whole)) and first[common] == whole[common]:
            common += 1
        return whole[common:]

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids, including special tokens."""

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self.added_tokens if token.special)

    def _named_id(self, name: str) -> int | None:
        token = self._side.named.get(name)
        return self.token_id(token) if token else None

    def _begin_ids(self) -> list[int]:
        if self._add_bos_token is None:
            return self._default_begin_ids()
        if self._add_bos_token and self.bos_id is None:
            raise BadInput(
                f"{self.path.parent}: data.add_bos_token is true, and no bos_token of the folder is in the "
                "vocabulary"
            )
        return [self.bos_id] if self._add_bos_token and self.bos_id is not None else []

    @abstractmethod
    def _default_begin_ids(self) -> list[int]:
        """The ids at the start of a text if no setting changes them."""


def is_control(token: str) -> bool:
    """True if an added token is written like one that controls a model: <name>."""
    return bool(_CONTROL.fullmatch(token))


def _first_id(*ids: int | None) -> int | None:
    return next((number for number in ids if number is not None), None)


def write_config(folder: Path, special_tokens: Mapping[str, str | None]) -> None:
    """Writes a tokenizer_config.json with which transformers 4 and 5 use tokenizer.json unchanged.

    For a model of type qwen2, transformers 5 replaces the tokenizer class by Qwen's own, which gives other
    ids, unless the folder has code for a class. The ids are the same whether it may run that code
    (trust_remote_code) or not.
    """
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, f"{_CODE_FILE.removesuffix('.py')}.BabelTokenizer"]},
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in special_tokens.items() if token is not None},
    }
    write_text(folder / _CODE_FILE, _CODE)
    write_text(folder / TOKENIZER_CONFIG, json.dumps(values, indent=2) + "\n")
