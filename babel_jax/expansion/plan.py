"""The plan of a deeper model: the source layer and the initialization of each layer (Babel report, arXiv
2503.00865, section 3).

A plan file is JSON; `save_plan` writes it, and it may be edited:

    {"layers": [{"source": 0, "init": "copy"},
                {"source": 1, "init": "copy"},
                {"source": 1, "init": "noise", "noise_mean": 0.0001, "noise_std": 0.0001, "seed": 0},
                {"source": 2, "init": "copy"},
                {"source": 2, "init": "zero"},
                {"source": 3, "init": "copy"},
                {"source": 3, "init": "copy", "output_scale": 0.5}]}

One entry is one layer of the deeper model, from the input up. `source` counts the source model's layers from
0. The first `copy` of a source layer keeps that layer; every other entry is a new layer. All source layers
must be kept, in order; any number of new layers may be anywhere. `output_scale` multiplies the output
projections of attention and MLP, and so the output that the layer adds.
"""

import collections
import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_serializer, model_validator

from babel_jax.config import ExpansionSettings, Init, ModelConfig, Settings
from babel_jax.config.expansion import Moderate
from babel_jax.config.file import parse_settings
from babel_jax.config.model import MOST_LAYERS
from babel_jax.config.settings import NonNegative
from babel_jax.errors import BadInput
from babel_jax.files import read_json, write_text
from babel_jax.model.shapes import Place

PROVENANCE = "babel_expansion"  # the key of config.json under which an expanded model keeps its plan

# The depth of the source model, and the source layers that a new layer follows: Qwen2.5-7B and Qwen2.5-72B in
# the report.
PRESETS: dict[str, tuple[int, tuple[int, ...]]] = {
    "babel-9b": (28, tuple(range(14, 25, 2))),
    "babel-83b": (80, tuple(range(40, 63, 2))),
}

# The shapes of the two source models, for plans and runs without a checkpoint (their config.json at
# huggingface.co/Qwen).
_QWEN = ModelConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=131072,
)
_LARGER = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
PRESET_SOURCES: dict[str | None, ModelConfig] = {
    "babel-9b": _QWEN,
    "babel-83b": _QWEN.model_copy(update={**_LARGER, "rms_norm_eps": 1e-5}),
}


class TargetLayer(Settings):
    """One layer of the deeper model. With Init.NOISE, noise N(noise_mean, noise_std) with `seed` is added to
    a copy.

    Init.IDENTITY and Init.SCALED are written as copies with an `output_scale`.
    """

    source: NonNegative
    init: Init = Init.COPY
    noise_mean: Moderate = 0.0
    noise_std: Annotated[Moderate, Field(ge=0.0)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output_scale: Moderate = 1.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.init in (Init.IDENTITY, Init.SCALED):
            raise ValueError(
                f"init = {self.init}: in a plan this is init = copy with an output_scale of 0 or 0.5"
            )
        if self.init is not Init.NOISE and (self.noise_mean, self.noise_std, self.seed) != (0.0, 0.0, 0):
            raise ValueError(
                f"init = {self.init}: noise_mean, noise_std and seed belong to init = {Init.NOISE}"
            )
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        written = {"source": self.source, "init": str(self.init)}
        noise = {"noise_mean": self.noise_mean, "noise_std": self.noise_std, "seed": self.seed}
        scale = {"output_scale": self.output_scale} if self.output_scale != 1.0 else {}
        return {**written, **(noise if self.init is Init.NOISE else {}), **scale}


class ExpansionPlan(Settings):
    """The layers of the deeper model, in order. It is hashable, so it may be a static argument of jit."""

    layers: Annotated[tuple[TargetLayer, ...], Field(min_length=1, max_length=MOST_LAYERS)]

    @model_validator(mode="after")
    def _keeps_the_source(self) -> Self:
        new = set(self.new_layers)
        # Without its new layers, a plan must read 0, 1, 2, ...: the source model, layer by layer.
        kept = [layer.source for target, layer in enumerate(self.layers) if target not in new]
        if kept != list(range(len(kept))):
            raise ValueError(
                f"layers: keep source layers {kept}; every source layer must be kept by an entry with init "
                "= copy, in order from 0"
            )
        absent = sorted({layer.source for layer in self.layers} - set(kept))
        if absent:
            raise ValueError(
                f"layers: source layers {absent} have new layers and no entry with init = copy that keeps "
                "them"
            )
        return self

    @property
    def source_layers(self) -> tuple[int, ...]:
        """The source layer of each layer of the deeper model: the index of a gather along the layer axis."""
        return tuple(layer.source for layer in self.layers)

    @property
    def new_layers(self) -> tuple[int, ...]:
        """The positions of the new layers in the deeper model, from 0."""
        kept: set[int] = set()
        new = []
        for target, layer in enumerate(self.layers):
            # The first copy of a source layer is that layer itself.
            if layer.init is Init.COPY and layer.source not in kept:
                kept.add(layer.source)
            else:
                new.append(target)
        return tuple(new)

    @property
    def depth(self) -> int:
        """The number of layers of the source model."""
        return len(self.layers) - len(self.new_layers)

    def check(self, num_layers: int, location: str) -> None:
        """Raises BadInput unless the plan is for a source model of `num_layers` layers."""
        beyond = sorted({source for source in self.source_layers if source >= num_layers})
        if beyond:
            raise BadInput(
                f"{location}: names source layers {beyond}, and the model has layers 0 to {num_layers - 1}"
            )
        if self.depth != num_layers:
            raise BadInput(
                f"{location}: keeps {self.depth} layers, and the model has {num_layers}; the plan is for "
                "another model"
            )


def plan_from_settings(settings: ExpansionSettings, num_layers: int) -> ExpansionPlan:
    """The plan for a model of `num_layers` layers.

    `insert_after` puts a new layer after each source layer that it names; `append` repeats the last layers,
    in order, after the model. Raises BadInput for layers that do not exist or are named twice, a preset of
    another depth, and a plan file that does not fit.
    """
    if settings.plan is not None:
        plan = load_plan(Path(settings.plan))
        plan.check(num_layers, settings.plan)
        return plan
    # The layers that get a copy: named one by one, by a preset, or spread evenly.
    after = settings.insert_after
    if settings.preset is not None:
        if settings.preset not in PRESETS:
            raise BadInput(f"preset {settings.preset!r} is not known; known presets: {', '.join(PRESETS)}")
        depth, after = PRESETS[settings.preset]
        if depth != num_layers:
            raise BadInput(
                f"preset {settings.preset} is for a model of {depth} layers; this one has {num_layers}: "
                "give insert_after or append"
            )
    if settings.new_layers:
        after = spread_layers(settings.new_layers, num_layers)
    beyond = [source for source in after if source >= num_layers]
    if beyond:
        raise BadInput(f"insert_after names layers {beyond}, and the model has layers 0 to {num_layers - 1}")
    twice = sorted(source for source, times in collections.Counter(after).items() if times > 1)
    if twice:
        raise BadInput(
            f"insert_after names layers {twice} more than once; for several copies of a layer give a plan "
            "file"
        )
    if settings.append > num_layers:
        raise BadInput(f"append = {settings.append}: the model has {num_layers} layers to repeat")

    # With init = scaled, a layer and its copy each add half of the layer's output.
    appended = range(num_layers - settings.append, num_layers)
    layers: list[dict[str, Any]] = []
    for source in range(num_layers):
        shared = settings.init is Init.SCALED and (source in after or source in appended)
        layers.append({"source": source, **({"output_scale": 0.5} if shared else {})})
        layers += [_new_layer(settings, source)] * (source in after)
    layers += [_new_layer(settings, source) for source in appended]
    return parse_settings(ExpansionPlan, {"layers": layers}, "expansion")


def spread_layers(count: int, num_layers: int) -> tuple[int, ...]:
    """The source layers of `count` new layers: every other layer from the middle on, as in Babel-9B and 83B.

    Where that gives too few, from an earlier layer on; then spread over the whole model.
    Example: 6 for 28 layers: (14, 16, 18, 20, 22, 24). Raises BadInput for more new layers than layers.
    """
    if count > num_layers:
        raise BadInput(
            f"new_layers = {count}: the model has {num_layers} layers to copy; for several copies of a layer "
            "give a plan file"
        )
    # The middle, or earlier if there is no room for `count` layers at a distance of two.
    start = min(num_layers // 2, num_layers - 2 * count + 1)
    if start >= 0:
        return tuple(range(start, start + 2 * count, 2))
    # More than half of the layers get a copy: a distance of two is too much.
    return tuple(number * num_layers // count for number in range(count))


def _new_layer(settings: ExpansionSettings, source: int) -> dict[str, Any]:
    if settings.init is Init.NOISE:
        noise = {"noise_mean": settings.noise_mean, "noise_std": settings.noise_std, "seed": settings.seed}
        return {"source": source, "init": Init.NOISE, **noise}
    if settings.init in (Init.IDENTITY, Init.SCALED):
        return {"source": source, "output_scale": 0.0 if settings.init is Init.IDENTITY else 0.5}
    return {"source": source, "init": settings.init}


def is_output(place: Place) -> bool:
    """True for a leaf of the last projection of attention or MLP; its output is added to the residual
    stream. `output_scale` multiplies it.
    """
    return place[-2] in ("o_proj", "down_proj")


def next_layer(plan: ExpansionPlan, target: int) -> int:
    """The source layer after the one that a new layer copies; the last layer has none and stays itself."""
    return min(plan.source_layers[target] + 1, plan.depth - 1)


def load_plan(path: Path) -> ExpansionPlan:
    """Reads a plan file. Raises BadInput that names the file and the entry that does not fit."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such plan file") from None
    return plan_from_json(values, str(path))


def plan_from_json(values: Any, location: str) -> ExpansionPlan:
    """The plan of plain JSON values, in the form of `ExpansionPlan.model_dump`. Raises BadInput."""
    if not isinstance(values, dict):
        raise BadInput(f'{location}: not a plan; it must be a JSON object with the key "layers"')
    return parse_settings(ExpansionPlan, values, location)


def save_plan(plan: ExpansionPlan, path: Path) -> None:
    """Writes the plan, one layer a line, so that it is easy to edit."""
    lines = ",\n  ".join(json.dumps(layer) for layer in plan.model_dump()["layers"])
    write_text(path, f'{{"layers": [\n  {lines}\n]}}\n')
