"""Training a SentencePiece unigram model."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

from babel_jax.errors import BadInput
from babel_jax.files import write_bytes

# SentencePiece adds piece scores in float32, `tokenizers` in float64. In steps of 1/64 both sums are exact up
# to 2**18, so that they agree on which of two segmentations is better and on which are equally good; without
# it about one document in 2,000 came out different.
_SCORE_STEP = 1 / 64
# The tokenizer.json of a model gives bytes and control pieces so low a score that the letters of "</s>" or
# "<0x0A>" always win over the piece. For that each of these letters needs a piece of its own.
_REQUIRED_LETTERS = "".join(map(chr, range(ord("!"), ord("~") + 1)))


def train_unigram(
    texts: Iterable[str], vocab_size: int, path: Path, character_coverage: float = 0.9995
) -> None:
    """Trains a unigram model (Kudo 2018) with byte fallback on lines of `texts` and writes it to `path`.

    Text is not normalized, so that every text comes back exactly. Ids: 0 <pad>, 1 <s>, 2 </s>, 3 <unk> (never
    given), then 256 bytes. The same texts give the same model. The vocabulary is smaller than asked where the
    texts do not yield as many pieces. Raises BadInput when there is no text, or vocab_size does not hold the
    letters of the text.
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
            # A space before the first word would make a text's tokens depend on where it was cut.
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=1 << 20,
            # Sums of floats depend on the number of threads, so it is fixed.
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise BadInput(
            f"{path}: no SentencePiece model of {vocab_size} pieces can be trained: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    trained = ModelProto.FromString(model.getvalue())
    for piece in trained.pieces:
        piece.score = round(piece.score / _SCORE_STEP) * _SCORE_STEP
    write_bytes(path, trained.SerializeToString(deterministic=True))


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The trainer drops lines that hold a tab, and pieces over a line's end would not help."""
    for text in texts:
        for line in text.replace("\t", "\n").split("\n"):
            if line and not line.isspace():
                yield line
