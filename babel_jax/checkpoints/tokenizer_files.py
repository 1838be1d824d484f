"""Whether a model folder's tokenizer fits its embedding."""

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from babel_jax.errors import BadInput

TOKENIZER_JSON, SENTENCEPIECE_MODEL = "tokenizer.json", "tokenizer.model"


def check_vocabulary(folder: Path, embedding_rows: int, needed: bool = False) -> None:
    """Raises BadInput when the tokenizer in `folder` gives ids that the embedding has no row for, or is missing though `needed`.

    More rows than tokens are as usual: Qwen2.5 has 152,064 rows for 151,665 tokens.
    """
    ids = _ids(folder)
    if ids is None and needed:
        raise BadInput(f"{folder}: no tokenizer ({TOKENIZER_JSON} or {SENTENCEPIECE_MODEL}); copy the model's tokenizer files there")
    if ids is not None and ids > embedding_rows:
        raise BadInput(
            f"{folder}: the tokenizer has ids up to {ids - 1} and the embedding has {embedding_rows} rows (vocab_size in config.json); "
            "one of the two belongs to another model"
        )


def _ids(folder: Path) -> int | None:
    """One more than the tokenizer's highest id; None without a tokenizer in a form that this project reads."""
    try:
        if (folder / TOKENIZER_JSON).is_file():
            return max(Tokenizer.from_file(str(folder / TOKENIZER_JSON)).get_vocab(with_added_tokens=True).values()) + 1
        if (folder / SENTENCEPIECE_MODEL).is_file():
            return SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_MODEL)).get_piece_size()
    except Exception as error:  # both libraries raise bare exceptions of their C++ and Rust sides
        raise BadInput(f"{folder}: the tokenizer cannot be read: {' '.join(str(error).split())[:200]}") from error
    return None
