"""One tokenizer for every use: windows, conversations, prompts, scores and samples.

A tokenizer is opened from a model folder. It has the ids that begin a text, that end a document and that end
generation, and it decodes new tokens after earlier ones. In raw text control tokens do not count:
"<|endoftext|>" in a document is ordinary text of several tokens. In a prompt it is the control token.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from babel_jax.data.tokens.sentencepiece_tokenizer import SentencePieceTokenizer
from babel_jax.data.tokens.special_tokens import (
    TOKENIZER_CONFIG,
    AddedToken,
    read_side_files,
)
from babel_jax.data.tokens.tokenizer import OTHER_FILES, Tokenizer, is_control, write_config
from babel_jax.data.tokens.tokenizer_json import (
    check_ids,
    loaded_tokenizer,
    merged_tokens,
    no_panic,
    parsed_tokenizer,
    quiet,
)
from babel_jax.errors import BadInput
from babel_jax.files import read_bytes, write_bytes
from babel_jax.hub.models import hub_model
from babel_jax.hub.names import hub_name
from babel_jax.model_files import MOST_TOKENIZER_BYTES, SENTENCEPIECE_MODEL, TOKENIZER_JSON
from babel_jax.places import place, pull

MOST_BEGIN_IDS = 16  # published tokenizers begin a text with at most one token, GLM's with two


def open_tokenizer(path: Path | str, add_bos_token: bool | None = None) -> Tokenizer:
    """The tokenizer of a model folder (tokenizer.json, else tokenizer.model), or of one tokenizer.json or
    SentencePiece .model file.

    A model folder may be in a bucket or on the hub. add_bos_token: if texts begin with bos_token; None leaves
    it to the tokenizer. Raises BadInput if there is no tokenizer, it cannot be read, or no file names the
    token that ends a document.
    """
    path = tokenizer_place(path)
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


def tokenizer_place(path: Path | str) -> Path:
    """The path on disk of a tokenizer: in the working copy of a bucket, or in the hub's cache for a model on
    the hub.
    """
    name = hub_name(path)
    return hub_model(name, weights=False) if name is not None else place(path)


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

        # Two tokens with one id could not be told apart in decoding.
        ids = self._raw.get_vocab(with_added_tokens=True)
        seen: dict[int, str] = {}
        for token, number in ids.items():
            if number in seen:
                raise BadInput(
                    f"{path}: the tokens {seen[number]!r} and {token!r} have the same id {number}; fetch the "
                    "tokenizer again"
                )
            seen[number] = token
        self.vocab_size = max(ids.values(), default=-1) + 1
        # Tokens that side files add or change give other ids, so they belong to the fingerprint.
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
        for name in (SENTENCEPIECE_MODEL, *OTHER_FILES):
            source = self.path.parent / name
            if source.is_file():
                content = read_bytes(source, below=self.path.parent, most_bytes=MOST_TOKENIZER_BYTES)
                write_bytes(folder / name, content)
        write_bytes(folder / TOKENIZER_JSON, read_bytes(self.path, most_bytes=MOST_TOKENIZER_BYTES))
        if not (folder / TOKENIZER_CONFIG).is_file():
            pad = None if self.pad_id is None else self._raw.id_to_token(self.pad_id)
            write_config(folder, {"eos_token": self._raw.id_to_token(self.eos_id), "pad_token": pad})

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
