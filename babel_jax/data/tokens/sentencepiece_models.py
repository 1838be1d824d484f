"""Converts a SentencePiece model to a Hugging Face tokenizer.json that gives the same ids."""

from collections.abc import Iterable

import tokenizers

# Protocol buffers make these classes at import, so mypy does not see them.
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]
from tokenizers import decoders, models, normalizers

from babel_jax.errors import BadInput

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# `tokenizers` also matches bytes and control pieces in text. At this score a text "</s>" or "<0x0A>" is
# always split into letters instead.
_NEVER = -1000.0
_KINDS = ModelProto.SentencePiece


def as_tokenizer_json(model: bytes, location: str) -> str:
    """The tokenizer.json that gives the ids of a SentencePiece model: unigram (ours) or BPE (Llama 2,
    Mistral, Gemma).

    `location` names the model in messages. Raises BadInput for a model that `tokenizers` cannot reproduce:
    one that normalizes text, has no byte fallback, or has user-defined pieces together with a space before
    the text; for a unigram model, either of these two is enough.
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
    # All obstacles in one message, so that none is found only after another was removed.
    present = [obstacle for obstacle, is_present in obstacles.items() if is_present]
    if present:
        raise BadInput(
            f"{location}: has no equal tokenizer.json ({'; '.join(present)}); "
            "train one with `train_sentencepiece`"
        )

    exported = tokenizers.Tokenizer(_unigram(proto) if is_unigram else _bpe(proto))
    # SentencePiece writes a space as U+2581. Decoding turns it back, then joins the bytes of rare characters.
    spaces = normalizers.Replace(" ", _SPACE)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        exported.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        exported.normalizer = spaces
    exported.decoder = decoders.Sequence(decoding)

    specials = [piece.piece for piece in proto.pieces if piece.type in (_KINDS.CONTROL, _KINDS.UNKNOWN)]
    exported.add_special_tokens(specials)
    # SentencePiece matches user-defined pieces before it merges, after spaces have become U+2581.
    exported.add_tokens([tokenizers.AddedToken(piece, normalized=True, special=False) for piece in users])
    return exported.to_str(pretty=True)


def _unigram(proto: ModelProto) -> models.Unigram:
    vocabulary = []
    for piece in proto.pieces:
        vocabulary.append((piece.piece, piece.score if piece.type == _KINDS.NORMAL else _NEVER))
    unknown = next(number for number, piece in enumerate(proto.pieces) if piece.type == _KINDS.UNKNOWN)
    return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=True)


def _bpe(proto: ModelProto) -> models.BPE:
    """A BPE model with an ordered list of merges.

    SentencePiece merges the pair whose piece has the highest score. `tokenizers` merges the first pair in its
    list.
    """
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _KINDS.NORMAL}
    # By falling score: the list order then is SentencePiece's order of merges.
    merges = sorted(
        _splits(scores), key=lambda pair: (-scores[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]])
    )
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _KINDS.UNKNOWN)
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _splits(pieces: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Every way to join two pieces into a third."""
    known = set(pieces)
    for piece in known:
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                yield piece[:cut], piece[cut:]
