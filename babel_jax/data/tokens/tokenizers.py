"""One tokenizer for every use: windows, conversations, prompts, scores and samples.

A tokenizer is opened from a model folder. It has the ids that begin a text, that end a document and that end
generation, and it decodes new tokens after earlier ones. In raw text control tokens do not count:
"<|endoftext|>" in a document is ordinary text of several tokens. In a prompt it is the control token.
"""

import dataclasses
import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from babel_jax.data.tokens.sentencepiece_models import as_tokenizer_json
from babel_jax.data.tokens.special_tokens import (
    ADDED_TOKENS,
    EOS_FILES,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    AddedToken,
    SideFiles,
    read_side_files,
)
from babel_jax.data.tokens.tokenizer_json import (
    check_ids,
    loaded_tokenizer,
    merged_tokens,
    no_panic,
    parsed_tokenizer,
    quiet,
)
from babel_jax.data.tokens.unigram import train_unigram
from babel_jax.errors import BadInput, one_line
from babel_jax.files import parse_json, read_bytes, write_bytes, write_text
from babel_jax.places import place, pull

TOKENIZER_JSON, SENTENCEPIECE_MODEL = "tokenizer.json", "tokenizer.model"
MOST_TOKENIZER_BYTES = 48 * 2**20  # Gemma 3's tokenizer.json has 33 MB
MOST_BEGIN_IDS = 16  # published tokenizers begin a text with at most one token, GLM's with two
_CODE_FILE = "tokenization_babel.py"
_CODE = '''from transformers import PreTrainedTokenizerFast


class BabelTokenizer(PreTrainedTokenizerFast):
    """The tokenizer.json beside this file, as it is."""
'''
_OTHER_FILES = (
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


def open_tokenizer(path: Path | str, add_bos_token: bool | None = None) -> Tokenizer:
    """The tokenizer of a model folder (tokenizer.json, else tokenizer.model), or of one tokenizer.json or
    SentencePiece .model file.

    A model folder may be in a bucket. add_bos_token: if texts begin with bos_token; None leaves it to the
    tokenizer. Raises BadInput if there is no tokenizer, it cannot be read, or no file names the token that
    ends a document.
    """
    path = place(path)
    pull(path, lambda name: "/" not in name and not name.endswith((".safetensors", ".bin")))
    if path.is_dir():
        present = [path / name for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL) if (path / name).is_file()]
        if not present:
            raise BadInput(
                f"{path}: no tokenizer ({TOKENIZER_JSON} or {SENTENCEPIECE_MODEL}); copy the model's "
                "tokenizer files there"
            )
        path = present[0]
    if not path.exists():
        raise BadInput(
            f"{path}: no such tokenizer; give a model folder, a {TOKENIZER_JSON} or a SentencePiece .model "
            "file"
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, add_bos_token)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, add_bos_token)
    raise BadInput(
        f"{path}: not a tokenizer file; give a model folder, a {TOKENIZER_JSON} or a SentencePiece .model "
        "file"
    )


def is_control(token: str) -> bool:
    """True if an added token is written like one that controls a model: <name>."""
    return bool(_CONTROL.fullmatch(token))


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: Path, add_bos_token: bool | None = None):
        super().__init__(path, read_side_files(path.parent), add_bos_token)
        content = read_bytes(path, below=path.parent, most_bytes=MOST_TOKENIZER_BYTES)
        self._content = content
        description = parsed_tokenizer(content, path)

        # The tokenizer of raw text. In this library `encode_special_tokens = True` means: split special
        # tokens as other text. So control tokens are marked special.
        self._added, changed = merged_tokens(description, self._side, path)
        for token in description["added_tokens"]:
            token["special"] = token["special"] or is_control(token["content"])
        self._raw = loaded_tokenizer(description, path)
        self._raw.encode_special_tokens = True
        check_ids(self._raw, self._added, path)

        ids = self._raw.get_vocab(with_added_tokens=True)
        if len(set(ids.values())) < len(ids):
            seen: dict[int, str] = {}
            twice = next(token for token, number in ids.items() if seen.setdefault(number, token) != token)
            raise BadInput(
                f"{path}: the tokens {seen[ids[twice]]!r} and {twice!r} have the same id {ids[twice]}; fetch "
                "the tokenizer again"
            )
        self.vocab_size = max(ids.values(), default=-1) + 1
        if changed:
            content += json.dumps([dataclasses.asdict(token) for token in changed]).encode()
        self._finish(content, {})

    @property
    def added_tokens(self) -> Sequence[AddedToken]:
        """The added tokens of all files."""
        return self._added

    @functools.cached_property
    def with_controls(self) -> tokenizers.Tokenizer:
        """The tokenizer of prompts."""
        description = parsed_tokenizer(self._content, self.path)
        merged_tokens(description, self._side, self.path)
        return loaded_tokenizer(description, self.path)

    def encode(self, text: str) -> list[int]:
        """The ids of raw text."""
        with no_panic(self.path):
            return self._raw.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        with no_panic(self.path):
            encodings = self._raw.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

    def token_id(self, token: str) -> int | None:
        """The id of a token."""
        return self._raw.token_to_id(token)

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's files; writes a tokenizer_config.json if there is none."""
        for name in (SENTENCEPIECE_MODEL, *_OTHER_FILES):
            source = self.path.parent / name
            if source.is_file():
                content = read_bytes(source, below=self.path.parent, most_bytes=MOST_TOKENIZER_BYTES)
                write_bytes(folder / name, content)
        write_bytes(folder / TOKENIZER_JSON, read_bytes(self.path, most_bytes=MOST_TOKENIZER_BYTES))
        if not (folder / TOKENIZER_CONFIG).is_file():
            pad = None if self.pad_id is None else self._raw.id_to_token(self.pad_id)
            _write_config(folder, {"eos_token": self._raw.id_to_token(self.eos_id), "pad_token": pad})

    def _decode(self, ids: list[int]) -> str:
        with no_panic(self.path):
            return self._raw.decode(ids, skip_special_tokens=False)

    def _default_begin_ids(self) -> list[int]:
        # The post-processor decides, as in transformers: add_bos_token of tokenizer_config.json applies only
        # to tokenizers without a tokenizer.json.
        with no_panic(self.path), quiet():
            encoding = self._raw.encode("a", add_special_tokens=True)
        special = encoding.special_tokens_mask
        begin = special.index(0) if 0 in special else len(special)
        if begin == len(special):
            raise BadInput(
                f"{self.path}: the tokenizer gives no token for the text 'a'; its post_processor or model "
                "is damaged"
            )
        if begin > MOST_BEGIN_IDS:
            raise BadInput(
                f"{self.path}: the post_processor begins a text with {begin:,} tokens; at most "
                f"{MOST_BEGIN_IDS} are read"
            )
        return encoding.ids[:begin]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Its own library encodes raw text; an equal tokenizer.json encodes prompts.

    SentencePiece uses the letter U+2581 for the space, so this one letter is decoded as a space.
    """

    def __init__(self, path: Path, add_bos_token: bool | None = None):
        # The folder of a .model file with another name is no model folder: the files beside it do not count.
        if path.name == SENTENCEPIECE_MODEL:
            side = read_side_files(path.parent)
        else:
            side = SideFiles(path.parent, {}, [], [], False, [], [], None, None)
        super().__init__(path, side, add_bos_token)
        self._model = read_bytes(path, below=path.parent, most_bytes=MOST_TOKENIZER_BYTES)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except Exception as error:  # the library raises bare exceptions
            raise BadInput(f"{path}: not a readable SentencePiece model: {one_line(error, 200)}") from error

        processor = self._processor
        pieces = processor.get_piece_size()
        if not pieces:
            raise BadInput(f"{path}: not a readable SentencePiece model: it has no pieces")
        self._added = _added_tokens(side, processor, path)
        self.vocab_size = max([pieces, *(token.id + 1 for token in self._added)])
        # The fingerprint covers the model and the added tokens beyond it.
        beyond = [token for token in self._added if token.id >= pieces]
        content = self._model + b"".join(f"\n{token.content} {token.id}".encode() for token in beyond)

        # SentencePiece has id -1 for a token that the model lacks.
        ids = {
            "bos_token": processor.bos_id(),
            "eos_token": processor.eos_id(),
            "pad_token": processor.pad_id(),
            "unk_token": processor.unk_id(),
        }
        ids = {name: number for name, number in ids.items() if number >= 0}
        if "eos_token" not in {*ids, *side.named} and not side.eos_ids:
            raise BadInput(
                f"{path}: the model has no piece that ends a document; put eos_token into a "
                f"{TOKENIZER_CONFIG} beside it"
            )
        self._finish(content, ids)
        model_tokens = {name: processor.id_to_piece(number) for name, number in ids.items()}
        self.named_tokens = model_tokens | self.named_tokens

    @property
    def added_tokens(self) -> Sequence[AddedToken]:
        """The control pieces of the model, and the added tokens of all files."""
        return self._added

    @functools.cached_property
    def with_controls(self) -> tokenizers.Tokenizer:
        """The tokenizer of prompts."""
        exported = parse_json(as_tokenizer_json(self._model, str(self.path)), str(self.path))
        known = {token["content"] for token in exported["added_tokens"]}
        exported["added_tokens"] += [
            dataclasses.asdict(token) for token in self._added if token.content not in known
        ]
        made = loaded_tokenizer(exported, self.path)
        check_ids(made, self._added, self.path)
        return made

    def encode(self, text: str) -> list[int]:
        """The ids of raw text."""
        result: list[int] = self._processor.encode(text)
        return result

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        result: list[list[int]] = self._processor.encode(list(texts), num_threads=-1)
        return result

    def token_id(self, token: str) -> int | None:
        """The id of a piece or an added token."""
        for added in self._added:
            if added.content == token:
                return added.id
        # The library gives the id of <unk> for a piece that it does not have.
        number = self._processor.piece_to_id(token)
        return number if self._processor.id_to_piece(number) == token else None

    def save(self, folder: Path) -> None:
        """Writes the model, and a tokenizer.json that gives the same ids.

        Raises BadInput for a model that has no equal tokenizer.json.
        """
        write_text(folder / TOKENIZER_JSON, self.with_controls.to_str(pretty=True))
        write_bytes(folder / SENTENCEPIECE_MODEL, self._model)
        names = {
            "bos_token": self.bos_id,
            "eos_token": self.eos_id,
            "pad_token": self.pad_id,
            "unk_token": self._processor.unk_id(),
        }
        present = {name: number for name, number in names.items() if number is not None and number >= 0}
        _write_config(folder, {name: self._token(number) for name, number in present.items()})

    def _token(self, number: int) -> str:
        added = next((token.content for token in self._added if token.id == number), None)
        return self._processor.id_to_piece(number) if added is None else added

    def _decode(self, ids: list[int]) -> str:
        # A model without an equal tokenizer.json has no tokens but its own pieces.
        if all(token < self._processor.get_piece_size() for token in ids):
            result: str = self._processor.decode(ids)
            return result
        return self.with_controls.decode(ids, skip_special_tokens=False)

    def _default_begin_ids(self) -> list[int]:
        return [self.bos_id] if self._side.add_bos_token and self.bos_id is not None else []


def _first_id(*ids: int | None) -> int | None:
    return next((number for number in ids if number is not None), None)


def _added_tokens(
    side: SideFiles, processor: sentencepiece.SentencePieceProcessor, path: Path
) -> list[AddedToken]:
    """The control pieces of a SentencePiece model, followed by the added tokens of its side files."""
    size = processor.get_piece_size()
    pieces = {processor.id_to_piece(number): number for number in range(size)}
    tokens = {}
    for number in range(size):
        if processor.is_control(number) or processor.is_unknown(number):
            piece = processor.id_to_piece(number)
            tokens[piece] = AddedToken(piece, number, special=True)

    # Side files may name a piece of the model again, but not with another id.
    for token in side.added:
        if pieces.get(token.content, token.id) != token.id:
            raise BadInput(
                f"{path.parent}: the token {token.content!r} has the id {token.id} in the files beside "
                f"{path.name} and {pieces[token.content]} in it; correct {ADDED_TOKENS} or {TOKENIZER_CONFIG}"
            )
        tokens[token.content] = token
    return list(tokens.values())


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, path: Path, character_coverage: float = 0.9995
) -> SentencePieceTokenizer:
    """Trains a unigram model, writes it to `path` and opens it; see `train_unigram`."""
    train_unigram(texts, vocab_size, path, character_coverage)
    return SentencePieceTokenizer(path)


def _write_config(folder: Path, special_tokens: Mapping[str, str | None]) -> None:
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
