"""What a model's card says of its expansion."""

from collections.abc import Iterator, Mapping
from typing import Any

from babel_jax.expansion.plan import PROVENANCE, ExpansionPlan, plan_from_json
from babel_jax.model_folders.model_card import markdown_code

TAG = "depth-expansion"


def plans_of(hf_config: Mapping[str, Any]) -> list[tuple[str, ExpansionPlan]]:
    """The expansions that made the model of a config.json, first to last, each with the name of what it was
    made from.

    Raises BadInput where `babel_expansion` holds something else.
    """

    def backwards(found: Any) -> Iterator[tuple[str, ExpansionPlan]]:
        while found is not None:
            plan = plan_from_json(
                {"layers": found.get("layers")} if isinstance(found, dict) else found,
                f"config.json: {PROVENANCE}",
            )
            yield str(found.get("source", "the base")), plan
            found = found.get("before")

    return list(backwards(hf_config.get(PROVENANCE)))[::-1]


def expansion_section(hf_config: Mapping[str, Any]) -> str:
    """Markdown: what each expansion added; empty for a model that was never expanded."""
    parts = []
    for source, plan in plans_of(hf_config):
        rows = "\n".join(
            f"| {target} | {plan.layers[target].source} | {how_it_begins(plan, target)} |"
            for target in plan.new_layers
        )
        table = (
            f"| new layer | copy of layer | begins as |\n| ---: | ---: | --- |\n{rows}"
            if rows
            else "No layer is new."
        )
        parts.append(
            f"{markdown_code(source)} of {plan.depth} layers became {len(plan.layers)} layers (counted from "
            f"0):\n\n{table}"
        )
    return "\n\n".join(["## Expansion", *parts]) if parts else ""


def how_it_begins(plan: ExpansionPlan, target: int) -> str:
    """What a new layer holds at first, in words."""
    layer = plan.layers[target]
    words = {
        "copy": "copy",
        "noise": f"copy and noise N({layer.noise_mean:g}, {layer.noise_std:g})",
        "zero": "zeros",
        "average": "mean with the layer behind",
    }[str(layer.init)]
    return words + (f", output scaled by {layer.output_scale:g}" if layer.output_scale != 1.0 else "")
