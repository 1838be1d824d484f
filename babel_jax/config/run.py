"""One run: all of its settings."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import tomli_w
from pydantic import Field, model_validator

from babel_jax.config.data import DataSettings
from babel_jax.config.expansion import Deepening, ExpansionSettings
from babel_jax.config.languages import LanguageSettings, WithLanguages
from babel_jax.config.model import ModelSource
from babel_jax.config.settings import LocalPath, NonNegative, Positive, PositiveFloat, Seed, Settings
from babel_jax.config.training import ComputeType, OptimizerSettings, Stage, TrainingSettings
from babel_jax.config.vocabulary import VocabularySettings
from babel_jax.files import write_text
from babel_jax.languages import with_order

_MOST_STAGES = 256


class EvaluationSettings(Settings):
    """Evaluation on held-out text: bits per byte by language at each point of the run."""

    batch_size: Positive = 8
    """Windows that are scored at a time. Unit: windows."""
    max_bytes: Positive = 200_000
    """The most held-out text of each language. Unit: bytes."""
    suite_items: NonNegative = 0
    """Items of each task and language of the offline suite (evaluation/suite.py); 0 leaves the suite out.
    Unit: items.
    """
    suite_translations: bool = True
    """True keeps the tasks of translation in the offline suite. They take as long as its other tasks and bits
    per byte together, and a model of a few million parameters scores 0 in them.
    """
    every: Positive | None = None
    """Evaluates after every so many steps too, not only at the ends of stages. Unit: steps."""


class Config(WithLanguages):
    """One run. Relative paths are relative to the working directory."""

    out: LocalPath
    """The run folder, on disk or in a bucket."""
    seed: Seed = 0
    """Decides the order of the text, and random initial weights."""
    model: ModelSource
    """The model to begin with."""
    expansion: ExpansionSettings | None = None
    """New layers before the first step; without it the model keeps its depth."""
    vocabulary: VocabularySettings | None = None
    """New tokens before the first step, and before new layers; without it the model keeps its vocabulary."""
    data: DataSettings
    """The text, and the prepared datasets."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """AdamW."""
    training: TrainingSettings = TrainingSettings()
    """The computation of a step, and checkpoints."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Measuring on held-out text."""
    deepen: tuple[Deepening, ...] = ()
    """Expansions during the run. Entries may be added until the run reaches their steps."""
    export_dtype: ComputeType = ComputeType.BFLOAT16
    """The type of the weights in the exported model folder."""
    stages: tuple[Stage, ...] = Field(default=(), max_length=_MOST_STAGES)
    """The stages, in order."""
    prices: dict[str, PositiveFloat] = {}
    """The price of an hour of a chip, by its name (v4, v5e, v5p, v6e, tpu7x), for `babel plan`. Unit: any
    currency an hour.
    """

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.model.shape is not None and self.data.seq_len > (
            longest := self.model.shape.max_position_embeddings
        ):
            raise ValueError(
                f"data.seq_len = {self.data.seq_len} exceeds model.shape.max_position_embeddings = {longest}"
            )
        # Checkpoints have the name of their stage, so two stages cannot have the same name.
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ; given {', '.join(names)}")

        # New tokens get rows in the tables of the model, so the tokenizer must be the model's own.
        if self.vocabulary is not None and (self.model.folder is None or self.data.tokenizer is not None):
            raise ValueError(
                "vocabulary: it extends the tokenizer of model.folder; give that, and leave out "
                "data.tokenizer"
            )

        # A result is the name of a file: evaluation/NAME.json.
        before = ["base", "extended", "expanded"] if self.vocabulary is not None else ["base", "expanded"]
        points = [
            *(before if self.model.folder is not None else ()),
            *(stage.result for stage in self.stages),
        ]
        if len(set(points)) != len(points):
            raise ValueError(
                f"stages: results must differ, also from {' and '.join(before)}; given "
                f"{', '.join(s.result for s in self.stages)}"
            )
        steps = [deepening.step for deepening in self.deepen]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError(f"deepen: the steps must ascend; given {', '.join(map(str, steps))}")

        # A language without a source would never be drawn.
        with_sources = {source.language for source in self.data.sources}
        for stage in self.stages:
            named = (*stage.mixture.languages, *stage.mixture.weights, *stage.mixture.curated_languages)
            missing = [code for code in named if with_sources and code not in with_sources]
            if missing:
                raise ValueError(
                    f"stages: the mixture of {stage.name!r} names {', '.join(missing)}, which data.sources "
                    f"has no source for; there are sources for {' '.join(sorted(with_sources))}"
                )
        return self

    @property
    def order(self) -> tuple[str, ...]:
        """The languages of the run: those of `languages` in their order, then the others of the sources, or,
        without sources, those that mixtures name.
        """
        others = {source.language for source in self.data.sources}
        for stage in () if others else self.stages:
            others |= {*stage.mixture.languages, *stage.mixture.weights, *stage.mixture.curated_languages}
        return with_order((one.code for one in self.languages), others)

    def in_order(self, codes: Iterable[str]) -> "Config":
        """The config with `languages` in the order of `codes`; entries are added for other codes."""
        entries = {one.code: one for one in self.languages}
        ordered = tuple(entries.get(code) or LanguageSettings(code=code) for code in codes)
        return self.model_copy(update={"languages": ordered})

    def to_toml(self) -> str:
        """The resolved config as TOML; `load_config` reads the same config from it."""
        return tomli_w.dumps(json.loads(self.model_dump_json(exclude_none=True)))

    def save(self, path: Path) -> None:
        """Writes `to_toml` to `path` in one step."""
        write_text(path, self.to_toml())
