"""The expansion in a model card."""

from collections.abc import Mapping
from typing import Any

from babel_jax.expansion.plan import PROVENANCE, ExpansionPlan, plan_from_json
from babel_jax.model_folders.model_card import markdown_code

TAG = "depth-expansion"
UNTRAINED = (
    "## Intended use and limits\n\nThe new layers have not been trained. The model is meant to be trained on "
    "(`babel train`); until then it is at best as good as its source."
)


def plans_of(hf_config: Mapping[str, Any]) -> list[tuple[str, ExpansionPlan]]:
    """The expansions that made the model of a config.json, first to last, each with the name of its source
    model.

    Raises BadInput if `babel_expansion` has another form.
    """
    # The newest expansion is outermost; "before" has the one before it.
    plans = []
    entry = hf_config.get(PROVENANCE)
    while entry is not None:
        layers = {"layers": entry.get("layers")} if isinstance(entry, dict) else entry
        plan = plan_from_json(layers, f"config.json: {PROVENANCE}")
        plans.append((str(entry.get("source", "the base")), plan))
        entry = entry.get("before")
    return plans[::-1]


def expansion_section(hf_config: Mapping[str, Any]) -> str:
    """Markdown: the layers that each expansion added; empty for a model that was never expanded."""
    parts = []
    for source, plan in plans_of(hf_config):
        lines = ["| new layer | copy of layer | begins as |", "| ---: | ---: | --- |"]
        for target in plan.new_layers:
            lines.append(f"| {target} | {plan.layers[target].source} | {initial_state(plan, target)} |")
        table = "\n".join(lines) if plan.new_layers else "No layer is new."
        parts.append(
            f"{markdown_code(source)} of {plan.depth} layers became {len(plan.layers)} layers (counted from "
            f"0):\n\n{table}"
        )
    return "\n\n".join(["## Expansion", *parts]) if parts else ""


def initial_state(plan: ExpansionPlan, target: int) -> str:
    """The initial parameters of a new layer, in words."""
    layer = plan.layers[target]
    words = {
        "copy": "copy",
        "noise": f"copy and noise N({layer.noise_mean:g}, {layer.noise_std:g})",
        "zero": "zeros",
        "average": "mean with the layer after it",
    }[str(layer.init)]
    return words + (f", output scaled by {layer.output_scale:g}" if layer.output_scale != 1.0 else "")
