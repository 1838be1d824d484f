"""Training a SentencePiece unigram model."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

from babel_jax.errors import BadInput, one_line
from babel_jax.files import write_bytes

# SentencePiece adds the scores of pieces in float32, `tokenizers` in float64. In steps of 1/64 both sums are
# exact up to 2**18, so both libraries choose the same of two segmentations, and see the same ties. With other
# scores, about one document in 2,000 got different ids.
_SCORE_STEP = 1 / 64
# In the tokenizer.json of a model, bytes and control pieces have so low a score that a text "</s>" or
# "<0x0A>" is always split into letters. For this, a piece must exist for each of these letters.
_REQUIRED_LETTERS = "".join(map(chr, range(ord("!"), ord("~") + 1)))


def train_unigram(
    texts: Iterable[str], vocab_size: int, path: Path, character_coverage: float = 0.9995
) -> None:
    """Trains a unigram model (Kudo 2018) with byte fallback on lines of `texts` and writes it to `path`.

    Text is not normalized, so decoding returns every text exactly. Ids: 0 <pad>, 1 <s>, 2 </s>, 3 <unk>
    (never used), then 256 bytes. The same texts give the same model. The vocabulary is smaller than
    `vocab_size` if the texts yield fewer pieces. Raises BadInput if there is no text, or `vocab_size` is
    smaller than the number of letters in the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=character_coverage,
            required_chars=_REQUIRED_LETTERS,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # With a space before the first word, the tokens of a text would depend on where it was cut.
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=1 << 20,
            # Sums of floats depend on the number of threads, so the number is fixed.
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise BadInput(
            f"{path}: no SentencePiece model of {vocab_size} pieces can be trained: {one_line(error, 300)}"
        ) from error

    trained = ModelProto.FromString(model.getvalue())
    for piece in trained.pieces:
        piece.score = round(piece.score / _SCORE_STEP) * _SCORE_STEP
    write_bytes(path, trained.SerializeToString(deterministic=True))


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts. The trainer drops lines with a tab, so a tab ends a line here."""
    for text in texts:
        for line in text.replace("\t", "\n").split("\n"):
            if line and not line.isspace():
                yield line
