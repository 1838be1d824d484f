"""The larger model of a run, without its weights, in the folder DATA-vocabulary beside the prepared text:

tokenizer files, config.json and the other files of the model folder, as the larger model has them
growth.npz      the new rows, as sums of old ones
made_from.json  the settings and the model that decided all this; another run with others is refused
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from babel_jax.config import Config, RowInit
from babel_jax.errors import BadInput
from babel_jax.files import read_json
from babel_jax.model_files import CONFIG
from babel_jax.places import place
from babel_jax.vocabulary.extension import MOST_TOKEN_CHARACTERS
from babel_jax.vocabulary.growth import Growth, padded_rows

GROWTH, MADE_FROM = "growth.npz", "made_from.json"
NOT_OF_THE_MODEL = (GROWTH, MADE_FROM)
_MOST_CHARACTER_BYTES = 4  # of UTF-8


class LargerModel(NamedTuple):
    """A run's model with its larger vocabulary, without weights: a folder with the tokenizer and all other
    files, its config.json, and its new rows.
    """

    path: Path
    hf_config: dict[str, Any]
    growth: Growth


def larger_folder(config: Config) -> Path:
    """The folder of a run's larger model, also before it is made."""
    return place(f"{config.data.folder}-vocabulary")


def read_larger(path: Path) -> LargerModel:
    """The larger model in a folder. Raises BadInput for a damaged one."""
    return LargerModel(path, read_json(path / CONFIG), read_growth(path / GROWTH))


def write_growth(file: Path, growth: Growth) -> None:
    """Writes the new rows into a file."""
    np.savez(
        file,
        ids=growth.ids,
        sources=growth.sources,
        weights=growth.weights,
        old_rows=growth.old_rows,
        rows=growth.rows,
    )


def read_growth(file: Path) -> Growth:
    """The new rows of `write_growth`. Raises BadInput for a file that is missing or damaged."""
    try:
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in ("ids", "sources", "weights")}
            return Growth(**arrays, old_rows=int(stored["old_rows"]), rows=int(stored["rows"]))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise BadInput(
            f"{file}: the new rows cannot be read ({error}); remove {file.parent.name} and the text that was "
            "prepared with it"
        ) from None


def planned_growth(config: Config, old_rows: int, tokenizer_size: int | None) -> Growth | None:
    """The growth of a run's tables, for a plan; None for a run without one.

    If `babel prepare` or `babel train` made the larger model already with these settings, the growth is read
    from it. Before that, the growth is the largest possible. New tokens follow the last one of the tokenizer
    (without it: the last one of the `old_rows` rows), and each stands for as many old tokens as a token may
    have bytes.
    """
    settings = config.vocabulary
    if settings is None or config.model.folder is None:
        return None
    # The real growth, if a command has made it already for these settings.
    path = larger_folder(config)
    if (path / MADE_FROM).is_file():
        growth = read_growth(path / GROWTH)
        made_with = read_json(path / MADE_FROM).get("vocabulary")
        if made_with == settings.model_dump(mode="json") and growth.old_rows == old_rows:
            return growth
    # An upper bound: the plan must not find less memory than the run will need.
    first = old_rows if tokenizer_size is None else tokenizer_size
    rows = padded_rows(old_rows, first + settings.tokens, settings.multiple)
    terms = 1 if settings.init is RowInit.ALL else MOST_TOKEN_CHARACTERS * _MOST_CHARACTER_BYTES
    ids = np.arange(first, first + settings.tokens, dtype=np.int32)
    shape = (settings.tokens, terms)
    return Growth(ids, np.zeros(shape, np.int32), np.ones(shape, np.float32), old_rows, rows)
