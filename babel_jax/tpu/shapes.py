"""The shapes of a run's models, even if the folder that the run begins with does not exist yet."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from babel_jax.buckets import is_url
from babel_jax.config import Config, ModelConfig, Trained
from babel_jax.config.file import configs_folder, load_config, parse_settings
from babel_jax.errors import BadInput
from babel_jax.expansion.folders import expand_config, new_layers_of
from babel_jax.expansion.plan import PRESET_SOURCES, plan_from_settings
from babel_jax.hub.names import hub_name
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.tokenizer_files import tokenizer_size
from babel_jax.training.deepening import Depth, depths
from babel_jax.vocabulary.card import new_rows_of
from babel_jax.vocabulary.growth import Growth, grow_config
from babel_jax.vocabulary.larger import planned_growth

_MADE_UP_ROWS = 128
_LONGEST_CHAIN = 10  # configs, each of which begins with the export of the one before


class Base(NamedTuple):
    """The model that a run begins with, before its larger vocabulary and its expansion, with its layers and
    its rows of tokens that earlier commands added.
    """

    config: ModelConfig
    new_layers: tuple[int, ...] = ()
    new_rows: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values, for a request to another process."""
        shape = json.loads(self.config.model_dump_json(exclude_none=True))
        return {"config": shape, "new_layers": list(self.new_layers), "new_rows": list(self.new_rows)}


def base_from_json(values: dict[str, Any]) -> Base:
    """The base of `Base.to_json`."""
    shape = parse_settings(ModelConfig, values["config"], "model")
    return Base(shape, tuple(values["new_layers"]), tuple(values["new_rows"]))


def base_of(config: Config, configs: Path | None = None) -> Base:
    """The base of a run: the model folder if it exists, else the source of the preset, else the export of
    another config, else the model of that name on the hub, of which only the config is fetched.

    The other config is in the folder `configs` or in this package. Its `out`/hf is this config's
    model.folder, as for babel-9b.toml and babel-9b-chat.toml. Raises BadInput if there is none.
    """
    folders = [folder for folder in (configs, configs_folder()) if folder is not None]
    return _base_of(config, folders, _LONGEST_CHAIN)


def growth_of(config: Config, base: ModelConfig) -> Growth | None:
    """The growth of the tables by `[vocabulary]`, in a plan; None without. See `planned_growth`."""
    source = config.model.folder
    is_here = source is not None and not is_url(source) and Path(source).is_dir()
    return planned_growth(config, base.vocab_size, tokenizer_size(Path(str(source))) if is_here else None)


def larger(config: Config, base: ModelConfig) -> ModelConfig:
    """The shape with the rows of the tokens that `[vocabulary]` adds, before new layers."""
    growth = growth_of(config, base)
    return base if growth is None else grow_config(base, growth)


def new_rows(config: Config, base: Base) -> tuple[int, ...]:
    """The rows that a stage with train = "new_rows" trains: of `[vocabulary]`, or of the base's last
    extension.
    """
    growth = growth_of(config, base.config)
    return base.new_rows if growth is None else tuple(growth.ids.tolist())


def models_of(config: Config, base: Base) -> list[Depth]:
    """The models of a run that begins with `base`, in order; see `depths`."""
    new_layers = base.new_layers
    if config.expansion is not None:
        new_layers = plan_from_settings(config.expansion, base.config.num_hidden_layers).new_layers
    return depths(expanded(config, base.config), new_layers, config.deepen, new_rows(config, base))


def made_up_base(config: Config, configs: Path | None = None) -> tuple[Base, bool]:
    """`base_of`, and False. If there is no base: Qwen2.5-7B with the layers that the run's expansion needs,
    and with new layers and rows if a stage trains those of the folder; and True.
    """
    try:
        return base_of(config, configs), False
    except BadInput:
        assert config.model.folder is not None
        if is_url(config.model.folder) or Path(config.model.folder).exists():
            raise
    # Any shape will do, as a rehearsal scales it down; only layers and rows must be enough.
    shape = next(iter(PRESET_SOURCES.values()))
    after = config.expansion.insert_after if config.expansion is not None else ()
    count = config.expansion.new_layers if config.expansion is not None else 0
    layers = max(2 * len(after), 2 * count, max(after, default=0) + 2, 4)
    trained = {stage.train for stage in config.stages}
    new_layers = (layers - 1,) if Trained.NEW_LAYERS in trained else ()
    rows = range(shape.vocab_size - _MADE_UP_ROWS, shape.vocab_size) if Trained.NEW_ROWS in trained else ()
    return Base(shape.model_copy(update={"num_hidden_layers": layers}), new_layers, tuple(rows)), True


def _base_of(config: Config, folders: list[Path], most: int) -> Base:
    if config.model.shape is not None:
        return Base(config.model.shape)
    source = config.model.folder
    assert source is not None
    if is_url(source) or Path(source).exists():
        return _base_in(source)
    preset = config.expansion.preset if config.expansion is not None else None
    if preset in PRESET_SOURCES:
        return Base(PRESET_SOURCES[preset])
    # The folder may be the export of another run that has not run yet.
    for earlier in _configs(folders):
        if most and os.path.abspath(source) == os.path.abspath(os.path.join(earlier.out, "hf")):
            return _exported(earlier, _base_of(earlier, folders, most - 1))
    if hub_name(source) is not None:
        return _base_in(source)
    raise BadInput(
        f"{source}: no such model folder, and no config in {' or '.join(map(str, folders))} exports it (its "
        "out/hf); make the folder, or give model.shape"
    )


def _base_in(source: str) -> Base:
    folder = open_folder(source, weights=False)
    return Base(folder.config, new_layers_of(folder.hf_config), new_rows_of(folder.hf_config))


def _exported(config: Config, base: Base) -> Base:
    """The model that a run exports."""
    shape, rows = trained_shape(config, base.config), new_rows(config, base)
    # The new layers of the last deepening are those that a later stage may train alone.
    if config.deepen:
        return Base(shape, depths(expanded(config, base.config), (), config.deepen)[-1].new_layers, rows)
    if config.expansion is None:
        return Base(shape, base.new_layers, rows)
    plan = plan_from_settings(config.expansion, base.config.num_hidden_layers)
    return Base(shape, plan.new_layers, rows)


def _configs(folders: list[Path]) -> Iterator[Config]:
    for folder in folders:
        for path in sorted(folder.glob("*.toml")):
            try:
                yield load_config(path)
            except BadInput:  # a config of another kind, such as quality.toml
                continue


def expanded(config: Config, base: ModelConfig) -> ModelConfig:
    """The shape at a run's first step."""
    first = larger(config, base)
    if config.expansion is None:
        return first
    return expand_config(first, plan_from_settings(config.expansion, base.num_hidden_layers))


def trained_shape(config: Config, base: ModelConfig) -> ModelConfig:
    """The shape after all expansions of a run that begins with `base`."""
    return depths(expanded(config, base), (), config.deepen)[-1].config
