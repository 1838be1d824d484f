"""The deeper model of a plan: parameters, config, and whole model folders."""

import functools
import statistics
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, PyTree, UInt32

from babel_jax import __version__
from babel_jax.config import Init, ModelConfig
from babel_jax.errors import BadInput
from babel_jax.expansion.card import TAG, UNTRAINED, expansion_section
from babel_jax.expansion.plan import PROVENANCE, ExpansionPlan, plan_from_json
from babel_jax.model.parameters import Place, is_stacked
from babel_jax.model_folders.folder import Format, open_folder, source_name
from babel_jax.model_folders.hf_config import needs_layer_types, read_hf_config
from babel_jax.model_folders.model_card import card_files
from babel_jax.model_folders.names import tensor_name, tensor_place
from babel_jax.model_folders.streaming import Piece, Source
from babel_jax.model_folders.transfer import Change, transfer


def expand_params(params: PyTree[Array], plan: ExpansionPlan) -> PyTree[Array]:
    """The parameters of the deeper model: one gather along the layer axis for each leaf under the layers,
    then the changes of new layers.

    Every leaf keeps its dtype; noise is drawn from a table and added in float32. The noise depends only on
    the layer's seed, the leaf's path and the layer's position, so its bits are the same on any mesh. The
    function is pure: it may run inside jit with shardings. Raises BadInput for a plan of another depth.
    """
    leaves = traverse_util.flatten_dict(params)
    expanded = {}
    for place, leaf in leaves.items():
        if is_stacked(place):
            plan.check(leaf.shape[0], "plan")
            expanded[place] = _expand_leaf(leaf, _path_hash(place), plan, _is_output(place))
        else:
            expanded[place] = leaf
    return traverse_util.unflatten_dict(expanded)


def expanding(shardings: PyTree[jax.sharding.Sharding]) -> Any:
    """`expand_params` jitted: (params, plan) to the deeper parameters, sharded by `shardings`.

    Each device computes its own part.
    """
    return jax.jit(expand_params, static_argnums=1, out_shardings=shardings)


def expand_config(config: ModelConfig, plan: ExpansionPlan) -> ModelConfig:
    """The config of the deeper model.

    Raises BadInput for a plan of another depth, and for an output scale that would have no effect.
    """
    # A norm after the projection divides a scale out again.
    plan.check(config.num_hidden_layers, "plan")
    if config.post_norms and any(layer.output_scale not in (0.0, 1.0) for layer in plan.layers):
        raise BadInput(
            f"plan: output_scale must be 0 or 1 in a {config.family} model, whose norms after attention "
            "and MLP undo any other"
        )
    return config.with_layers(plan.source_layers)


def expand_hf_config(hf: dict[str, Any], plan: ExpansionPlan, source_name: str) -> dict[str, Any]:
    """The config.json of the deeper model, with the plan and its source model under `babel_expansion`; all
    other keys are kept.

    `max_window_layers` stays the number of leading layers with full attention. If new layers break this
    pattern (full after sliding), `layer_types` has the type of each layer.
    """
    config = expand_config(read_hf_config(hf, f"config.json of {source_name}"), plan)
    # All keys stay, also those that this program does not know: other programs may need them.
    deeper = {**hf, "num_hidden_layers": len(plan.layers)}
    if hf.get("layer_types") is not None:
        deeper["layer_types"] = [hf["layer_types"][source] for source in plan.source_layers]
    elif needs_layer_types(config):
        deeper["layer_types"] = [str(kind) for kind in config.layer_types]
    if hf.get("max_window_layers") is not None:
        # The first layer with a window, if there is one.
        sliding = [
            target for target, source in enumerate(plan.source_layers) if source >= hf["max_window_layers"]
        ]
        deeper["max_window_layers"] = (
            sliding[0] if sliding else max(hf["max_window_layers"], len(plan.layers))
        )
    provenance = {
        "babel_jax": __version__,
        "source": source_name,
        "source_num_hidden_layers": plan.depth,
        **plan.model_dump(),
    }
    # An expansion of an expansion keeps the history of both.
    before = {"before": hf[PROVENANCE]} if PROVENANCE in hf else {}
    return {**deeper, PROVENANCE: {**provenance, **before}}


def new_layers_of(hf: dict[str, Any]) -> tuple[int, ...]:
    """The positions of the layers that the last expansion added, from `babel_expansion` of a config.json;
    empty without it.

    Raises BadInput if it is no plan, or its depth differs from the model's.
    """
    if PROVENANCE not in hf:
        return ()
    provenance = hf[PROVENANCE]
    location = f"config.json: {PROVENANCE}"
    layers = {"layers": provenance.get("layers")} if isinstance(provenance, dict) else provenance
    plan = plan_from_json(layers, location)
    if len(plan.layers) != hf.get("num_hidden_layers"):
        raise BadInput(
            f"{location}: a plan of {len(plan.layers)} layers in a model of {hf.get('num_hidden_layers')}; "
            "remove it"
        )
    return plan.new_layers


def expand_folder(
    source: Path | str, destination: Path | str, plan: ExpansionPlan, **options: Any
) -> dict[str, Any]:
    """Writes the deeper model of a model folder in the same format, with a new card; returns the figures of
    `summary` and `new_layers`.

    options: those of `transfer`. Raises BadInput for a plan of another depth, and as `open_folder` and
    `transfer` do.
    """
    folder = open_folder(source)
    plan.check(folder.config.num_hidden_layers, str(folder.path))
    hf_config = expand_hf_config(folder.hf_config, plan, source_name(folder.path))
    card = card_files(
        hf_config,
        folder.path,
        [expansion_section(hf_config), UNTRAINED],
        name=Path(str(destination)).name,
        tags=[TAG],
        in_hf_format=folder.format is Format.HF,
    )
    written = transfer(folder, destination, folder.format, hf_config, _change(plan), texts=card, **options)
    return {**written, "new_layers": list(plan.new_layers)}


@functools.partial(jax.jit, static_argnames=("plan", "is_output"))
def _expand_leaf(
    leaf: Float[Array, "source_layers ..."],
    path_hash: UInt32[Array, ""],
    plan: ExpansionPlan,
    is_output: bool,
) -> Float[Array, "target_layers ..."]:
    """One leaf of the deeper model; `is_output` is True for projections that `output_scale` multiplies."""
    expanded = jnp.take(leaf, np.asarray(plan.source_layers), axis=0, mode="clip")

    def targets_with(init: Init) -> list[int]:
        return [target for target, layer in enumerate(plan.layers) if layer.init is init]

    # Copies are done by the gather; the other inits change some rows of it.
    zero, average, noise = targets_with(Init.ZERO), targets_with(Init.AVERAGE), targets_with(Init.NOISE)
    if zero:
        expanded = expanded.at[np.asarray(zero)].set(0)
    if average:
        next_layers = leaf[np.asarray([_next_layer(plan, target) for target in average])]
        expanded = expanded.at[np.asarray(average)].set(_mean(expanded[np.asarray(average)], next_layers))
    if noise:
        arguments = [_noise_arguments(plan, target, path_hash) for target in noise]
        columns = [jnp.stack(values) for values in zip(*arguments, strict=True)]
        noisy = jax.vmap(_with_noise)(expanded[np.asarray(noise)], *columns)
        expanded = expanded.at[np.asarray(noise)].set(noisy)

    # Last, because the scale is of the values that the layer begins with.
    scaled = [target for target, layer in enumerate(plan.layers) if is_output and layer.output_scale != 1.0]
    if scaled:
        scale = jnp.asarray([plan.layers[target].output_scale for target in scaled], jnp.float32)
        expanded = expanded.at[np.asarray(scaled)].set(jax.vmap(_scaled)(expanded[np.asarray(scaled)], scale))
    return expanded


def _is_output(place: Place) -> bool:
    """True for a leaf of the last projection of attention or MLP; its output is added to the residual
    stream.
    """
    return place[-2] in ("o_proj", "down_proj")


def _next_layer(plan: ExpansionPlan, target: int) -> int:
    """The source layer after the one that a new layer copies; the last layer has none and stays itself."""
    return min(plan.source_layers[target] + 1, plan.depth - 1)


@jax.jit
def _mean(left: Float[Array, "..."], right: Float[Array, "..."]) -> Float[Array, "..."]:
    return (0.5 * (left.astype(jnp.float32) + right.astype(jnp.float32))).astype(left.dtype)


@jax.jit
def _scaled(values: Float[Array, "..."], scale: Float[Array, ""]) -> Float[Array, "..."]:
    return (values.astype(jnp.float32) * scale).astype(values.dtype)


def _path_hash(place: Place) -> UInt32[Array, ""]:
    result: UInt32[Array, ""] = jnp.uint32(zlib.crc32("/".join(place).encode()))
    return result


@functools.cache
def _quantiles() -> Float[np.ndarray, "65536"]:
    """Equally likely values of a normal distribution with mean 0 and standard deviation 1.

    Noise is drawn from this table, because functions such as erf_inv differ in the last bit between shapes,
    back ends and versions.
    """
    normal = statistics.NormalDist()
    values = np.array([normal.inv_cdf((number + 0.5) / 2**16) for number in range(2**16)])
    result: Float[np.ndarray, "65536"] = values / values.std()
    return result


def _noise_arguments(plan: ExpansionPlan, target: int, path_hash: UInt32[Array, ""]) -> tuple[Array, ...]:
    layer = plan.layers[target]
    table = (layer.noise_mean + layer.noise_std * _quantiles()).astype(np.float32)
    return jnp.uint32(layer.seed), path_hash, jnp.uint32(target), jnp.asarray(table)


def _with_noise(
    values: Float[Array, "rows ..."],
    seed: UInt32[Array, ""],
    path_hash: UInt32[Array, ""],
    target: UInt32[Array, ""],
    table: Float[Array, "65536"],
    first: UInt32[Array, ""] | int = 0,
) -> Float[Array, "rows ..."]:
    """`values` with noise. They are the rows from `first` on. Each row has its own random stream, so that a
    piece gets the same noise as the whole.
    """
    # Position and path are in the key, so no two leaves or layers get the same noise.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), path_hash), target)

    def noisy(row: Array, number: Array) -> Array:
        indices = jax.random.bits(jax.random.fold_in(key, number), row.shape, jnp.uint16)
        return (row.astype(jnp.float32) + table[indices]).astype(row.dtype)

    return jax.vmap(noisy)(values, first + jnp.arange(len(values), dtype=jnp.uint32))


_with_noise_compiled = jax.jit(_with_noise)


def _change(plan: ExpansionPlan) -> Change:
    """The change of tensors that `plan` makes, for `transfer`."""
    # A change uses all cores and more memory than the rest, so pieces are changed one after the other.
    one_at_a_time = threading.Lock()

    def source_of(name: str) -> str:
        place, target = tensor_place(name)
        return name if target is None else tensor_name(place, plan.source_layers[target])

    # A tensor that keeps its name and its bytes is not rewritten: its file is cloned.
    new = set(plan.new_layers)

    def kept(name: str) -> bool:
        place, target = tensor_place(name)
        if target is None:
            return True
        return (
            target not in new
            and source_of(name) == name
            and (plan.layers[target].output_scale == 1.0 or not _is_output(place))
        )

    def values(piece: Piece, source: Source) -> np.ndarray:
        place, target = tensor_place(piece.name)
        rows = source.read_rows(source_of(piece.name), piece.start, piece.stop)
        if target is None:
            return rows
        layer = plan.layers[target]
        if layer.init is Init.ZERO:
            return np.zeros_like(rows)
        # The same jitted functions as for a model in memory, so both ways give the same bits.
        with one_at_a_time, jax.default_device(jax.local_devices(backend="cpu")[0]):
            if layer.init is Init.NOISE:
                arguments = _noise_arguments(plan, target, _path_hash(place))
                rows = np.asarray(_with_noise_compiled(rows, *arguments, jnp.uint32(piece.start)))
            if layer.init is Init.AVERAGE:
                next_name = tensor_name(place, _next_layer(plan, target))
                rows = np.asarray(_mean(rows, source.read_rows(next_name, piece.start, piece.stop)))
            if layer.output_scale != 1.0 and _is_output(place):
                rows = np.asarray(_scaled(rows, jnp.float32(layer.output_scale)))
        return rows

    return Change(plan.model_dump_json(), source_of, kept, values)
