"""The settings of a model folder's generation_config.json, except the tokens that end a text."""

import logging
import math
from pathlib import Path
from typing import Any

from babel_jax.errors import BadInput
from babel_jax.files import read_json

GENERATION_CONFIG = "generation_config.json"
# Keys that change the tokens that transformers generates, even with greedy decoding, and their values without
# effect.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (0, None),
    "encoder_repetition_penalty": (1.0, None),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "exponential_decay_length_penalty": (None,),
}

log = logging.getLogger("babel")


def stored_repetition_penalty(folder: Path) -> float:
    """`repetition_penalty` of a model folder; 1 (none) if it has none. Logs the other keys, which are not
    applied.

    Raises BadInput for a file that cannot be read, and for a penalty that is no number above 0.
    """
    path = folder / GENERATION_CONFIG
    try:
        values = read_json(path, folder)
    except FileNotFoundError:
        return 1.0
    if not isinstance(values, dict):
        raise BadInput(f"{path}: a JSON object is needed")

    # A key whose value has no effect in transformers either is no difference.
    ignored = [
        f"{key} = {values[key]!r}"
        for key, none in _NOT_APPLIED.items()
        if key in values and values[key] not in none
    ]
    if ignored:
        log.warning(
            "%s: not applied here, so transformers may write another text: %s", path, ", ".join(ignored)
        )

    # bool is a subclass of int.
    penalty = values.get("repetition_penalty")
    if penalty is None:
        return 1.0
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0.0 < penalty < math.inf:
        raise BadInput(f"{path}: repetition_penalty = {penalty!r}: a number above 0 is needed")
    return float(penalty)
