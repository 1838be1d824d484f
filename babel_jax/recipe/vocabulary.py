"""The extended vocabulary of a run: made once, by the first process, in the folder that `vocabulary.larger`
describes.
"""

import json
import logging
from pathlib import Path
from typing import Any

import jax

from babel_jax.config import Config
from babel_jax.data.sources.embedded import corpus_sources
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.distributed.agreement import agreed
from babel_jax.errors import BadInput
from babel_jax.files import read_json, write_bytes, write_text
from babel_jax.model_files import CONFIG
from babel_jax.model_folders.folder import ModelFolder, copy_other_files, open_folder
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.new_folders import new_folder
from babel_jax.places import pull
from babel_jax.progress import working
from babel_jax.sending import is_taken
from babel_jax.vocabulary.folders import extend
from babel_jax.vocabulary.larger import (
    GROWTH,
    MADE_FROM,
    LargerModel,
    larger_folder,
    read_larger,
    write_growth,
)
from babel_jax.vocabulary.texts import texts_of

log = logging.getLogger("babel")


def larger_model(config: Config, folder: ModelFolder | None) -> LargerModel | None:
    """The extension that the config asks for, made by the first call; None if it asks for none.

    Raises BadInput on all processes if the extension cannot be made, or was made with other settings.
    """
    if config.vocabulary is None or folder is None:
        return None
    path = larger_folder(config)
    with agreed():
        # In a bucket, the folder of a process that was killed does not count: it is made again.
        if jax.process_index() == 0 and not (path / MADE_FROM).is_file() and is_taken(path):
            pull(path)
        if jax.process_index() == 0 and not (path / MADE_FROM).is_file():
            _make(path, config, folder)
    with agreed():
        if jax.process_index() != 0:
            pull(path)
        # The folder may be of an earlier start with other settings: prepared text would not fit it.
        made_from = read_json(path / MADE_FROM)
        if made_from != _made_from(config, folder):
            raise BadInput(
                f"{path}: made with another [vocabulary], text or model; give another data.folder, or remove "
                "this one and the prepared text"
            )
        return read_larger(path)


def tokenizer_files(config: Config) -> Path | str | None:
    """The folder with the tokenizer of a run's text: the model's, or that of its larger vocabulary, which is
    made if it is not there.
    """
    if config.vocabulary is None or config.model.folder is None:
        return config.model.folder
    larger = larger_model(config, open_folder(config.model.folder, weights=False))
    return larger.path if larger is not None else None


def _make(path: Path, config: Config, folder: ModelFolder) -> None:
    assert config.vocabulary is not None
    check_vocabulary(folder.path, folder.config.vocab_size, needed=True)
    texts = vocabulary_texts(config)
    with working("extending the vocabulary"):
        extended = extend(folder, texts, config.vocabulary)
    # The gain is told before training: fewer tokens for each byte mean cheaper text.
    for code in config.vocabulary.languages:
        figures = extended.figures["languages"][code]
        before, after = (figures[f"tokens_per_byte_{when}"] for when in ("before", "after"))
        log.info("vocabulary: %s from %.3f to %.3f tokens per byte", code, before, after)
    with new_folder(path) as partial:
        copy_other_files(folder.path, partial)
        for name, content in extended.files.items():
            write_bytes(partial / name, content)
        write_text(partial / CONFIG, json.dumps(extended.hf_config, indent=2) + "\n")
        write_growth(partial / GROWTH, extended.growth)
        write_text(partial / MADE_FROM, json.dumps(_made_from(config, folder), indent=2) + "\n")


def vocabulary_texts(config: Config) -> dict[str, list[str]]:
    """The text that a run's vocabulary is learned from, by language: up to `max_bytes` of each.

    Protected languages without text there have the package's. Raises BadInput for another language without.
    """
    settings = config.vocabulary
    assert settings is not None
    sources = corpus_sources(settings.data) if settings.data is not None else config.data.sources
    # As `survey` holds rows out: tokens that were learned on the held-out text would make it look easier.
    return texts_of(
        sources,
        settings.languages,
        settings.protect,
        settings.max_bytes,
        config.data.bad_rows,
        config.data.heldout_fraction,
    )


def _made_from(config: Config, folder: ModelFolder) -> dict[str, Any]:
    assert config.vocabulary is not None
    settings = config.vocabulary
    sources = [] if settings.data is not None else config.data.sources
    return {
        "vocabulary": settings.model_dump(mode="json"),
        "sources": [source.model_dump(mode="json") for source in sources],
        "tokenizer": open_tokenizer(folder.path).fingerprint,
        "rows": folder.config.vocab_size,
    }
