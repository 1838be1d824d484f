"""The shapes of a run's models, even if the folder that the run begins with does not exist yet."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from babel_jax.buckets import is_url
from babel_jax.config import Config, ModelConfig
from babel_jax.config.file import configs_folder, load_config
from babel_jax.errors import BadInput
from babel_jax.expansion.apply import expand_config, new_layers_of
from babel_jax.expansion.plan import PRESET_SOURCES, plan_from_settings
from babel_jax.hub.names import hub_name
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.tokenizer_files import tokenizer_size
from babel_jax.training.deepening import depths
from babel_jax.vocabulary.card import new_rows_of
from babel_jax.vocabulary.growth import padded_rows

_LONGEST_CHAIN = 10  # configs, each of which begins with the export of the one before


class Base(NamedTuple):
    """The model that a run begins with, before its expansion, and its layers that an earlier expansion
    added.
    """

    config: ModelConfig
    new_layers: tuple[int, ...] = ()


def base_of(config: Config, configs: Path | None = None) -> Base:
    """The base of a run: the model folder if it exists, else the source of the preset, else the export of
    another config, else the model of that name on the hub, of which only the config is fetched.

    The other config is in the folder `configs` or in this package. Its `out`/hf is this config's
    model.folder, as for babel-9b.toml and babel-9b-chat.toml. Raises BadInput if there is none.
    """
    folders = [folder for folder in (configs, configs_folder()) if folder is not None]
    base = _base_of(config, folders, _LONGEST_CHAIN)
    return base._replace(config=with_vocabulary(config, base.config))


def with_vocabulary(config: Config, shape: ModelConfig) -> ModelConfig:
    """The shape with the rows of the tokens that `[vocabulary]` adds.

    New tokens follow the tokenizer's, so some may have rows already. Without the tokenizer, none has.
    """
    settings, source = config.vocabulary, config.model.folder
    if settings is None or source is None:
        return shape
    size = tokenizer_size(Path(source)) if Path(source).is_dir() else None
    rows = padded_rows(shape.vocab_size, (size or shape.vocab_size) + settings.tokens, settings.multiple)
    return shape.model_copy(update={"vocab_size": rows})


def new_rows(config: Config, shape: ModelConfig) -> tuple[int, ...]:
    """The rows that a stage with train = "new_rows" trains, in a plan: of `[vocabulary]`, as the last ones of
    the tables, or of the folder's last extension.
    """
    if config.vocabulary is not None:
        return tuple(range(shape.vocab_size - config.vocabulary.tokens, shape.vocab_size))
    source = config.model.folder
    if source is None or not Path(source).is_dir():
        return ()
    return new_rows_of(open_folder(source).hf_config)


def made_up_base(config: Config, configs: Path | None = None) -> tuple[Base, bool]:
    """`base_of`, and False. If there is no base: Qwen2.5-7B with the layers that the run's expansion needs,
    and True.
    """
    try:
        return base_of(config, configs), False
    except BadInput:
        assert config.model.folder is not None
        if is_url(config.model.folder) or Path(config.model.folder).exists():
            raise
    shape = next(iter(PRESET_SOURCES.values()))
    after = config.expansion.insert_after if config.expansion is not None else ()
    count = config.expansion.new_layers if config.expansion is not None else 0
    layers = max(2 * len(after), 2 * count, max(after, default=0) + 2, 4)
    return Base(shape.model_copy(update={"num_hidden_layers": layers})), True


def _base_of(config: Config, folders: list[Path], most: int) -> Base:
    if config.model.shape is not None:
        return Base(config.model.shape)
    source = config.model.folder
    assert source is not None
    if is_url(source) or Path(source).exists():
        folder = open_folder(source, weights=False)
        return Base(folder.config, new_layers_of(folder.hf_config))
    preset = config.expansion.preset if config.expansion is not None else None
    if preset in PRESET_SOURCES:
        return Base(PRESET_SOURCES[preset])
    # The folder may be the export of another run that has not run yet.
    for earlier in _configs(folders):
        if most and os.path.abspath(source) == os.path.abspath(os.path.join(earlier.out, "hf")):
            base = _base_of(earlier, folders, most - 1)
            larger = with_vocabulary(earlier, base.config)
            shape = trained_shape(earlier, larger)
            if earlier.deepen:
                return Base(shape, depths(expanded(earlier, larger), (), earlier.deepen)[-1].new_layers)
            plan = None
            if earlier.expansion is not None:
                plan = plan_from_settings(earlier.expansion, base.config.num_hidden_layers)
            return Base(shape, base.new_layers if plan is None else plan.new_layers)
    if hub_name(source) is not None:
        folder = open_folder(source, weights=False)
        return Base(folder.config, new_layers_of(folder.hf_config))
    raise BadInput(
        f"{source}: no such model folder, and no config in {' or '.join(map(str, folders))} exports it (its "
        "out/hf); make the folder, or give model.shape"
    )


def _configs(folders: list[Path]) -> Iterator[Config]:
    for folder in folders:
        for path in sorted(folder.glob("*.toml")):
            try:
                yield load_config(path)
            except BadInput:  # a config of another kind, such as quality.toml
                continue


def expanded(config: Config, base: ModelConfig) -> ModelConfig:
    """The shape at a run's first step."""
    if config.expansion is None:
        return base
    return expand_config(base, plan_from_settings(config.expansion, base.num_hidden_layers))


def trained_shape(config: Config, base: ModelConfig) -> ModelConfig:
    """The shape after all expansions of a run that begins with `base`."""
    return depths(expanded(config, base), (), config.deepen)[-1].config
