"""Tokenizers behind one small interface: Hugging Face's tokenizer.json and SentencePiece models.

Raw text never yields a control token: "<|endoftext|>" in a document is tokenized as the letters that it is.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from babel_jax.data.unigram import as_tokenizer_json, train_unigram
from babel_jax.errors import BadInput
from babel_jax.files import write_bytes, write_text

TOKENIZER_JSON, SENTENCEPIECE_MODEL, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
# Where the id that ends a document is looked for, in this order. generation_config.json comes first since it is what generation stops at.
EOS_FILES = ("generation_config.json", "config.json", TOKENIZER_CONFIG)
_CODE_FILE = "tokenization_babel.py"
_CODE = '''from transformers import PreTrainedTokenizerFast


class BabelTokenizer(PreTrainedTokenizerFast):
    """The tokenizer.json beside this file, as it is."""
'''
_OTHER_FILES = (
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    _CODE_FILE,
)
# Qwen marks <think> and <|fim_prefix|> as ordinary added tokens, though they steer a model as its special ones do.
_CONTROL = re.compile(r"<[^\s<>]+>")


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer."""

    @property
    def path(self) -> Path:
        """The file that it is read from."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""

    @property
    def pad_id(self) -> int | None:
        """The id for padding, where the model names one."""

    @property
    def fingerprint(self) -> str:
        """A digest of the vocabulary and of eos_id: equal for tokenizers that give the same ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of raw text: no id is added before or after, and none stands for a control token."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give no text."""

    def save(self, folder: Path) -> None:
        """Writes the files with which `transformers.AutoTokenizer` gives the same ids into a model folder."""


def open_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a model folder (tokenizer.json, else tokenizer.model), or of one tokenizer.json or SentencePiece .model file.

    Raises BadInput when there is none, it cannot be read, or nothing says which token ends a document.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL) if (path / name).is_file()]
        if not found:
            raise BadInput(f"{path}: no tokenizer ({TOKENIZER_JSON} or {SENTENCEPIECE_MODEL}); copy the model's tokenizer files there")
        path = found[0]
    if not path.is_file():
        raise BadInput(f"{path}: no such tokenizer; give a model folder, a {TOKENIZER_JSON} or a SentencePiece .model file")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise BadInput(f"{path}: not a tokenizer file; give a model folder, a {TOKENIZER_JSON} or a SentencePiece .model file")


def is_control(token: str) -> bool:
    """Whether an added token is written like one that steers a model: <name>."""
    return bool(_CONTROL.fullmatch(token))


class HuggingFaceTokenizer:
    """A tokenizer.json, run by the `tokenizers` library; what its folder's configs say of eos and pad goes with it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            content = path.read_bytes()
            description = json.loads(content)
            added = description.get("added_tokens", [])
            self._special_ids = frozenset(token["id"] for token in added if token["special"])
            for token in added:
                token["special"] = token["special"] or is_control(token["content"])
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises bare exceptions
            raise BadInput(f"{path}: not a readable tokenizer: {' '.join(str(error).split())[:200]}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        folder = path.parent
        eos_id = _folder_id(folder, "eos_token", self._tokenizer.token_to_id)
        if eos_id is None:
            raise BadInput(f"{folder}: nothing says which token ends a document; put eos_token into a {TOKENIZER_CONFIG} there")
        self.eos_id = _in_vocabulary(eos_id, self.vocab_size, path)
        self.pad_id = _folder_id(folder, "pad_token", self._tokenizer.token_to_id)
        self.fingerprint = _fingerprint(content, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Ids of raw text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without the special tokens."""
        return self._tokenizer.decode([token for token in ids if token not in self._special_ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's files; a tokenizer_config.json is written where there is none."""
        for name in (SENTENCEPIECE_MODEL, *_OTHER_FILES):
            if (self.path.parent / name).is_file():
                write_bytes(folder / name, (self.path.parent / name).read_bytes())
        write_bytes(folder / TOKENIZER_JSON, self.path.read_bytes())
        if not (folder / TOKENIZER_CONFIG).is_file():
            pad = None if self.pad_id is None else self._tokenizer.id_to_token(self.pad_id)
            _write_config(folder, {"eos_token": self._tokenizer.id_to_token(self.eos_id), "pad_token": pad})


class SentencePieceTokenizer:
    """A SentencePiece model, run by its own library.

    Inside SentencePiece the letter U+2581 stands for the space, so this one letter comes back as a space.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._model = path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except Exception as error:  # the library raises bare exceptions
            raise BadInput(f"{path}: not a readable SentencePiece model: {' '.join(str(error).split())[:200]}") from error
        self.vocab_size = self._processor.get_piece_size()
        eos_id = _folder_id(path.parent, "eos_token", self._piece_id) if path.name == SENTENCEPIECE_MODEL else None
        eos_id = self._processor.eos_id() if eos_id is None else eos_id
        if eos_id < 0:
            raise BadInput(f"{path}: the model has no piece that ends a document; put eos_token into a {TOKENIZER_CONFIG} beside it")
        self.eos_id = _in_vocabulary(eos_id, self.vocab_size, path)
        pad_id = self._processor.pad_id()
        self.pad_id = None if pad_id < 0 else pad_id
        self.fingerprint = _fingerprint(self._model, self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Ids of raw text."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return self._processor.encode(list(texts), num_threads=-1)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control pieces."""
        return self._processor.decode([int(token) for token in ids])

    def save(self, folder: Path) -> None:
        """Writes the model beside a tokenizer.json that gives the same ids. Raises BadInput for a model that none can reproduce."""
        exported = as_tokenizer_json(self._model, str(self.path))
        write_text(folder / TOKENIZER_JSON, exported)
        write_bytes(folder / SENTENCEPIECE_MODEL, self._model)
        names = {
            "bos_token": self._processor.bos_id(),
            "eos_token": self.eos_id,
            "pad_token": self.pad_id,
            "unk_token": self._processor.unk_id(),
        }
        present = {name: number for name, number in names.items() if number is not None and number >= 0}
        _write_config(folder, {name: self._processor.id_to_piece(number) for name, number in present.items()})

    def _piece_id(self, piece: str) -> int | None:
        found = self._processor.piece_to_id(piece)
        return found if self._processor.id_to_piece(found) == piece else None


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path, character_coverage: float = 0.9995) -> SentencePieceTokenizer:
    """Trains a unigram model, writes it to `path` and opens it; see `unigram.train_unigram`."""
    train_unigram(texts, vocab_size, path, character_coverage)
    return SentencePieceTokenizer(path)


@dataclasses.dataclass(frozen=True)
class Fertility:
    """How many tokens a tokenizer spends on a language's text."""

    tokens: int
    characters: int
    bytes: int

    @property
    def tokens_per_character(self) -> float:
        """Tokens for each Unicode code point."""
        return self.tokens / self.characters

    @property
    def tokens_per_byte(self) -> float:
        """Tokens for each byte of UTF-8."""
        return self.tokens / self.bytes


def fertility(tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]]) -> dict[str, Fertility]:
    """The fertility on texts of each language; languages without any character are left out."""
    counted = {}
    for language, own in texts.items():
        tokens = sum(map(len, tokenizer.encode_batch(own)))
        characters = sum(map(len, own))
        if characters:
            counted[language] = Fertility(tokens, characters, sum(len(text.encode()) for text in own))
    return counted


def _folder_id(folder: Path, name: str, id_of: Callable[[str], int | None]) -> int | None:
    """The id of `eos_token` or `pad_token`, from the first of the folder's files that names it; the first of several ids."""
    for file in EOS_FILES:
        if not (folder / file).is_file():
            continue
        try:
            values = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder / file}: not readable JSON: {error}") from None
        if not isinstance(values, dict):
            raise BadInput(f"{folder / file}: a JSON object is needed")
        found = values.get(f"{name}_id")
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
        token = values.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            number = id_of(token)
            if number is None:
                raise BadInput(f"{folder / file}: {name} is {token!r}, which the tokenizer does not have")
            return number
    return None


def _in_vocabulary(eos_id: int, vocab_size: int, path: Path) -> int:
    if not 0 <= eos_id < vocab_size:
        raise BadInput(
            f"{path.parent}: eos_token_id is {eos_id} and the tokenizer's ids end at {vocab_size - 1}; correct {', '.join(EOS_FILES)}"
        )
    return eos_id


def _fingerprint(content: bytes, eos_id: int) -> str:
    return hashlib.sha256(content + f"\n{eos_id}".encode()).hexdigest()


def _write_config(folder: Path, special_tokens: Mapping[str, str | None]) -> None:
    """The tokenizer_config.json with which transformers 4 and 5 take tokenizer.json as it is.

    transformers 5 puts Qwen's own tokenizer class in the place of whatever class a model of type qwen2 names, and so gives other ids,
    unless the folder has code for a class of its own; whether it may run that code (trust_remote_code) makes no difference to the ids.
    """
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, f"{_CODE_FILE.removesuffix('.py')}.BabelTokenizer"]},
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in special_tokens.items() if token is not None},
    }
    write_text(folder / _CODE_FILE, _CODE)
    write_text(folder / TOKENIZER_CONFIG, json.dumps(values, indent=2) + "\n")
