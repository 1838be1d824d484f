"""A model folder with a larger vocabulary, written from another one in pieces."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from babel_jax.config import VocabularySettings
from babel_jax.model_folders.folder import Format, ModelFolder, copy_other_files, open_folder, source_name
from babel_jax.model_folders.model_card import card_files
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.model_folders.transfer import transfer
from babel_jax.new_folders import MARK, check_free
from babel_jax.places import place
from babel_jax.vocabulary.card import TAG, UNTRAINED, extended_hf_config, vocabulary_section
from babel_jax.vocabulary.editable import Vocabulary, open_vocabulary
from babel_jax.vocabulary.extended_files import write_tokenizer_files
from babel_jax.vocabulary.extension import Extension, extend_vocabulary
from babel_jax.vocabulary.growth import Growth, growth_change, mean_growth, padded_rows
from babel_jax.vocabulary.pursuit import Donor, donor_growth, open_donor


def extend_folder(
    source: Path | str,
    destination: Path | str,
    texts: Mapping[str, Sequence[str]],
    settings: VocabularySettings,
    **options: Any,
) -> dict[str, Any]:
    """Writes the model with a larger vocabulary, in the format of `source`; returns the figures of `summary`
    and of the extension.

    options: those of `transfer`. Raises BadInput as `open_folder`, `extend_vocabulary` and `transfer` do, and
    if tokenizer and embedding disagree.
    """
    path = place(destination)
    if not (path / MARK).is_file():
        # Learning takes minutes, so this is told before.
        check_free(path)
    folder = open_folder(source)
    return write_extended(folder, destination, extend(folder, texts, settings), **options)


def write_extended(
    folder: ModelFolder, destination: Path | str, extended: "Extended", **options: Any
) -> dict[str, Any]:
    """Writes the model of `extend`; options and result: as of `extend_folder`."""
    card = card_files(
        extended.hf_config,
        folder.path,
        [vocabulary_section(extended.hf_config), UNTRAINED],
        name=Path(str(destination)).name,
        tags=[TAG],
        in_hf_format=folder.format is Format.HF,
    )
    written = transfer(
        folder,
        destination,
        folder.format,
        extended.hf_config,
        growth_change(extended.growth),
        texts={**extended.files, **card},
        **options,
    )
    return {
        **written,
        "vocab_size": extended.growth.rows,
        "new_tokens": extended.figures["tokens"] - extended.figures["revived"],
        "vocabulary": extended.figures,
    }


class Extended(NamedTuple):
    """A model with a larger vocabulary, without its weights.

    files: those of the tokenizer that differ from the old ones. hf_config: its config.json. figures: those of
    the extension.
    """

    growth: Growth
    files: dict[str, bytes]
    hf_config: dict[str, Any]
    figures: dict[str, Any]


def extend(folder: ModelFolder, texts: Mapping[str, Sequence[str]], settings: VocabularySettings) -> Extended:
    """The extension of a model folder's vocabulary; nothing is written.

    Raises BadInput as `extend_folder` does.
    """
    check_vocabulary(folder.path, folder.config.vocab_size, needed=True)
    vocabulary = open_vocabulary(folder.path)
    # A donor that does not fit is told before minutes of learning.
    donor = open_donor(vocabulary, settings.donor) if settings.donor is not None else None
    return extended_model(folder, vocabulary, extend_vocabulary(vocabulary, texts, settings), donor)


def extended_model(
    folder: ModelFolder, vocabulary: Vocabulary, extension: Extension, donor: Donor | None = None
) -> Extended:
    """The model of an extension that was learned, with the rows that its settings ask for.

    donor: that of the settings, if it is open already.
    """
    settings = extension.settings
    old_rows = folder.config.vocab_size
    # Embedding and head get whole multiples of rows, which a mesh divides.
    rows = padded_rows(old_rows, extension.size, settings.multiple)
    if settings.donor is not None:
        donor = donor or open_donor(vocabulary, settings.donor)
        growth = donor_growth(vocabulary, extension.rows, donor, old_rows, rows)
    else:
        growth = mean_growth(extension.rows, settings.init, old_rows, rows)
    hf_config = extended_hf_config(folder.hf_config, extension, growth, source_name(folder.path))
    with tempfile.TemporaryDirectory() as scratch:
        files = _tokenizer_files(folder, vocabulary, extension, Path(scratch))
    return Extended(growth, files, hf_config, extension.figures)


def _tokenizer_files(
    folder: ModelFolder, vocabulary: Vocabulary, extension: Extension, scratch: Path
) -> dict[str, bytes]:
    """The files of the extended tokenizer that differ from the old ones. scratch: an empty folder."""
    copy_other_files(folder.path, scratch)
    before = _contents(scratch)
    write_tokenizer_files(vocabulary, extension.description, extension.model, scratch)
    # Only these files replace those that `transfer` copies from the source.
    return {name: content for name, content in _contents(scratch).items() if before.get(name) != content}


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
