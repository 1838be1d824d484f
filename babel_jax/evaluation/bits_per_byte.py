"""Held-out bits per byte by language: how many bits a model needs for a byte of UTF-8, comparable across tokenizers.

    bits per byte = sum of -log2 p(token | tokens before it in its document) / bytes of those tokens

The first token of a document has nothing to be predicted from, so neither it nor its bytes count. A document longer than a window goes on
in the next one behind its last token. Of conversations only what the assistant says is measured, given all that was said before.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree
from tqdm import tqdm

from babel_jax.config import ModelConfig
from babel_jax.data.chat_format import ChatFormat
from babel_jax.data.conversations import conversation_windows
from babel_jax.data.tokenizers import Tokenizer
from babel_jax.languages import Resource, codes_of
from babel_jax.model.decoder import forward

Window = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class LanguageBits:
    """What was measured of one language; `bits` in all, over `bytes` of `documents`, predicted as `tokens` tokens."""

    bits: float
    bytes: int
    tokens: int
    documents: int

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte; not a number where there is no text."""
        return self.bits / self.bytes if self.bytes else float("nan")


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """The chosen documents of one language as batches of (tokens, segment_ids, loss_mask), each int32 [batch_size, seq_len].

    The mask is left out where every token counts that has another of its document before it.
    """

    batches: list[Window]
    bytes: int
    tokens: int
    documents: int


def encode(
    tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]], *, seq_len: int, batch_size: int, max_bytes: int | None = None
) -> dict[str, EncodedText]:
    """Each language's documents, the first ones up to `max_bytes` of text, as batches that all have one shape."""

    def one_language(documents: Sequence[str]) -> EncodedText:
        chosen = first_bytes(documents, max_bytes)
        encoded = tokenizer.encode_batch(chosen)
        firsts = sum(bytes_of_first(tokenizer, text, ids) for text, ids in zip(chosen, encoded, strict=True) if ids)
        windows = list(_windows([[*tokenizer.begin_ids, *ids] for ids in encoded if ids], seq_len, len(tokenizer.begin_ids)))
        return EncodedText(
            _batches(windows, seq_len, batch_size),
            bytes=max(0, sum(len(text.encode()) for text in chosen) - firsts),
            tokens=sum(max(0, len(ids) - 1) for ids in encoded),
            documents=len(chosen),
        )

    return {language: one_language(documents) for language, documents in texts.items()}


def encode_conversations(
    format: ChatFormat, texts: Mapping[str, Sequence[str]], *, seq_len: int, batch_size: int, max_bytes: int | None = None
) -> dict[str, EncodedText]:
    """As `encode`, for conversations as `conversation_text` gives them; batches have the mask of the assistant's tokens besides."""

    def one_language(conversations: Sequence[str]) -> EncodedText:
        counts = dict.fromkeys(("tokens", "documents", "bytes"), 0)
        windows = list(conversation_windows(first_bytes(conversations, max_bytes), format, seq_len, counts))
        said = sum(len(format.decode(tokens[mask > 0].tolist()).encode()) for tokens, _, mask in windows)
        batches = _batches([tuple(field.view(np.int32) for field in window) for window in windows], seq_len, batch_size)
        return EncodedText(batches, bytes=said, tokens=counts["targets"], documents=counts["documents"])

    return {language: one_language(conversations) for language, conversations in texts.items()}


def bits_per_byte(
    config: ModelConfig, params: PyTree[Array], texts: Mapping[str, EncodedText], compute_dtype: DTypeLike = jnp.float32
) -> dict[str, LanguageBits]:
    """Measures each language's text, as `encode` gives it. One compiled shape serves all."""
    dtype, measured = jnp.dtype(compute_dtype), {}
    for language, text in tqdm(texts.items(), "bits per byte", unit=" languages", leave=False, disable=None):
        nats = sum(float(_nats(config, dtype, params, *batch)) for batch in text.batches)
        measured[language] = LanguageBits(nats / float(np.log(2)), text.bytes, text.tokens, text.documents)
    return measured


def class_means(by_language: Mapping[str, float]) -> dict[str, float | None]:
    """Unweighted means over all languages and over each resource class, of those that have a value; None where none has."""
    groups = {"all": tuple(by_language), "high": codes_of(Resource.HIGH), "low": codes_of(Resource.LOW)}
    found = {name: [by_language[code] for code in codes if code in by_language] for name, codes in groups.items()}
    return {name: float(np.mean(values)) if values else None for name, values in found.items()}


def first_bytes(documents: Sequence[str], max_bytes: int | None) -> list[str]:
    """The first documents, until there are `max_bytes` of text or more."""
    chosen, left = [], max_bytes
    for text in documents:
        if left is not None:
            if left <= 0:
                break
            left -= len(text.encode())
        chosen.append(text)
    return chosen


def _batches(windows: list[Window], seq_len: int, batch_size: int) -> list[Window]:
    """Whole batches; the last is filled with windows of padding."""
    if windows:
        windows = windows + [(np.zeros(seq_len, np.int32),) * len(windows[0])] * (-len(windows) % batch_size)
    starts = range(0, len(windows), batch_size)
    return [tuple(np.stack(column) for column in zip(*windows[start : start + batch_size], strict=True)) for start in starts]


def bytes_of_first(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> int:
    """Bytes of a text's first token. The tokens of a character that is cut, which alone decode to no text, share its bytes."""
    for count in range(1, min(len(ids), 8) + 1):
        decoded = tokenizer.decode(ids[:count])
        if text.startswith(decoded):
            return round(len(decoded.encode()) / count)
    return len(tokenizer.decode(ids[:1]).encode())


def _windows(encoded: Sequence[Sequence[int]], seq_len: int, begin: int = 0) -> Iterator[Window]:
    """Documents side by side in windows, each a segment; one that does not fit goes on in the next window, led by its last token.

    The first `begin` tokens of a document are those that begin every text. With them comes a mask, in which neither they nor the first
    token of the text count: the same tokens are measured whether or not a tokenizer begins its texts so.
    """
    window, filled, segment = np.zeros((3, seq_len), np.int32), 0, 0
    fields = 3 if begin else 2
    for ids in encoded:
        if len(ids) - begin < 2:
            continue
        counts = np.ones(len(ids), np.int32)
        counts[: begin + 1 if begin else 0] = 0
        place = 0
        while place < len(ids) - 1:
            if seq_len - filled < 2:
                yield tuple(window[:fields])
                window, filled, segment = np.zeros((3, seq_len), np.int32), 0, 0
            piece = ids[place : place + seq_len - filled]
            segment += 1
            part = slice(filled, filled + len(piece))
            window[:, part] = piece, np.full(len(piece), segment), counts[place : place + len(piece)]
            filled += len(piece)
            place += len(piece) - 1
    if filled:
        yield tuple(window[:fields])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nats(
    config: ModelConfig,
    compute_dtype: np.dtype,
    params: PyTree[Array],
    tokens: Int[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    loss_mask: Int[Array, "batch time"] | None = None,
) -> Float[Array, ""]:
    logits = forward(config, params, tokens, segment_ids=segment_ids, compute_dtype=compute_dtype)
    return summed_nats(logits, tokens, segment_ids, loss_mask)


def summed_nats(
    logits: Float[Array, "batch time vocab"],
    tokens: Int[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    loss_mask: Int[Array, "batch time"] | None = None,
) -> Float[Array, ""]:
    """The negative log-likelihood, summed in float32, of every token that follows another of its segment and, with a mask, has 1 there."""
    logits, targets = logits[:, :-1], tokens[:, 1:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    valid = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    if loss_mask is not None:
        valid &= loss_mask[:, 1:] > 0
    return jnp.sum(jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0))
