"""Small SentencePiece models of the kind that Llama, Mistral and Gemma publish."""

import io
from collections.abc import Iterable

import sentencepiece


def trained_bpe(lines: Iterable[str], **settings: object) -> bytes:
    """A tokenizer.model: BPE of characters with byte fallback, which changes no space."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()
