"""Training a SentencePiece unigram model, and the same model as a Hugging Face tokenizer.json."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]  # made at import
from tokenizers import decoders, models, normalizers

from babel_jax.errors import BadInput
from babel_jax.files import write_bytes

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# SentencePiece adds piece scores in float32, `tokenizers` in float64. In steps of 1/64 both sums are exact up to 2**18, so that they agree
# on which of two segmentations is better and on which are equally good; without it about one document in 2,000 came out different.
_SCORE_STEP = 1 / 64
# `tokenizers` looks up bytes and control pieces in text too. At this score the letters of "</s>" or "<0x0A>" always win over the piece.
_NEVER = -1000.0
# ... provided that each of these letters has a piece of its own.
_REQUIRED_LETTERS = "".join(map(chr, range(ord("!"), ord("~") + 1)))


def train_unigram(texts: Iterable[str], vocab_size: int, path: Path, character_coverage: float = 0.9995) -> None:
    """Trains a unigram model (Kudo 2018) with byte fallback on lines of `texts` and writes it to `path`.

    Text is not normalized, so that every text comes back exactly. Ids: 0 <pad>, 1 <s>, 2 </s>, 3 <unk> (never given), then 256 bytes.
    The same texts give the same model. The vocabulary is smaller than asked where the texts do not yield as many pieces.
    Raises BadInput when there is no text, or vocab_size does not hold the letters of the text.
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
            f"{path}: no SentencePiece model of {vocab_size} pieces can be trained: {' '.join(str(error).split())[:300]}"
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


def as_tokenizer_json(model: bytes, where: str) -> str:
    """The tokenizer.json that gives the ids of a SentencePiece unigram model; `where` names it in messages.

    Raises BadInput for what `tokenizers` cannot reproduce: other algorithms, text normalization, user-defined pieces.
    """
    proto = ModelProto.FromString(model)
    pieces, normalizer = proto.pieces, proto.normalizer_spec
    kinds = ModelProto.SentencePiece
    obstacles = {
        "not a unigram model": proto.trainer_spec.model_type != TrainerSpec.UNIGRAM,
        "no byte fallback": not proto.trainer_spec.byte_fallback,
        "normalizes its text": bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces,
        "adds a space before the text": normalizer.add_dummy_prefix,
        "has user-defined or unused pieces": any(piece.type in (kinds.USER_DEFINED, kinds.UNUSED) for piece in pieces),
        "treats white space as a suffix, or keeps it": proto.trainer_spec.treat_whitespace_as_suffix or not normalizer.escape_whitespaces,
    }
    found = [obstacle for obstacle, is_so in obstacles.items() if is_so]
    if found:
        raise BadInput(f"{where}: has no equal tokenizer.json ({'; '.join(found)}); train one with `train_sentencepiece`")
    vocabulary = [(piece.piece, piece.score if piece.type == kinds.NORMAL else _NEVER) for piece in pieces]
    unknown = next(number for number, piece in enumerate(pieces) if piece.type == kinds.UNKNOWN)
    exported = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=True))
    exported.normalizer = normalizers.Replace(" ", _SPACE)
    exported.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    exported.add_special_tokens([piece.piece for piece in pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)])
    return exported.to_str(pretty=True)
