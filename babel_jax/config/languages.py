"""The languages of a run: their order, and those that the registry does not have."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from babel_jax.config.settings import Choice, NonNegativeFloat, Settings
from babel_jax.languages import (
    BABEL,
    REGISTRY,
    Language,
    Resource,
    class_of_share,
    declare,
    known_language,
    language,
    near_codes,
)
from babel_jax.scripts import SCRIPTS

# A code is the name of files and folders: qaa, or qaa_Latn.
_CODE = r"^[a-z]{2,8}(_[A-Za-z0-9]{2,8}){0,2}$"
# What is the same in these settings and in `Language`. The registry's values are not to be contradicted.
_FACTS = (
    "name", "own_name", "script", "iso639_3", "macroarea", "speakers_millions", "common_crawl_percent",
)  # fmt: skip


class ResourceClass(Choice):
    """The class of a language: much text, or little."""

    HIGH = "high"
    LOW = "low"


class WritingDirection(Choice):
    """The direction in which a script is written."""

    LEFT_TO_RIGHT = "ltr"
    RIGHT_TO_LEFT = "rtl"


def by_our_codes(shares: Mapping[str, float]) -> dict[str, float]:
    """The values by our own codes of their languages. Raises ValueError for two keys of one language."""
    ours: dict[str, float] = {}
    for code, share in shares.items():
        known = language(code)
        if known.code in ours:
            raise ValueError(f"{known.name} is named twice, the second time as {code}")
        ours[known.code] = share
    return ours


class LanguageSettings(Settings):
    """A language of the run. For a language of the registry its code is enough; the other keys may add what
    the registry does not know, and contradict nothing. Another language needs `name` and `script`.
    """

    code: str
    """Its code, such as `sw`, `yor` or `qaa`. Sources, files and tables name the language by it."""
    name: str | None = Field(default=None, min_length=1, max_length=80)
    """Its name in English."""
    own_name: str | None = None
    """Its name in the language itself."""
    script: str | None = None
    """The ISO 15924 code of its script, such as `Latn`. Direction, word boundaries and sentence ends follow
    it.
    """
    direction: WritingDirection | None = None
    """The direction of its script; only to check it."""
    iso639_3: Annotated[str, Field(pattern="^[a-z]{3}$")] | None = None
    """Its ISO 639-3 code. Default: the code up to the first `_`."""
    macroarea: str | None = None
    """Glottolog's macroarea, such as `Africa`."""
    speakers_millions: NonNegativeFloat | None = None
    """How many people speak it. Unit: millions."""
    common_crawl_percent: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    """Its share of Common Crawl. Unit: percent."""
    resource: ResourceClass | None = None
    """Its class. Default: `high` above 1% of Common Crawl, else `low`."""

    @field_validator("code")
    @classmethod
    def _ours(cls, code: str) -> str:
        found = known_language(code)
        if found is None and not re.fullmatch(_CODE, code):
            raise ValueError(
                f"{code!r} is no code: lower-case letters, and perhaps a script, such as qaa_Latn"
            )
        return code if found is None else found.code

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.script is not None and self.script not in SCRIPTS:
            raise ValueError(f"{self.code}: script {self.script!r} is none of {' '.join(SCRIPTS)}")
        known = REGISTRY.get(self.code)
        if known is None and (self.name is None or self.script is None):
            # A wrong code is the usual reason, so near ones are named.
            near = near_codes(self.code)
            raise ValueError(f"{self.code} is not in the registry, so it needs name and script{near}")
        script = self.script if known is None else known.script
        assert script is not None
        if self.direction is not None and str(self.direction) != SCRIPTS[script].direction:
            raise ValueError(
                f"{self.code}: direction {self.direction} contradicts its script {script}, which is written "
                f"{SCRIPTS[script].direction}"
            )
        if known is not None:
            self._check_against(known)
        return self

    def _check_against(self, known: Language) -> None:
        """Raises ValueError for a value that contradicts the registry."""
        for key in _FACTS:
            given, fact = getattr(self, key), getattr(known, key)
            if given is not None and fact not in ("", None) and given != fact:
                raise ValueError(
                    f"{self.code}: {key} {given!r} contradicts the registry's {fact!r}; leave it out"
                )
        if self.resource is not None and self.code in BABEL and str(self.resource) != known.resource:
            raise ValueError(
                f"{self.code}: resource {self.resource} contradicts the class that the Babel report gives "
                f"it, {known.resource}; leave it out"
            )

    def to_language(self) -> Language:
        """The language, with the registry's facts and those that are given here."""
        given: dict[str, Any] = {key: value for key in _FACTS if (value := getattr(self, key)) is not None}
        known = REGISTRY.get(self.code)
        if known is None:
            iso = self.iso639_3 or self.code.split("_")[0]
            name = f"{iso}_{self.script}"
            # A declared language: its names in data sets and its class follow from the code, the script and
            # the share of the web.
            share = class_of_share(self.common_crawl_percent)
            base = {"iso639_3": iso, "resource": share, "flores": name, "flores_plus": name}
            made = Language(code=self.code, **{**base, **given})
        else:
            made = dataclasses.replace(known, **given)
            if self.common_crawl_percent is not None and known.common_crawl_percent is None:
                made = dataclasses.replace(made, resource=class_of_share(self.common_crawl_percent))
        return made if self.resource is None else dataclasses.replace(made, resource=Resource(self.resource))


class WithLanguages(Settings):
    """Settings whose sources may be in languages that these settings declare."""

    languages: tuple[LanguageSettings, ...] = ()
    """The languages of the run, in the order of its tables of counts and of its checkpoints; after these come
    the other languages of its sources. A run keeps its order when a language is added. Here a language that
    the registry does not have is declared, with its name and script.
    """

    @field_validator("languages")
    @classmethod
    def _once(cls, languages: tuple[LanguageSettings, ...]) -> tuple[LanguageSettings, ...]:
        """Makes the languages known to the settings that are read after these."""
        for number, one in enumerate(languages):
            for other in languages[:number]:
                if one.code == other.code:
                    raise ValueError(f"{one.code} is declared twice")
        declared = [one.to_language() for one in languages]
        # Tables show names, so two languages with one name could not be told apart.
        names = {known.name: known.code for known in REGISTRY.values()}
        for made in declared:
            if names.setdefault(made.name, made.code) != made.code:
                raise ValueError(
                    f"{made.code}: {names[made.name]} is named {made.name!r} too; tables need two names"
                )
        declare(declared)
        return languages
