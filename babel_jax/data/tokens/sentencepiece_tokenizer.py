"""A SentencePiece model as a tokenizer."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from babel_jax.data.tokens.sentencepiece_models import as_tokenizer_json
from babel_jax.data.tokens.special_tokens import (
    ADDED_TOKENS,
    TOKENIZER_CONFIG,
    AddedToken,
    SideFiles,
    read_side_files,
)
from babel_jax.data.tokens.tokenizer import Tokenizer, write_config
from babel_jax.data.tokens.tokenizer_json import (
    check_ids,
    loaded_tokenizer,
)
from babel_jax.data.tokens.unigram import train_unigram
from babel_jax.errors import BadInput, one_line
from babel_jax.files import read_bytes, write_bytes, write_text
from babel_jax.json_text import parse_json
from babel_jax.model_files import MOST_TOKENIZER_BYTES, SENTENCEPIECE_MODEL, TOKENIZER_JSON


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
        # Names by token: transformers needs the text of each special token, not its id.
        names = {
            "bos_token": self.bos_id,
            "eos_token": self.eos_id,
            "pad_token": self.pad_id,
            "unk_token": self._processor.unk_id(),
        }
        present = {name: number for name, number in names.items() if number is not None and number >= 0}
        write_config(folder, {name: self._token(number) for name, number in present.items()})

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
