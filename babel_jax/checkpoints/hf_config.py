"""config.json of Hugging Face to `ModelConfig` and back, in the spellings of transformers 4 and 5.

transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`; transformers 5 `rope_parameters`, `dtype` and `layer_types`.
"""

from typing import Any

from babel_jax.config import Family, LayerType, ModelConfig, RopeScaling, RopeType
from babel_jax.config_file import parse_settings
from babel_jax.errors import BadInput

ARCHITECTURES = {Family.QWEN2: "Qwen2ForCausalLM", Family.LLAMA: "LlamaForCausalLM"}

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_SPELLED_TWICE = ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype", "dtype")
_TRANSFORMERS_ROPE_THETA = 10000.0  # transformers' own default, which the first Llama files rely on
_ROPE_KEYS = {
    RopeType.DEFAULT: (),
    RopeType.LINEAR: ("factor",),
    RopeType.LLAMA3: ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_hf_config(hf: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes; `where` (its path) stands in messages.

    Keys that say nothing about the decoder's computation are not looked at. Raises BadInput for another architecture, a missing key, and
    anything that would make the model compute something else than this decoder does (quantization, other activations or rotary types).
    """
    family = _family(hf, where)
    needed = (*_NEEDED, "num_key_value_heads") if family is Family.QWEN2 else _NEEDED
    missing = [key for key in needed if hf.get(key) is None]
    if missing:
        raise BadInput(f"{where}: missing {', '.join(missing)}; without it the model's shape is not known")
    wrong = [key for key in (*needed, "max_window_layers") if not isinstance(hf.get(key, 0), int | float | None)]
    if wrong:
        raise BadInput(f"{where}: {', '.join(f'{key} = {hf[key]!r}' for key in wrong)}: not a number")
    if hf.get("quantization_config"):
        raise BadInput(f"{where}: quantization_config: quantized weights are not supported; give the model in bfloat16, float16 or float32")
    if hf.get("hidden_act", "silu") != "silu":
        raise BadInput(f"{where}: hidden_act = {hf['hidden_act']!r} is not supported; supported: silu")
    theta, scaling = _rope(hf, where)
    window, layer_types = _windows(hf, family, where)
    llama_bias = family is Family.LLAMA and hf.get("attention_bias", False)
    values = {key: hf[key] for key in (*needed, "num_key_value_heads", "head_dim", "initializer_range") if hf.get(key) is not None}
    return parse_settings(
        ModelConfig,
        {
            **values,
            "family": family,
            "rope_theta": theta,
            "rope_scaling": scaling.model_dump(mode="json"),
            "tie_word_embeddings": hf.get("tie_word_embeddings", False),
            "qkv_bias": family is Family.QWEN2 or llama_bias,
            "o_bias": llama_bias,
            "mlp_bias": family is Family.LLAMA and hf.get("mlp_bias", False),
            "sliding_window": window,
            "layer_types": layer_types,
        },
        where,
    )


def write_hf_config(
    config: ModelConfig,
    base: dict[str, Any] | None = None,
    dtype: str | None = "float32",
    *,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 and vLLM read alike: what the two spell differently stands in both spellings.

    `base` keeps its other keys. A token id that is not given is taken from `base`, and is null without one: transformers' own defaults
    (Llama: 1 and 2) name tokens that a tokenizer may use for something else. `dtype` names the type of the stored tensors.
    Raises BadInput for a model that its family cannot express in config.json.
    """
    hf = dict(base or {})
    given = {"eos_token_id": eos_token_id, "bos_token_id": bos_token_id, "pad_token_id": pad_token_id}
    hf |= {key: hf.get(key) if value is None else value for key, value in given.items()}
    shape_keys = (*_NEEDED, "num_key_value_heads", "head_dim", "initializer_range", "tie_word_embeddings")
    hf |= {key: getattr(config, key) for key in shape_keys}
    hf |= {"architectures": [ARCHITECTURES[config.family]], "model_type": str(config.family), "hidden_act": "silu"}
    hf |= {"torch_dtype": dtype, "dtype": dtype}

    scaling = {key: getattr(config.rope_scaling, key) for key in _ROPE_KEYS[config.rope_scaling.rope_type]}
    typed = {"rope_type": str(config.rope_scaling.rope_type), **scaling}
    hf |= {"rope_theta": config.rope_theta, "rope_parameters": {**typed, "rope_theta": config.rope_theta}}
    hf["rope_scaling"] = {**typed, "type": typed["rope_type"]} if scaling else None

    if config.family is Family.LLAMA:
        if config.o_bias != config.qkv_bias or config.layer_types.count(LayerType.SLIDING):
            raise BadInput("a llama config.json has one attention_bias for q, k, v and o, and no sliding window; this model differs")
        hf |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
        if "layer_types" in hf:
            hf["layer_types"] = [str(LayerType.FULL)] * config.num_hidden_layers
        return hf
    if not config.qkv_bias or config.o_bias or config.mlp_bias:
        raise BadInput("a qwen2 config.json means biases on q, k and v and on nothing else; this model differs")
    types = config.layer_types or (LayerType.FULL,) * config.num_hidden_layers
    sliding = LayerType.SLIDING in types
    hf |= {"use_sliding_window": sliding, "sliding_window": config.sliding_window if sliding else None}
    hf |= {"layer_types": [str(kind) for kind in types], "max_window_layers": types.index(LayerType.SLIDING) if sliding else len(types)}
    return hf


def in_both_spellings(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """The same config.json with what only one of transformers 4 and 5 would find spelled for the other too; no value is changed.

    Without it transformers 4 reads a folder of transformers 5 with a rotary theta of its own. Raises BadInput as `read_hf_config` does.
    """
    dtype = hf.get("dtype", hf.get("torch_dtype"))
    written = write_hf_config(read_hf_config(hf, where), hf, dtype)
    return {**hf, **{key: written[key] for key in _SPELLED_TWICE if hf.get(key) is None and written[key] is not None}}


def stored_eos_token_ids(hf: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end a text, from config.json's `eos_token_id`, which is one id, a list of ids, or null."""
    ids = hf.get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _family(hf: dict[str, Any], where: str) -> Family:
    supported = ", ".join(f"{family} ({ARCHITECTURES[family]})" for family in Family)
    if not hf.get("model_type"):
        raise BadInput(f"{where}: missing model_type; supported: {supported}")
    if hf["model_type"] not in list(Family):
        raise BadInput(f"{where}: model_type = {hf['model_type']!r} is not supported; supported: {supported}")
    family = Family(hf["model_type"])
    architectures = hf.get("architectures") or [ARCHITECTURES[family]]
    if architectures != [ARCHITECTURES[family]]:
        raise BadInput(f"{where}: architectures = {architectures} is not supported; supported: {supported}")
    return family


def _rope(hf: dict[str, Any], where: str) -> tuple[float, RopeScaling]:
    """Theta and scaling. Where both spellings stand they must agree, or which one holds would depend on the reader."""
    tables = {name: hf[name] for name in ("rope_scaling", "rope_parameters") if hf.get(name)}
    for name, table in tables.items():
        if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
            raise BadInput(f"{where}: {name} must be one table for all layers; rotary parameters by layer type are not supported")
    thetas = {table["rope_theta"] for table in (hf, *tables.values()) if table.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise BadInput(f"{where}: rope_theta is given as {' and as '.join(sorted(map(str, thetas)))}; keep the one that holds")
    scalings = {_rope_scaling(table, name, hf, where) for name, table in tables.items()}
    if len(scalings) > 1:
        raise BadInput(f"{where}: rope_scaling and rope_parameters differ; keep the one that holds")
    return (thetas.pop() if thetas else _TRANSFORMERS_ROPE_THETA), (scalings.pop() if scalings else RopeScaling())


def _rope_scaling(table: dict[str, Any], name: str, hf: dict[str, Any], where: str) -> RopeScaling:
    rope_type = table.get("rope_type", table.get("type", "default"))
    if rope_type not in list(RopeType):
        raise BadInput(f"{where}: {name}: rope type {rope_type!r} is not supported; supported: {', '.join(RopeType)}")
    if (table.get("partial_rotary_factor") or 1.0) != 1.0:
        raise BadInput(f"{where}: {name}: partial_rotary_factor = {table['partial_rotary_factor']} is not supported; supported: 1.0")
    # transformers falls back on the model's own length for this key alone.
    known = {"original_max_position_embeddings": hf["max_position_embeddings"], **table}
    keys = _ROPE_KEYS[RopeType(rope_type)]
    missing = [key for key in keys if known.get(key) is None]
    if missing:
        raise BadInput(f"{where}: {name}: missing {', '.join(missing)}, which rope type {rope_type} needs")
    return parse_settings(RopeScaling, {"rope_type": rope_type, **{key: known[key] for key in keys}}, f"{where}: {name}")


def _windows(hf: dict[str, Any], family: Family, where: str) -> tuple[int | None, list[str]]:
    """The sliding window and the type of each layer; a window that no layer uses is None, and `layer_types` is then empty."""
    layers = hf["num_hidden_layers"]
    types = hf.get("layer_types")
    if not isinstance(types, list | None):
        raise BadInput(f"{where}: layer_types must be a list with one entry for each layer")
    if family is Family.LLAMA:
        if types and LayerType.SLIDING in types:
            raise BadInput(f"{where}: layer_types names {LayerType.SLIDING}, which a llama model does not have")
        return None, []
    window = hf.get("sliding_window") if hf.get("use_sliding_window", False) else None
    if types is None and window is not None:
        if hf.get("max_window_layers") is None:
            raise BadInput(f"{where}: missing max_window_layers, which use_sliding_window = true needs")
        full = min(hf["max_window_layers"], layers)
        types = [str(LayerType.FULL)] * full + [str(LayerType.SLIDING)] * (layers - full)
    if types is None or (len(types) == layers and all(kind == LayerType.FULL for kind in types)):
        return None, []
    return window, types
