"""The rotary position settings of a config.json, in the forms of transformers 4 (`rope_theta`,
`rope_scaling`) and 5 (`rope_parameters`).

A file may have both forms. If different readers would then use different values, the file is refused.
"""

from typing import Any

from babel_jax.config import ModelConfig, RopeScaling, RopeType
from babel_jax.config.file import parse_settings
from babel_jax.errors import BadInput

TRANSFORMERS_ROPE_THETA = 10000.0  # transformers' own default, which the first Llama files rely on
ROPE_KEYS = {
    RopeType.DEFAULT: (),
    RopeType.LINEAR: ("factor",),
    RopeType.LLAMA3: ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_TABLES = ("rope_scaling", "rope_parameters")
_ORIGINAL = "original_max_position_embeddings"


def read_rope(hf: dict[str, Any], location: str) -> tuple[float, RopeScaling]:
    """Theta and scaling.

    Raises BadInput for other types of scaling, and if transformers 4 and 5 would read different values.
    """
    tables = {name: hf[name] for name in _TABLES if hf.get(name)}
    # Gemma 3, for example, has one table for each type of layer.
    for name, table in tables.items():
        if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
            raise BadInput(
                f"{location}: {name} must be one table for all layers; rotary parameters by layer "
                "type are not supported"
            )
    for name, table in {"config.json": hf, **tables}.items():
        if (table.get("partial_rotary_factor") or 1.0) != 1.0:
            given = f"partial_rotary_factor = {table['partial_rotary_factor']!r}"
            raise BadInput(f"{location}: {name}: {given} is not supported; supported: 1.0")

    # Transformers 4 reads rope_scaling, transformers 5 reads rope_parameters: they must agree.
    scalings = {_read_scaling(table, name, hf, location) for name, table in tables.items()}
    if len(scalings) > 1:
        raise BadInput(f"{location}: rope_scaling and rope_parameters differ; keep the one that holds")
    return _read_theta(hf, tables, location), (scalings.pop() if scalings else RopeScaling())


def _read_theta(hf: dict[str, Any], tables: dict[str, dict[str, Any]], location: str) -> float:
    given = [table["rope_theta"] for table in (hf, *tables.values()) if table.get("rope_theta") is not None]
    if not all(isinstance(theta, int | float) for theta in given):
        raise BadInput(f"{location}: rope_theta = {given[0]!r}: not a number")
    thetas = set(given)
    if len(thetas) > 1:
        raise BadInput(
            f"{location}: rope_theta is given as {' and as '.join(sorted(map(str, thetas)))}; keep the one "
            "that holds"
        )
    # null does not mean the default: transformers computes with it and fails.
    null = [name for name, table in tables.items() if table.get("rope_theta", 0) is None]
    if null or (not thetas and hf.get("rope_theta", 0) is None):
        raise BadInput(f"{location}: {[*null, 'config.json'][0]}: rope_theta is null; give its number")
    if len(tables) == 2 and hf.get("rope_theta") is None and len(given) == 1:
        raise BadInput(
            f"{location}: rope_theta is in one of rope_scaling and rope_parameters alone; write it into both"
        )
    return thetas.pop() if thetas else TRANSFORMERS_ROPE_THETA


def _read_scaling(table: dict[str, Any], name: str, hf: dict[str, Any], location: str) -> RopeScaling:
    # Older files call the key `type`.
    rope_type = table.get("rope_type", table.get("type", "default"))
    if rope_type not in list(RopeType):
        raise BadInput(
            f"{location}: {name}: rope type {rope_type!r} is not supported; supported: {', '.join(RopeType)}"
        )
    # If no table has this key, transformers uses the model's own length. It prefers the value outside the
    # table.
    known = {_ORIGINAL: hf["max_position_embeddings"], **table}
    keys = ROPE_KEYS[RopeType(rope_type)]
    if _ORIGINAL in keys and _ORIGINAL in hf:
        if table.get(_ORIGINAL) not in (None, hf[_ORIGINAL]):
            both = f"{_ORIGINAL} = {hf[_ORIGINAL]!r}, and in {name} {table[_ORIGINAL]!r}"
            raise BadInput(
                f"{location}: {both}; transformers 4 and 5 differ in which of them they take, so keep "
                "the one that holds"
            )
        known[_ORIGINAL] = hf[_ORIGINAL]
    missing = [key for key in keys if known.get(key) is None]
    if missing:
        raise BadInput(f"{location}: {name}: missing {', '.join(missing)}, which rope type {rope_type} needs")
    return parse_settings(
        RopeScaling, {"rope_type": rope_type, **{key: known[key] for key in keys}}, f"{location}: {name}"
    )


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json for rotary positions, in both forms."""
    kind = config.rope_scaling.rope_type
    scaling = {key: getattr(config.rope_scaling, key) for key in ROPE_KEYS[kind]}
    typed = {"rope_type": str(kind), **scaling}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": {**typed, "type": typed["rope_type"]} if scaling else None,
        "rope_parameters": {**typed, "rope_theta": config.rope_theta},
    }


def completed_tables(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The rotary tables of a config.json, completed with the values that readers would take from elsewhere in
    it, or from a default.
    """
    needed = {key: getattr(config.rope_scaling, key) for key in ROPE_KEYS[config.rope_scaling.rope_type]}
    return {name: {**needed, **hf[name]} for name in _TABLES if hf.get(name)}
