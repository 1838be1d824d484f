import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babel_jax.config import Activation, Family, LayerType, ModelConfig, RopeScaling, RopeType
from babel_jax.errors import BadInput
from babel_jax.model.decoder import count_parameters
from babel_jax.model_folders.hf_config import (
    in_both_spellings,
    read_hf_config,
    stored_eos_token_ids,
    write_hf_config,
)

# The values of Qwen2.5-7B's config.json (transformers 4), and the same in transformers 5's spelling.
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_7B_NEW = {key: value for key, value in QWEN_7B.items() if key not in ("rope_theta", "torch_dtype")} | {
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 28,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "transformers_version": "5.23.0",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}

MISTRAL = {
    **LLAMA,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 2,
}

# config.json of google/gemma-2-9b, as far as it describes the decoder; its model card gives 9.24 B
# parameters.
GEMMA_9B = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}


def test_both_dialects_describe_the_same_model():
    old, new = read_hf_config(QWEN_7B, "old"), read_hf_config(QWEN_7B_NEW, "new")
    assert old == new
    assert (old.head_dim, old.rope_theta, old.rms_norm_eps, old.qkv_bias, old.windows) == (
        128,
        1e6,
        1e-6,
        True,
        (None,) * 28,
    )


def test_llama_defaults_are_those_of_transformers():
    config = read_hf_config(LLAMA, "config.json")
    assert (config.num_key_value_heads, config.rope_theta, config.qkv_bias, config.tie_word_embeddings) == (
        4,
        10000.0,
        False,
        False,
    )
    biased = read_hf_config(
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 16}, "config.json"
    )
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias, biased.head_dim) == (True, True, True, 16)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_scaling_of_transformers_4(key):
    linear = read_hf_config(
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": {key: "linear", "factor": 2}}, "config.json"
    )
    assert linear.rope_scaling == RopeScaling(rope_type=RopeType.LINEAR, factor=2.0)
    assert linear.rope_theta == 5e5


def test_gemma2_has_the_published_parameters():
    config = read_hf_config(GEMMA_9B, "config.json")
    assert count_parameters(config) == 9_241_705_984
    assert config.tie_word_embeddings
    assert config.windows == (4096, None) * 21
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)


def test_sliding_window_of_transformers_4():
    sliding = {**QWEN_7B, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 26}
    assert read_hf_config(sliding, "config.json").windows == (None,) * 26 + (4096,) * 2


@pytest.mark.parametrize("family", [Family.QWEN2, Family.QWEN3, Family.MISTRAL, Family.GEMMA2])
def test_a_window_that_is_left_out_is_that_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    hf = {
        **LLAMA,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "use_sliding_window": True,
        "max_window_layers": 1,
    }
    hf |= {"model_type": str(family), "architectures": None}
    theirs = getattr(transformers, f"{family.capitalize()}Config")(**hf)
    types = ["sliding_attention"] * 4 if family is Family.MISTRAL else theirs.layer_types
    windows = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in types)
    assert any(windows)
    assert read_hf_config(hf, "config.json").windows == windows


def test_written_config_keeps_unknown_keys_and_names_the_end_of_text():
    written = write_hf_config(
        read_hf_config(QWEN_7B, "x"), {**QWEN_7B, "of_mine": 1}, dtype="float32", eos_token_id=[7, 8]
    )
    assert written["of_mine"] == 1
    assert written["bos_token_id"] == 151643
    assert stored_eos_token_ids(written) == (7, 8)
    assert written["dtype"] == written["torch_dtype"] == "float32"
    assert stored_eos_token_ids(write_hf_config(read_hf_config(LLAMA, "x"))) == ()


@st.composite
def model_configs(draw):
    family = draw(st.sampled_from(Family))
    layers, key_value_heads = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    has_bias_key = family in (Family.LLAMA, Family.QWEN3, Family.GEMMA2)
    bias = family is Family.QWEN2 or (has_bias_key and draw(st.booleans()))
    rope_type = draw(st.sampled_from(RopeType))
    factors = {"factor": draw(st.floats(1, 8))} if rope_type is not RopeType.DEFAULT else {}
    if rope_type is RopeType.LLAMA3:
        factors |= {
            "original_max_position_embeddings": draw(st.integers(1, 100)),
            "low_freq_factor": draw(st.floats(0.5, 2)),
        }
    types = draw(
        st.one_of(st.just([]), st.lists(st.sampled_from(LayerType), min_size=layers, max_size=layers))
    )
    sliding = family is not Family.LLAMA and LayerType.SLIDING in types
    caps = st.none() | st.floats(1, 100)
    gemma2 = {
        "attn_logit_softcapping": draw(caps),
        "final_logit_softcapping": draw(caps),
        "query_pre_attn_scalar": draw(st.integers(1, 99)),
    }
    return ModelConfig(
        **(gemma2 if family is Family.GEMMA2 else {}),
        family=family,
        vocab_size=draw(st.integers(1, 1000)),
        hidden_size=draw(st.integers(1, 1000)),
        intermediate_size=draw(st.integers(1, 1000)),
        num_hidden_layers=layers,
        num_attention_heads=key_value_heads * draw(st.integers(1, 7)),
        num_key_value_heads=key_value_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        max_position_embeddings=draw(st.integers(101, 100000)),
        rope_theta=draw(st.floats(1, 1e7)),
        rope_scaling=RopeScaling(rope_type=rope_type, **factors),
        rms_norm_eps=draw(st.floats(1e-9, 1e-3)),
        tie_word_embeddings=draw(st.booleans()),
        qkv_bias=bias,
        o_bias=bias and has_bias_key,
        mlp_bias=family is Family.LLAMA and draw(st.booleans()),
        sliding_window=draw(st.integers(1, 100)) if sliding else None,
        layer_types=tuple(types) if sliding else (),
    )


@settings(max_examples=60)
@given(config=model_configs())
def test_writing_and_reading_gives_the_same_config(config):
    assert read_hf_config(json.loads(json.dumps(write_hf_config(config))), "config.json") == config


@settings(max_examples=20, deadline=None)
@given(config=model_configs())
def test_transformers_reads_the_written_config_as_meant(config):
    transformers = pytest.importorskip("transformers")
    if config.hidden_size % config.num_attention_heads:
        return  # transformers refuses these for Llama and Gemma 2 whatever head_dim says
    written = write_hf_config(config)
    # As transformers' AutoConfig tells them apart.
    ministral = config.family is Family.MISTRAL and "layer_types" in written
    name = "Ministral" if ministral else config.family.capitalize()
    theirs = getattr(transformers, f"{name}Config").from_dict(written)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == config.rope_scaling.rope_type
    assert theirs.rope_parameters.get("factor", 1.0) == config.rope_scaling.factor
    assert theirs.tie_word_embeddings == config.tie_word_embeddings
    assert theirs.head_dim == config.head_dim
    if config.family is Family.GEMMA2:
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"):
            assert getattr(theirs, key) == getattr(config, key)
    if config.family is Family.MISTRAL and not ministral:
        assert (theirs.sliding_window,) * config.num_hidden_layers == config.windows
    elif config.family is not Family.LLAMA:
        windows = tuple(
            theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types
        )
        assert windows == config.windows


def without(key):
    return {name: value for name, value in QWEN_7B.items() if name != key}


@pytest.mark.parametrize(
    ("hf", "words"),
    [
        (without("num_hidden_layers"), ["missing num_hidden_layers"]),
        (without("rms_norm_eps"), ["missing rms_norm_eps"]),
        (without("num_key_value_heads"), ["missing num_key_value_heads"]),
        (without("model_type"), ["missing model_type", "qwen2", "llama"]),
        ({**QWEN_7B, "model_type": "mixtral"}, ["'mixtral'", "qwen2", "llama"]),
        (
            {**QWEN_7B, "architectures": ["Qwen2ForSequenceClassification"]},
            ["Qwen2ForSequenceClassification", "Qwen2ForCausalLM"],
        ),
        ({**QWEN_7B, "quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({**QWEN_7B, "hidden_act": "gelu"}, ["hidden_act = 'gelu'", "silu"]),
        (
            {**QWEN_7B, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            ["rope_scaling", "'yarn'", "default, linear, llama3"],
        ),
        (
            {**QWEN_7B_NEW, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}},
            ["rope_parameters", "'dynamic'"],
        ),
        ({**QWEN_7B, "rope_scaling": {"type": "linear"}}, ["missing factor"]),
        ({**QWEN_7B, "rope_scaling": {"type": "linear", "factor": -1.0}}, ["factor"]),
        (
            {**QWEN_7B, "rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor = 0.5"],
        ),
        (
            {**QWEN_7B, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            ["rope_theta", "10000.0", "1000000.0"],
        ),
        (
            {**QWEN_7B_NEW, "rope_scaling": {"type": "linear", "factor": 2.0}},
            ["rope_scaling and rope_parameters differ"],
        ),
        (
            {**QWEN_7B_NEW, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            ["rope_parameters", "by layer type"],
        ),
        ({**QWEN_7B, "num_key_value_heads": 5}, ["num_attention_heads = 28", "num_key_value_heads = 5"]),
        ({**QWEN_7B, "hidden_size": "3584"}, ["hidden_size = '3584'", "not a number"]),
        ({**QWEN_7B, "rope_theta": [1.0]}, ["rope_theta = [1.0]", "not a number"]),
        (
            {**QWEN_7B_NEW, "rope_parameters": {"rope_type": "default", "rope_theta": [1.0]}},
            ["rope_theta = [1.0]", "not a number"],
        ),
        ({**QWEN_7B, "max_window_layers": 1.5}, ["max_window_layers = 1.5", "not a whole one"]),
        ({**QWEN_7B, "eos_token_id": "</s>"}, ["eos_token_id = '</s>'", "not a token id"]),
        ({**QWEN_7B, "bos_token_id": "<s>"}, ["bos_token_id = '<s>'", "not a token id"]),
        ({**QWEN_7B, "pad_token_id": [1]}, ["pad_token_id = [1]", "not a token id"]),
        ({**QWEN_7B, "vocab_size": 0}, ["vocab_size"]),
        ({**QWEN_7B_NEW, "layer_types": ["full_attention"] * 27}, ["layer_types", "27", "28"]),
        ({**QWEN_7B_NEW, "layer_types": ["chunked_attention"] * 28}, ["layer_types", "chunked_attention"]),
        ({**without("max_window_layers"), "use_sliding_window": True}, ["missing max_window_layers"]),
        ({**GEMMA_9B, "hidden_activation": "gelu"}, ["hidden_activation = 'gelu'", "gelu_pytorch_tanh"]),
        ({**GEMMA_9B, "query_pre_attn_scalar": None}, ["missing query_pre_attn_scalar"]),
        ({**GEMMA_9B, "sliding_window": None}, ["sliding_window is not set"]),
        (
            {**GEMMA_9B, "layer_types": ["chunked_attention"] * GEMMA_9B["num_hidden_layers"]},
            ["layer_types", "chunked_attention"],
        ),
        ({**GEMMA_9B, "use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ({**LLAMA, "layer_types": ["sliding_attention"] * 4}, ["sliding_attention", "llama"]),
        ({**LLAMA, "layer_types": ["full_attention"] * 3}, ["layer_types", "3", "4"]),
    ],
)
def test_what_cannot_be_used_is_named(hf, words):
    with pytest.raises(BadInput) as raised:
        read_hf_config(hf, "some/config.json")
    message = str(raised.value)
    assert message.startswith("some/config.json: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_model_that_the_family_cannot_express_is_refused(tiny_config):
    half_sliding = {"sliding_window": 4, "layer_types": (LayerType.FULL, LayerType.SLIDING, LayerType.FULL)}
    for changes, named in (
        ({"mlp_bias": True}, "mlp_bias"),
        ({"qk_norm": True}, "qk_norm"),
        ({"norm_offset": 1.0}, "norms"),
        ({"final_logit_softcapping": 30.0}, "soft caps"),
        ({"hidden_act": Activation.GELU}, "hidden_act"),
        ({"family": Family.LLAMA}, "qkv_bias, o_bias"),
        ({"family": Family.LLAMA, "qkv_bias": False, **half_sliding}, "layer_types"),
    ):
        with pytest.raises(BadInput, match=f"cannot express this model's {named}$"):
            write_hf_config(tiny_config.model_copy(update=changes))


@pytest.mark.parametrize(
    "hf", [QWEN_7B, QWEN_7B_NEW, LLAMA, {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}]
)
def test_the_other_spelling_is_added_and_nothing_changed(hf):
    both = in_both_spellings(hf, "config.json")
    assert {key: both[key] for key in hf} == hf
    assert read_hf_config(both, "config.json") == read_hf_config(hf, "config.json")
    assert both["rope_theta"] == both["rope_parameters"]["rope_theta"]
    assert both.get("dtype") == both.get("torch_dtype") == hf.get("dtype", hf.get("torch_dtype"))
    assert in_both_spellings(both, "config.json") == both


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ONE_LINEAR = {"rope_scaling": {"type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(
    ("hf", "words"),
    [
        ({**LLAMA, "is_causal": False}, ["is_causal = False"]),
        ({**LLAMA, "is_causal": None}, ["is_causal = None"]),
        ({**LLAMA, "partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ({**LLAMA, **ONE_LINEAR, "partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ({**LLAMA, "rope_theta": None}, ["rope_theta is null"]),
        (
            {**LLAMA, "rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": None}},
            ["rope_parameters: rope_theta is null"],
        ),
        (
            {
                **LLAMA,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
                "rope_scaling": {"rope_type": "default"},
            },
            ["rope_theta is in one of"],
        ),
        (
            {
                **LLAMA,
                "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32},
                "original_max_position_embeddings": 16,
            },
            ["original_max_position_embeddings = 16", "32"],
        ),
        (
            {**LLAMA, "rope_scaling": LLAMA3, "original_max_position_embeddings": None},
            ["missing original_max_position_embeddings"],
        ),
        (
            {**LLAMA, "rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            ["high_freq_factor = 4.0", "low_freq_factor = 4.0"],
        ),
        ({**LLAMA, "sliding_window": 8}, ["sliding_window = 8", "llama"]),
        ({**LLAMA, "layer_types": ["chunked_attention"] * 4}, ["'chunked_attention'", "llama"]),
        ({**LLAMA, "attention_chunk_size": 8}, ["attention_chunk_size = 8"]),
        ({**LLAMA, "kv_sharing_modes": ["reuse"] * 4}, ["kv_sharing_modes"]),
        ({**LLAMA, "per_layer_config": {"1": {"rms_norm_eps": 1.0}}}, ["per_layer_config"]),
        ({**LLAMA, "attribute_map": {"rms_norm_eps": "other"}}, ["attribute_map"]),
        ({**LLAMA, "text_config": {"hidden_size": 3}}, ["text_config"]),
        ({**LLAMA, "is_encoder_decoder": True}, ["is_encoder_decoder"]),
        ({**LLAMA, "pad_token_id": 100}, ["pad_token_id = 100", "rows 0 to 99"]),
        (
            {**MISTRAL, "layer_types": ["sliding_attention"] * 4, "sliding_window": None},
            ["sliding_window is not set"],
        ),
        ({**LLAMA, "num_hidden_layers": 10**12}, ["num_hidden_layers = 1000000000000", "1 to 2000"]),
        ({**LLAMA, "num_hidden_layers": 10**6}, ["num_hidden_layers"]),
        ({**LLAMA, "num_hidden_layers": -1}, ["num_hidden_layers = -1"]),
        ({**LLAMA, "num_attention_heads": 10**9}, ["num_attention_heads"]),
        ({**LLAMA, "num_attention_heads": 2**14, "num_key_value_heads": 3}, ["num_key_value_heads = 3"]),
        ({**LLAMA, "vocab_size": 2**31}, ["vocab_size"]),
        ({**LLAMA, "hidden_size": 2**40}, ["hidden_size"]),
        ({**LLAMA, "intermediate_size": 2**40}, ["intermediate_size"]),
        ({**LLAMA, "head_dim": 2**40}, ["head_dim"]),
        ({**LLAMA, "max_position_embeddings": 2**31}, ["max_position_embeddings"]),
        ({**MISTRAL, "sliding_window": 2**31}, ["sliding_window"]),
    ],
)
def test_keys_with_which_other_readers_compute_something_else_are_refused(hf, words):
    """Each was tried with transformers 5.23: other logits or other generated tokens than
    ours, or no model.
    """
    test_what_cannot_be_used_is_named(hf, words)


def test_the_original_length_outside_of_the_table_holds_and_is_written_into_it():
    transformers = pytest.importorskip("transformers")
    for hf, expected in (
        ({**LLAMA, "rope_scaling": LLAMA3, "original_max_position_embeddings": 16}, 16),
        ({**LLAMA, "rope_scaling": LLAMA3}, 64),
        ({**LLAMA, "rope_parameters": LLAMA3}, 64),
    ):
        assert read_hf_config(hf, "x").rope_scaling.original_max_position_embeddings == expected
        both = in_both_spellings(hf, "x")
        for table in ("rope_scaling", "rope_parameters"):
            assert both[table]["original_max_position_embeddings"] == expected
        theirs = transformers.LlamaConfig.from_dict(json.loads(json.dumps(both)))
        theirs.standardize_rope_params()
        assert theirs.rope_parameters["original_max_position_embeddings"] == expected


def test_whole_numbers_are_read_and_written_as_transformers_takes_them():
    transformers = pytest.importorskip("transformers")
    hf = {**LLAMA, "initializer_range": 0, "rms_norm_eps": 1}
    assert read_hf_config(hf, "x").initializer_range == 0.0
    assert transformers.LlamaConfig.from_dict(in_both_spellings(hf, "x")).rms_norm_eps == 1.0


@pytest.mark.parametrize(
    "hf",
    [
        {**QWEN_7B, "head_dim": None},
        {**QWEN_7B, "max_window_layers": None},
        {**MISTRAL, "model_type": "ministral"},
    ],
)
def test_null_for_which_transformers_makes_no_model_is_filled(hf):
    transformers = pytest.importorskip("transformers")
    hf = {
        **hf,
        "architectures": None,
        "num_hidden_layers": 2,
        "hidden_size": 56,
        "intermediate_size": 8,
        "vocab_size": 8,
    }
    hf |= {"bos_token_id": None, "eos_token_id": None}
    both = in_both_spellings(hf, "x")
    kind = {"qwen2": "Qwen2", "ministral": "Ministral"}[hf["model_type"]]
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config").from_dict(both)
    )
    assert model.model.layers[0].self_attn.head_dim == read_hf_config(hf, "x").head_dim
