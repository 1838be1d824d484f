"""What prepared data was made from: a later call compares its settings and the text of its sources."""

from pathlib import Path
from typing import Any

from babel_jax.claims import changes, is_begun
from babel_jax.config import DataSettings, Settings, Source
from babel_jax.data.json_files import read_json
from babel_jax.data.refining.cleaned_parts import cleaned_folder, sources_of
from babel_jax.data.refining.shards import part_counts
from babel_jax.data.sources.origins import changed_text, file_digest, origin_of
from babel_jax.data.sources.records import parts
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.windows.datasets import opened_chat_format, write_json
from babel_jax.data.windows.prepared import SETTINGS
from babel_jax.errors import BadInput

# Raise this number when the same settings would give other windows, so that older folders are refused.
FORMAT = 1


def made_from(settings: DataSettings, opened: Tokenizer) -> dict[str, Any]:
    """The settings that decide the windows, as JSON values. `claim` keeps them in the folder."""
    # A folder is refused if any of these differs: its datasets would be a mixture of two preparations.
    return {
        "format": FORMAT,
        "tokenizer": opened.fingerprint,
        "seq_len": settings.seq_len,
        "heldout_fraction": settings.heldout_fraction,
        "heldout_bytes": settings.heldout_bytes,
        **_first_tokens(settings, opened),
        **{
            name: _dumped(getattr(settings, name))
            for name in ("cleaning", "decontamination", "deduplication")
        },
        "evaluation_files": _evaluation_files(settings),
        "language_model": _language_model(settings),
    }


def _evaluation_files(settings: DataSettings) -> dict[str, str] | None:
    """The digests of the evaluation files: other files would remove other documents. None without
    decontamination.
    """
    if settings.decontamination is None:
        return None
    digests = {}
    for path in settings.decontamination.paths:
        for file in parts(Source(language="en", path=path)):
            digests[file] = file_digest(file)
    return digests


def _language_model(settings: DataSettings) -> str | None:
    """The digest of the model that identifies languages: another one would drop other documents."""
    if settings.cleaning is None or settings.cleaning.language_model is None:
        return None
    try:
        return file_digest(settings.cleaning.language_model)
    except OSError as error:
        raise BadInput(
            f"data.cleaning.language_model: {settings.cleaning.language_model} cannot be read "
            f"({error.strerror}); name a model in fastText's format"
        ) from None


def _first_tokens(settings: DataSettings, opened: Tokenizer) -> dict[str, Any]:
    """The setting that decides the first tokens of each conversation, or of each document."""
    if settings.conversations:
        return {"chat_template": opened_chat_format(settings.tokenizer, settings.chat_template).fingerprint}
    return {"begin_ids": opened.begin_ids or None}


def _dumped(settings: Settings | None) -> dict[str, Any] | None:
    return None if settings is None else settings.model_dump(mode="json")


def is_refined(settings: DataSettings) -> bool:
    """True if the settings ask for cleaning, decontamination or deduplication."""
    return any(
        stage is not None for stage in (settings.cleaning, settings.decontamination, settings.deduplication)
    )


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new folder. Raises BadInput if the folder was begun with other settings."""
    if not is_begun(folder, SETTINGS, "a folder of prepared data", "data.folder"):
        write_json(folder / SETTINGS, settings)
        return
    earlier = read_json(folder / SETTINGS)
    # Earlier versions did not keep the digests of evaluation files.
    earlier.setdefault("evaluation_files", settings.get("evaluation_files"))
    # An earlier version may have had more settings.
    changed = changes({name: earlier.get(name) for name in settings}, settings)
    if changed:
        each = [f"{key} (then {_shown(before)}, now {_shown(now)})" for key, before, now in changed]
        raise BadInput(
            f"{folder}: prepared with another {' and another '.join(each)}; give another data.folder or "
            "remove this one"
        )


def _shown(value: Any) -> Any:
    """A setting in a message: a table of settings is "on", a missing one "off"."""
    if isinstance(value, dict):
        return "on"
    return "off" if value is None else value


def origins_of_sources(settings: DataSettings, language: str) -> list[dict[str, Any]]:
    """The sources of a language with the origin of their text, by which a later call notices changed text."""
    # Cleaning has read every file and kept its digest, so no file is read twice.
    known: dict[str, Any] = {}
    if is_refined(settings):
        for counts in part_counts(cleaned_folder(settings, language)):
            known |= counts["made_from"].get("files", {})
    origins = []
    for source in sources_of(settings, language):
        origins.append({**source.model_dump(mode="json"), **origin_of(source, known=known)})
    return origins


def first_change(
    settings: DataSettings, language: str, before: list[dict[str, Any]], recheck: bool
) -> str | None:
    """A description of the first change in the sources of a language; None if their text is unchanged."""
    sources = sources_of(settings, language)
    if len(sources) != len(before):
        return f"then {len(before)} sources, now {len(sources)}"
    for earlier, source in zip(before, sources, strict=True):
        change = changed_text(earlier, source, recheck=recheck)
        if change is not None:
            return f"changed: {change}"
    return None
