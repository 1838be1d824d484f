"""Every key of config.json that transformers' code of the supported families reads is honoured here, refused,
or without effect.

A new version of transformers that reads another key fails this test: then look at the key.
"""

import re
from pathlib import Path

import pytest

from babel_jax.errors import BadInput
from babel_jax.model_folders.hf_config import read_hf_config

MODELS = ("qwen2", "qwen3", "llama", "mistral", "ministral", "gemma2")
HONOURED = {
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *(
        "max_position_embeddings",
        "rms_norm_eps",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "hidden_activation",
    ),
    *("layer_types", "sliding_window", "rope_parameters", "rope_theta", "original_max_position_embeddings"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
}
# With a value by which transformers computes, or keeps in its cache, something else than this decoder does.
REFUSED = {
    "is_causal": False,
    "use_bidirectional_attention": True,
    "partial_rotary_factor": 0.5,
    "per_layer_config": {"1": {"rms_norm_eps": 1.0}},
    "attention_chunk_size": 4,
    "kv_sharing_modes": ["reuse"] * 4,
    # refused beyond the vocabulary, where transformers makes no model; else without effect
    "pad_token_id": 100,
}
WITHOUT_EFFECT = {
    "attention_dropout": "in training alone, and this project trains without",
    "_rope_type_labels": "names of rotary tables by layer type, which are refused",
    "number_of_conv_states": "of layers that convolve, which layer_types would name",
    "_attn_implementation": "which kernel computes attention",
    "json": "no key: a file's name",
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def keys_in(source):
    source = re.sub(r'"""(.|\n)*?"""', "", source)
    named = re.findall(r'(?:get|has)attr\(\s*(?:self|[\w.]*config), "([a-z_]+)"', source)
    return {*re.findall(r"\bconfig\.([a-z_]+)\b(?!\()", source), *named}


def test_every_key_that_transformers_reads_is_accounted_for():
    transformers = pytest.importorskip("transformers")
    root = Path(transformers.__file__).parent
    read = set()
    for model in MODELS:
        read |= keys_in((root / "models" / model / f"modeling_{model}.py").read_text())
    for file in ("masking_utils.py", "modeling_rope_utils.py"):
        read |= keys_in((root / file).read_text())
    cache = (root / "cache_utils.py").read_text()
    read |= keys_in(cache[cache.index("def get_layer_types_and_kwargs") : cache.index("class DynamicCache(")])
    own_state = {
        key
        for key in read
        if key.endswith("_inv_freq") or key in ("config", "default_theta", "default_rope_type", "rope_type")
    }
    own_state |= {"_post_init_done", "is_heterogeneous", "ignore_keys_at_rope_validation"}
    assert read - own_state - HONOURED - REFUSED.keys() - WITHOUT_EFFECT.keys() == set()
    assert {
        "is_causal",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "attention_chunk_size",
    } <= read


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_called_refused_is(key):
    read_hf_config(LLAMA, "x")
    with pytest.raises(BadInput, match=key):
        read_hf_config({**LLAMA, key: REFUSED[key]}, "x")
