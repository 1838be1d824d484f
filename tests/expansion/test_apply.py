import hashlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from scipy import stats

from babel_jax.config import ExpansionSettings, Family, Init, LayerType, ModelConfig
from babel_jax.errors import BadInput
from babel_jax.expansion.apply import expand_params
from babel_jax.expansion.folders import expand_config
from babel_jax.expansion.plan import ExpansionPlan, TargetLayer, plan_from_settings
from babel_jax.model.decoder import abstract_params, forward
from babel_jax.model.execution import Execution
from tests.forced_devices import forced_devices

NOISE = ExpansionSettings(insert_after=(0, 2), init=Init.NOISE, noise_mean=0.01, noise_std=0.02, seed=7)


def random_params(config, dtype=np.float32):
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.05, dtype), abstract_params(config)
    )


def layer_leaves(params):
    return traverse_util.flatten_dict(params["model"]["layers"], sep="/")


def bits(array):
    return np.asarray(array).tobytes()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("position", [{"insert_after": (1, 2)}, {"append": 2}])
def test_copies_are_bit_equal_to_their_sources(small_config, dtype, position):
    # Random bits: NaNs, infinities and subnormal numbers are copied too.
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(
            np.frombuffer(random.bytes(leaf.size * jnp.dtype(dtype).itemsize), dtype).reshape(leaf.shape)
        ),
        abstract_params(small_config),
    )
    plan = plan_from_settings(ExpansionSettings(**position), 4)
    expanded = expand_params(params, plan)
    before = layer_leaves(params)
    for path, leaf in layer_leaves(expanded).items():
        assert leaf.dtype == before[path].dtype
        assert leaf.shape == (6, *before[path].shape[1:])
        for target, source in enumerate(plan.source_layers):
            assert bits(leaf[target]) == bits(before[path][source])
    assert bits(expanded["model"]["embed_tokens"]["weight"]) == bits(
        params["model"]["embed_tokens"]["weight"]
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(expand_config(small_config, plan)))
    assert jax.tree.map(lambda leaf: leaf.shape, expanded) == shapes


@pytest.mark.parametrize("compute_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("position", [{"insert_after": (0, 2)}, {"append": 3}])
@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("init", [Init.ZERO, Init.IDENTITY])
def test_zero_and_identity_leave_the_logits_unchanged_to_the_bit(
    small_config, init, family, position, compute_dtype
):
    shape = small_config.model_dump(
        include={"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    )
    config = ModelConfig(family=family, tie_word_embeddings=True, **shape)
    params = random_params(config)
    plan = plan_from_settings(ExpansionSettings(**position, init=init), 4)
    deeper, expanded = expand_config(config, plan), expand_params(params, plan)
    for path, leaf in layer_leaves(expanded).items():
        is_zero = init is Init.ZERO or path.split("/")[-2] in ("o_proj", "down_proj")
        assert np.asarray(leaf)[np.asarray(plan.new_layers)].any() != is_zero
    tokens = jnp.arange(24).reshape(2, 12) % config.vocab_size
    run = jax.jit(forward, static_argnames=("config", "execution"))
    before = run(config, params, tokens, execution=Execution(compute_dtype))
    assert np.isfinite(before).all()
    assert bits(run(deeper, expanded, tokens, execution=Execution(compute_dtype))) == bits(before)


def test_average_is_the_mean_of_two_neighbours(small_config):
    params = random_params(small_config, jnp.bfloat16)
    plan = plan_from_settings(ExpansionSettings(insert_after=(1, 3), init=Init.AVERAGE), 4)
    before = layer_leaves(params)
    for path, leaf in layer_leaves(expand_params(params, plan)).items():
        wide = np.asarray(before[path], np.float32)
        expected = ((wide[1] + wide[2]) / 2).astype(jnp.bfloat16)
        assert [bits(leaf[target]) for target in (0, 1, 3, 4)] == [
            bits(before[path][source]) for source in range(4)
        ]
        assert bits(leaf[2]) == bits(expected)
        assert bits(leaf[5]) == bits(before[path][3])  # nothing stands behind the last layer


def test_scaled_layers_share_one_residual_update(small_config):
    params = random_params(small_config)
    plan = plan_from_settings(ExpansionSettings(insert_after=(1, 2), init=Init.SCALED), 4)
    before, factors = layer_leaves(params), [1, 0.5, 0.5, 0.5, 0.5, 1]
    for path, leaf in layer_leaves(expand_params(params, plan)).items():
        is_output = path.split("/")[-2] in ("o_proj", "down_proj")
        for target, (source, factor) in enumerate(zip(plan.source_layers, factors, strict=True)):
            np.testing.assert_allclose(
                leaf[target], before[path][source] * (factor if is_output else 1.0), rtol=1e-7
            )
    with pytest.raises(BadInput, match="output_scale must be 0 or 1 in a gemma2"):
        expand_config(small_config.model_copy(update={"family": Family.GEMMA2, "post_norms": True}), plan)


def test_noise_has_the_asked_mean_and_deviation(small_config):
    config = small_config.model_copy(update={"hidden_size": 128, "intermediate_size": 256})
    params = random_params(config)
    plan = plan_from_settings(NOISE, 4)
    before = layer_leaves(params)
    drawn = []
    for path, leaf in layer_leaves(expand_params(params, plan)).items():
        for target, layer in enumerate(plan.layers):
            noise = np.asarray(leaf[target], np.float64) - np.asarray(before[path][layer.source], np.float64)
            if target in plan.new_layers:
                drawn.append(noise.ravel())
                assert abs(noise.mean() - 0.01) < 5 * 0.02 / np.sqrt(noise.size)
                assert abs(noise.std() - 0.02) < 5 * 0.02 / np.sqrt(2 * noise.size)
            else:
                assert not noise.any()
    assert stats.kstest(np.concatenate(drawn)[:200_000], stats.norm(0.01, 0.02).cdf).pvalue > 1e-3
    # Every leaf and layer draws its own numbers.
    starts = np.stack([noise[:1000] for noise in drawn if noise.size >= 1000])
    assert np.abs(np.corrcoef(starts) - np.eye(len(starts))).max() < 0.2


def test_noise_depends_on_seed_path_and_position_alone(small_config):
    params = random_params(small_config)
    plan = plan_from_settings(NOISE, 4)
    expanded = layer_leaves(expand_params(params, plan))
    one_leaf = {
        "model": {
            "layers": {"mlp": {"up_proj": {"weight": params["model"]["layers"]["mlp"]["up_proj"]["weight"]}}}
        }
    }
    assert bits(layer_leaves(expand_params(one_leaf, plan))["mlp/up_proj/weight"]) == bits(
        expanded["mlp/up_proj/weight"]
    )
    alone = ExpansionPlan(
        layers=tuple(
            layer if target == 1 else TargetLayer(source=layer.source)
            for target, layer in enumerate(plan.layers)
        )
    )
    for path, leaf in layer_leaves(expand_params(params, alone)).items():
        assert bits(leaf[1]) == bits(expanded[path][1])
        assert bits(leaf[4]) == bits(leaf[3])
    other = layer_leaves(expand_params(params, plan_from_settings(NOISE.model_copy(update={"seed": 8}), 4)))
    for path, leaf in other.items():
        assert bits(leaf[1]) != bits(expanded[path][1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_noise_is_added_in_float32_and_then_rounded(small_config, dtype):
    params = random_params(small_config, dtype)
    plan = plan_from_settings(NOISE, 4)
    exact = expand_params(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), plan)
    rounded = jax.tree.map(lambda leaf: bits(leaf.astype(dtype)), exact)
    assert rounded == jax.tree.map(bits, expand_params(params, plan))


def test_noise_inside_jit_is_the_same(small_config):
    params = random_params(small_config)
    plan = plan_from_settings(NOISE, 4)
    inside = jax.jit(expand_params, static_argnums=1)(params, plan)
    assert jax.tree.map(bits, inside) == jax.tree.map(bits, expand_params(params, plan))


ON_A_MESH = """
import hashlib, json, sys
import jax, numpy as np
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from babel_jax.expansion.apply import expand_params
from babel_jax.expansion.plan import plan_from_json

assert jax.device_count() == 8
plan = plan_from_json(json.loads(sys.argv[1]), "plan")
numbers = np.arange(4 * 16 * 24, dtype=np.float32).reshape(4, 16, 24) / 999
params = {"model": {"layers": {name: {"weight": jnp.asarray(numbers, dtype)}
                               for name, dtype in (("a", jnp.float32), ("b", jnp.bfloat16))}}}
for shape in ((8, 1), (2, 4)):
    mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp"))
    sharded = jax.device_put(params, sharding)
    expand = jax.jit(expand_params, static_argnums=1, out_shardings=sharding)
    for expanded in (expand(sharded, plan), expand_params(sharded, plan)):
        leaves = traverse_util.flatten_dict(expanded, sep="/")
        assert len(leaves["model/layers/a/weight"].sharding.device_set) == 8
        digests = {path: hashlib.sha256(np.asarray(leaf).tobytes()) for path, leaf in leaves.items()}
        print(json.dumps({path: digest.hexdigest() for path, digest in digests.items()}))
"""


def test_noise_is_the_same_on_one_device_and_on_meshes_of_eight():
    plan = plan_from_settings(NOISE, 4)
    values = np.arange(4 * 16 * 24, dtype=np.float32).reshape(4, 16, 24) / 999
    params = {
        "model": {
            "layers": {
                "a": {"weight": jnp.asarray(values)},
                "b": {"weight": jnp.asarray(values, jnp.bfloat16)},
            }
        }
    }
    leaves = traverse_util.flatten_dict(expand_params(params, plan), sep="/")
    here = {path: hashlib.sha256(bits(leaf)).hexdigest() for path, leaf in leaves.items()}
    command = [sys.executable, "-c", ON_A_MESH, json.dumps(plan.model_dump())]
    done = subprocess.run(command, capture_output=True, text=True, env=forced_devices(8), check=False)
    assert done.returncode == 0, done.stderr
    there = [json.loads(line) for line in done.stdout.splitlines()]
    assert there == [here] * 4


def test_a_plan_of_another_depth_is_refused(small_config):
    params = random_params(small_config)
    with pytest.raises(BadInput, match="keeps 3 layers, and the model has 4"):
        expand_params(params, plan_from_settings(ExpansionSettings(append=1), 3))
    with pytest.raises(BadInput, match="keeps 3 layers, and the model has 4"):
        expand_config(small_config, plan_from_settings(ExpansionSettings(append=1), 3))


def test_layer_types_follow_their_layers(small_config):
    types = (LayerType.FULL, LayerType.FULL, LayerType.SLIDING, LayerType.SLIDING)
    config = small_config.model_copy(update={"sliding_window": 8, "layer_types": types})
    among = expand_config(config, plan_from_settings(ExpansionSettings(insert_after=(1, 2)), 4))
    assert among.windows == (None, None, None, 8, 8, 8)
    after = expand_config(config, plan_from_settings(ExpansionSettings(append=3), 4))
    assert after.windows == (None, None, 8, 8, None, 8, 8)
