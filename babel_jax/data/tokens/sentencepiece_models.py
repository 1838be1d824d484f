"""A SentencePiece model as a Hugging Face tokenizer.json that gives the same ids."""

from collections.abc import Iterable

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]  # made at import
from tokenizers import decoders, models, normalizers

from babel_jax.errors import BadInput

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# `tokenizers` looks up bytes and control pieces in text too. At this score the letters of "</s>" or "<0x0A>"
# always win over the piece.
_NEVER = -1000.0
_KINDS = ModelProto.SentencePiece


def as_tokenizer_json(model: bytes, where: str) -> str:
    """The tokenizer.json that gives the ids of a SentencePiece model: unigram (ours), or BPE (Llama 2,
    Mistral, Gemma).

    `where` names the model in messages. Raises BadInput for what `tokenizers` cannot reproduce: text
    normalization, no byte fallback, user-defined pieces beside a space before the text, and in a unigram
    model either of the two.
    """
    proto = ModelProto.FromString(model)
    kind, normalizer = proto.trainer_spec.model_type, proto.normalizer_spec
    is_unigram, is_bpe = kind == TrainerSpec.UNIGRAM, kind == TrainerSpec.BPE
    piece_types = {piece.type for piece in proto.pieces}
    users = [piece.piece for piece in proto.pieces if piece.type == _KINDS.USER_DEFINED]
    obstacles = {
        "neither a unigram nor a BPE model": not is_unigram and not is_bpe,
        "no byte fallback": not proto.trainer_spec.byte_fallback,
        "normalizes its text": bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces,
        "adds a space before the text": is_unigram and normalizer.add_dummy_prefix,
        # After an added token `tokenizers` would put a space before the text again.
        "has user-defined pieces": bool(users) and (is_unigram or normalizer.add_dummy_prefix),
        "has unused pieces": _KINDS.UNUSED in piece_types,
        "treats white space as a suffix, or keeps it": proto.trainer_spec.treat_whitespace_as_suffix
        or not normalizer.escape_whitespaces,
    }
    found = [obstacle for obstacle, is_so in obstacles.items() if is_so]
    if found:
        raise BadInput(
            f"{where}: has no equal tokenizer.json ({'; '.join(found)}); train one with `train_sentencepiece`"
        )
    exported = tokenizers.Tokenizer(_unigram(proto) if is_unigram else _bpe(proto))
    spaces = normalizers.Replace(" ", _SPACE)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        exported.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        exported.normalizer = spaces
    exported.decoder = decoders.Sequence(decoding)
    exported.add_special_tokens(
        [piece.piece for piece in proto.pieces if piece.type in (_KINDS.CONTROL, _KINDS.UNKNOWN)]
    )
    # SentencePiece finds user-defined pieces before it merges, in text whose spaces are U+2581 already.
    exported.add_tokens([tokenizers.AddedToken(piece, normalized=True, special=False) for piece in users])
    return exported.to_str(pretty=True)


def _unigram(proto: ModelProto) -> models.Unigram:
    vocabulary = [
        (piece.piece, piece.score if piece.type == _KINDS.NORMAL else _NEVER) for piece in proto.pieces
    ]
    unknown = next(number for number, piece in enumerate(proto.pieces) if piece.type == _KINDS.UNKNOWN)
    return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=True)


def _bpe(proto: ModelProto) -> models.BPE:
    """SentencePiece merges the pair whose piece has the highest score; `tokenizers` the pair that comes first
    in a list.
    """
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _KINDS.NORMAL}
    merges = sorted(
        _splits(scores), key=lambda pair: (-scores[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]])
    )
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _KINDS.UNKNOWN)
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _splits(pieces: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Every way to put a piece together from two others."""
    known = set(pieces)
    for piece in known:
        for place in range(1, len(piece)):
            if piece[:place] in known and piece[place:] in known:
                yield piece[:place], piece[place:]
