"""The config and the model folder of a plan's deeper model.

JAX is imported only for layers that begin with a mean, a scale other than 0, or noise that NumPy may round
otherwise.
"""

from pathlib import Path
from typing import Any

import numpy as np

from babel_jax import __version__
from babel_jax.config import Init, ModelConfig
from babel_jax.errors import BadInput
from babel_jax.expansion.card import TAG, UNTRAINED, expansion_section
from babel_jax.expansion.noise import is_exact_in_numpy, noise_table, noisy_rows, path_hash
from babel_jax.expansion.plan import PROVENANCE, ExpansionPlan, is_output, next_layer, plan_from_json
from babel_jax.model_folders.folder import Format, open_folder, source_name
from babel_jax.model_folders.hf_config import needs_layer_types, read_hf_config
from babel_jax.model_folders.model_card import card_files
from babel_jax.model_folders.names import tensor_name, tensor_place
from babel_jax.model_folders.streaming import Piece, TensorSource
from babel_jax.model_folders.transfer import Change, transfer


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


def _change(plan: ExpansionPlan) -> Change:
    """The change of tensors that `plan` makes, for `transfer`."""

    def source_of(name: str) -> str:
        place, target = tensor_place(name)
        return name if target is None else tensor_name(place, plan.source_layers[target])

    def copied(name: str) -> bool:
        place, target = tensor_place(name)
        if target is None:
            return True
        layer = plan.layers[target]
        return layer.init is Init.COPY and (layer.output_scale == 1.0 or not is_output(place))

    def values(piece: Piece, source: TensorSource) -> np.ndarray:
        place, target = tensor_place(piece.name)
        assert target is not None  # what is outside of the layers is copied
        rows = source.read_rows(source_of(piece.name), piece.start, piece.stop)
        layer = plan.layers[target]
        if layer.init is Init.ZERO:
            return np.zeros_like(rows)
        if layer.init is Init.COPY and layer.output_scale == 0.0:
            # The signs of zeros and NaNs are those of the product that `expand_params` computes.
            return (rows.astype(np.float32) * np.float32(0.0)).astype(rows.dtype)
        is_scaled = layer.output_scale != 1.0 and is_output(place)
        if layer.init is Init.NOISE and not is_scaled:
            table = noise_table(layer.noise_mean, layer.noise_std)
            if is_exact_in_numpy(table, rows.dtype):
                return noisy_rows(rows, layer.seed, path_hash(place), target, table, piece.start)
        # Only now: JAX takes seconds to import, and a plan of copies and zeros does not come here.
        from babel_jax.expansion.apply import changed_rows

        def next_rows() -> np.ndarray:
            next_name = tensor_name(place, next_layer(plan, target))
            return source.read_rows(next_name, piece.start, piece.stop)

        return changed_rows(plan, place, target, rows, piece.start, next_rows)

    return Change(plan.model_dump_json(), source_of, copied, values)
