"""One tokenizer for every use: windows, conversations, prompts, scores and samples.

A tokenizer is opened from a model folder. It says which ids a text begins with, which end a document, which
end what a model writes, and how new tokens read after others. In raw text no control token counts:
"<|endoftext|>" in a document is tokenized as the letters that it is. In a prompt it is the control token.
"""

import dataclasses
import functools
import hashlib
import itertools
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
MOST_BEGIN_IDS = 16  # published tokenizers begin a text with one token, GLM's with two
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
# Qwen marks <think> and <|fim_prefix|> as ordinary added tokens, though they steer a model as its special
# ones do.
_CONTROL = re.compile(r"<[^\s<>]+>")


class Tokenizer(ABC):
    """A tokenizer and what its folder's files say of its tokens.

    path          the file that it is read from
    vocab_size    one more than the highest id
    eos_id        the id that ends a document
    pad_id        the id for padding, None where the model names none
    bos_id        the id of bos_token, None where the model names none
    begin_ids     the ids that every text begins with: [bos_id] for Llama, Gemma and Mistral, none for Qwen
    stop_ids      any of these ids ends what a model writes
    fingerprint   a digest of the vocabulary and of eos_id: equal for tokenizers that give the same ids
    named_tokens  the tokens that a chat template may name: {"bos_token": "<s>", ..}
    """

    vocab_size: int

    def __init__(self, path: Path, side: SideFiles, add_bos_token: bool | None):
        self.path = path
        self._side = side
        self._add_bos_token = add_bos_token
        self.named_tokens = dict(side.named)

    def _finish(self, content: bytes, defaults: Mapping[str, int]) -> None:
        """Fills the attributes above; the subclass knows `vocab_size` and `token_id` by now.

        The ids depend on `content`. `defaults` are the ids of bos_token, eos_token and pad_token where no
        side file names them.
        """
        named_eos = self._named_id("eos_token")
        eos_id = _first_id(*self._side.eos_ids[:1], named_eos, defaults.get("eos_token"))
        if eos_id is None:
            where, named = self.path.parent, self._side.named.get("eos_token")
            if named:
                raise BadInput(
                    f"{where}: eos_token is {named!r}, which the tokenizer does not have; correct "
                    f"{', '.join(EOS_FILES)}"
                )
            raise BadInput(
                f"{where}: nothing says which token ends a document; put eos_token into a "
                f"{TOKENIZER_CONFIG} there"
            )
        if not 0 <= eos_id < self.vocab_size:
            raise BadInput(
                f"{self.path.parent}: eos_token_id is {eos_id} and the tokenizer's ids end at "
                f"{self.vocab_size - 1}; "
                f"correct {', '.join(EOS_FILES)}"
            )
        self.eos_id = eos_id
        self.bos_id = _first_id(self._named_id("bos_token"), defaults.get("bos_token"))
        self.pad_id = _first_id(self._side.pad_id, self._named_id("pad_token"), defaults.get("pad_token"))
        stops = {self.eos_id, *self._side.stop_ids}
        self.stop_ids = tuple(sorted(stops if named_eos is None else stops | {named_eos}))
        self.begin_ids = self._begin_ids()
        self.fingerprint = hashlib.sha256(content + f"\n{eos_id}".encode()).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of raw text: no id is added before or after, and none stands for a control token."""

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
        """The tokenizer of prompts: an added token in a text is that token.

        Raises BadInput for a SentencePiece model without one.
        """

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token; None where the vocabulary does not have it."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the files with which `transformers.AutoTokenizer` gives the same ids into a model folder."""

    def encode_prompt(self, text: str, begin: bool | None = None) -> list[int]:
        """The ids of a prompt, in which control tokens count. `begin` says whether `begin_ids` come first.

        Where it is None they do, unless the text itself begins with these tokens.
        """
        with no_panic(self.path):
            ids = self.with_controls.encode(text, add_special_tokens=False).ids
        if begin is None:
            begin = ids[: len(self.begin_ids)] != self.begin_ids
        return [*self.begin_ids, *ids] if begin else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids.

        Special tokens give no text, unless `skip_special` is False; nor do ids beyond the vocabulary.
        """
        hidden = self._special_ids if skip_special else frozenset()
        kept = [int(token) for token in ids if 0 <= token < self.vocab_size and token not in hidden]
        return self._decode(kept)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of ids that follow others.

        It can differ from `decode(ids)`: Llama 2's and Mistral's decoders take the space from the first word
        of whatever they decode.
        """
        first, whole = self.decode(before), self.decode([*before, *ids])
        # A character that `before` ends inside of is complete only in `whole`, so the two texts can differ
        # there.
        same = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, whole, strict=False))
        )
        return whole[same:]

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids, special ones too."""

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self.added_tokens if token.special)

    def _named_id(self, name: str) -> int | None:
        token = self._side.named.get(name)
        return self.token_id(token) if token else None

    def _begin_ids(self) -> list[int]:
        if self._add_bos_token is None:
            return self._own_begin_ids()
        if self._add_bos_token and self.bos_id is None:
            raise BadInput(
                f"{self.path.parent}: data.add_bos_token is true, and no bos_token of the folder is in the "
                "vocabulary"
            )
        return [self.bos_id] if self._add_bos_token and self.bos_id is not None else []

    @abstractmethod
    def _own_begin_ids(self) -> list[int]:
        """The ids that the tokenizer itself begins a text with."""


def open_tokenizer(path: Path | str, add_bos_token: bool | None = None) -> Tokenizer:
    """The tokenizer of a model folder (tokenizer.json, else tokenizer.model), or of one tokenizer.json or
    SentencePiece .model file.

    A model folder may be in a bucket. `add_bos_token` says whether texts begin with bos_token; where it is
    None the tokenizer decides. Raises BadInput when there is no tokenizer, it cannot be read, or nothing says
    which token ends a document.
    """
    path = place(path)
    pull(path, lambda name: "/" not in name and not name.endswith((".safetensors", ".bin")))
    if path.is_dir():
        found = [path / name for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL) if (path / name).is_file()]
        if not found:
            raise BadInput(
                f"{path}: no tokenizer ({TOKENIZER_JSON} or {SENTENCEPIECE_MODEL}); copy the model's "
                "tokenizer files there"
            )
        path = found[0]
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
    """Whether an added token is written like one that steers a model: <name>."""
    return bool(_CONTROL.fullmatch(token))


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: Path, add_bos_token: bool | None = None):
        super().__init__(path, read_side_files(path.parent), add_bos_token)
        content = read_bytes(path, below=path.parent, most_bytes=MOST_TOKENIZER_BYTES)
        self._content = content
        description = parsed_tokenizer(content, path)
        self._added, changed = merged_tokens(description, self._side, path)
        for token in description["added_tokens"]:
            token["special"] = token["special"] or is_control(token["content"])
        self._raw = loaded_tokenizer(description, path)
        self._raw.encode_special_tokens = True
        check_ids(self._raw, self._added, path)
        self.vocab_size = max(self._raw.get_vocab(with_added_tokens=True).values(), default=-1) + 1
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
        """Ids of raw text."""
        with no_panic(self.path):
            return self._raw.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        with no_panic(self.path):
            return [
                encoding.ids
                for encoding in self._raw.encode_batch_fast(list(texts), add_special_tokens=False)
            ]

    def token_id(self, token: str) -> int | None:
        """The id of a token."""
        return self._raw.token_to_id(token)

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's files; a tokenizer_config.json is written where there is none."""
        for name in (SENTENCEPIECE_MODEL, *_OTHER_FILES):
            if (self.path.parent / name).is_file():
                write_bytes(
                    folder / name,
                    read_bytes(
                        self.path.parent / name, below=self.path.parent, most_bytes=MOST_TOKENIZER_BYTES
                    ),
                )
        write_bytes(folder / TOKENIZER_JSON, read_bytes(self.path, most_bytes=MOST_TOKENIZER_BYTES))
        if not (folder / TOKENIZER_CONFIG).is_file():
            pad = None if self.pad_id is None else self._raw.id_to_token(self.pad_id)
            _write_config(folder, {"eos_token": self._raw.id_to_token(self.eos_id), "pad_token": pad})

    def _decode(self, ids: list[int]) -> str:
        with no_panic(self.path):
            return self._raw.decode(ids, skip_special_tokens=False)

    def _own_begin_ids(self) -> list[int]:
        # The post-processor decides, as in transformers: add_bos_token of tokenizer_config.json is for
        # tokenizers without this file.
        with no_panic(self.path), quiet():
            encoding = self._raw.encode("a", add_special_tokens=True)
        added = encoding.special_tokens_mask
        begin = added.index(0) if 0 in added else len(added)
        if begin == len(added):
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
    """A SentencePiece model. Raw text is run by its own library, prompts by the equal tokenizer.json.

    Inside SentencePiece the letter U+2581 stands for the space, so this one letter comes back as a space.
    """

    def __init__(self, path: Path, add_bos_token: bool | None = None):
        # A .model file of another name stands alone: the files beside it belong to no model folder.
        is_folder = path.name == SENTENCEPIECE_MODEL
        side = (
            read_side_files(path.parent)
            if is_folder
            else SideFiles(path.parent, {}, [], [], False, [], [], None, None)
        )
        super().__init__(path, side, add_bos_token)
        self._model = read_bytes(path, below=path.parent, most_bytes=MOST_TOKENIZER_BYTES)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except Exception as error:  # the library raises bare exceptions
            raise BadInput(f"{path}: not a readable SentencePiece model: {one_line(error, 200)}") from error
        pieces = self._processor.get_piece_size()
        self._added = _beyond_model(side, self._processor, path)
        self.vocab_size = max([pieces, *(token.id + 1 for token in self._added)])
        content = self._model + b"".join(
            f"\n{token.content} {token.id}".encode() for token in self._added if token.id >= pieces
        )
        processor = self._processor
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
        self.named_tokens = {
            name: processor.id_to_piece(number) for name, number in ids.items()
        } | self.named_tokens

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
        """Ids of raw text."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return self._processor.encode(list(texts), num_threads=-1)

    def token_id(self, token: str) -> int | None:
        """The id of a piece or an added token."""
        added = next((one.id for one in self._added if one.content == token), None)
        if added is not None:
            return added
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None

    def save(self, folder: Path) -> None:
        """Writes the model beside a tokenizer.json that gives the same ids.

        Raises BadInput for a model that none can reproduce.
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
        # A model without an equal tokenizer.json has its own pieces alone.
        if all(token < self._processor.get_piece_size() for token in ids):
            return self._processor.decode(ids)
        return self.with_controls.decode(ids, skip_special_tokens=False)

    def _own_begin_ids(self) -> list[int]:
        return [self.bos_id] if self._side.add_bos_token and self.bos_id is not None else []


def _first_id(*ids: int | None) -> int | None:
    return next((number for number in ids if number is not None), None)


def _beyond_model(
    side: SideFiles, processor: sentencepiece.SentencePieceProcessor, path: Path
) -> list[AddedToken]:
    """The control pieces of a SentencePiece model, and the added tokens of its side files, which follow its
    own pieces.
    """
    size = processor.get_piece_size()
    pieces = {processor.id_to_piece(number): number for number in range(size)}
    controls = [
        number for number in range(size) if processor.is_control(number) or processor.is_unknown(number)
    ]
    tokens = {
        processor.id_to_piece(number): AddedToken(processor.id_to_piece(number), number, special=True)
        for number in controls
    }
    for token in side.added:
        if pieces.get(token.content, token.id) != token.id:
            raise BadInput(
                f"{path.parent}: the token {token.content!r} has the id {token.id} in the files beside "
                f"{path.name} and "
                f"{pieces[token.content]} in it; correct {ADDED_TOKENS} or {TOKENIZER_CONFIG}"
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
    """The tokenizer_config.json with which transformers 4 and 5 take tokenizer.json as it is.

    transformers 5 puts Qwen's own tokenizer class in the place of whatever class a model of type qwen2 names,
    and so gives other ids, unless the folder has code for a class of its own; whether it may run that code
    (trust_remote_code) makes no difference to the ids.
    """
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, f"{_CODE_FILE.removesuffix('.py')}.BabelTokenizer"]},
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in special_tokens.items() if token is not None},
    }
    write_text(folder / _CODE_FILE, _CODE)
    write_text(folder / TOKENIZER_CONFIG, json.dumps(values, indent=2) + "\n")
