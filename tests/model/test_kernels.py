"""Attention kernels and the cross-entropy in pieces, against the plain ones."""

import re
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from babel_jax.config import AttentionKernel, ComputeType, LayerType, ModelConfig, Remat
from babel_jax.errors import BadInput
from babel_jax.model import cross_entropy as vocabulary
from babel_jax.model import flash_attention as plain_attention
from babel_jax.model.attention_kernels import attention_fn_for, kernel_for
from babel_jax.model.cross_entropy import target_logits
from babel_jax.model.decoder import abstract_params
from babel_jax.model.execution import Execution
from babel_jax.model.layers import softcapped
from babel_jax.model.parallel import SINGLE_DEVICE, Parallelism
from babel_jax.training.loss import summed_loss
from tests.forced_devices import forced_devices

BATCH, TIME = 2, 256
SHAPE = ModelConfig(
    vocab_size=64,
    hidden_size=512,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
)


def plain(query, key, value, segment_ids, window, softcap):
    """Scores of every pair, masked, softmax, in NumPy's way of saying it."""
    heads = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, heads, 2), jnp.repeat(value, heads, 2)
    scores = softcapped(jnp.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5, softcap)
    distance = np.arange(query.shape[1])[:, None] - np.arange(key.shape[1])
    seen = (
        (distance >= 0)
        & (distance < (window or 10**9))
        & (segment_ids[:, :, None] == segment_ids[:, None, :])
    )
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, value).reshape(*query.shape[:2], -1)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weight = (
        jax.random.normal(k, (BATCH, TIME, h, 128)) for k, h in zip(keys, (4, 2, 2, 4), strict=True)
    )
    segment_ids = np.stack([np.repeat([1, 2, 0], [100, 120, 36]), np.repeat([1, 2, 3], [60, 4, 192])])
    return query, key, value, weight.reshape(BATCH, TIME, -1), jnp.asarray(segment_ids, jnp.int32)


@pytest.mark.parametrize("kernel", list(AttentionKernel)[1:])
@pytest.mark.parametrize(
    ("windows", "which", "softcap"),
    [((None,), 0, None), ((None, 70), 1, None), ((None, 70), 1, 20.0)],
    ids=["full", "window", "window and softcap"],
)
def test_a_kernel_gives_what_plain_attention_gives(inputs, kernel, windows, which, softcap):
    if kernel is AttentionKernel.CUDNN and softcap:
        pytest.skip("kernel_for refuses it")
    query, key, value, weight, segment_ids = inputs
    config = SHAPE.model_copy(update={"attn_logit_softcapping": softcap})

    def through(attend):
        return jax.jit(
            jax.value_and_grad(lambda q, k, v: (attend(q, k, v) * weight).sum(), argnums=(0, 1, 2))
        )(query, key, value)

    def ours(query, key, value):
        return attention_fn_for(config, windows, kernel, segment_ids, TIME, SINGLE_DEVICE)(
            jnp.int32(which), query, key, value
        )

    expected, of_expected = through(lambda q, k, v: plain(q, k, v, segment_ids, windows[which], softcap))
    found, of_found = through(ours)
    assert float(found) == pytest.approx(float(expected), rel=1e-3, abs=1e-2)
    for one, other in zip(of_found, of_expected, strict=True):
        assert float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) < 1e-4


@pytest.mark.parametrize("head_dim", [64, 80])
def test_splash_attention_of_heads_below_128(inputs, head_dim):
    """Against plain attention, forward and backward."""
    query, key, value, weight, segment_ids = inputs
    query, key, value = (rows[..., :head_dim] for rows in (query, key, value))
    weight = weight.reshape(BATCH, TIME, 4, 128)[..., :head_dim].reshape(BATCH, TIME, -1)
    config = SHAPE.model_copy(update={"head_dim": head_dim, "query_pre_attn_scalar": head_dim})

    def ours(q, k, v):
        attention = attention_fn_for(
            config, (None,), AttentionKernel.SPLASH, segment_ids, TIME, SINGLE_DEVICE
        )
        return attention(jnp.int32(0), q, k, v)

    def with_gradients(attend):
        summed = jax.value_and_grad(lambda *rows: (attend(*rows) * weight).sum(), argnums=(0, 1, 2))
        return jax.jit(summed)(query, key, value)

    expected, of_expected = with_gradients(lambda q, k, v: plain(q, k, v, segment_ids, None, None))
    found, of_found = with_gradients(ours)
    assert float(found) == pytest.approx(float(expected), rel=1e-3, abs=1e-2)
    for one, other in zip(of_found, of_expected, strict=True):
        assert float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) < 1e-4


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_a_few_windows_at_a_time(inputs, monkeypatch, together, dtype):
    """Three windows, one after the other or two and one; as all at once, and in bfloat16 within its
    precision.
    """
    query, key, value, weight, segment_ids = (jnp.concatenate([rows, rows[:1, ::-1]]) for rows in inputs)

    def gradients(dtype):
        def loss(q, k, v):
            attend = attention_fn_for(SHAPE, (None,), AttentionKernel.XLA, segment_ids, TIME, SINGLE_DEVICE)
            return (attend(jnp.int32(0), *(rows.astype(dtype) for rows in (q, k, v))) * weight).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)

    at_once = gradients(jnp.float32)
    monkeypatch.setattr(plain_attention, "_SCORE_BYTES", together * 4 * query.shape[2] * TIME * TIME)
    for one, other in zip(gradients(dtype), at_once, strict=True):
        assert float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) < (
            1e-6 if dtype == jnp.float32 else 2e-2
        )


def test_windows_on_several_devices_are_not_gathered():
    """Programs of evaluation are spread over devices by XLA: a loop over windows would bring all of them to
    each device.
    """
    program = """
import jax, jax.numpy as jnp
from babel_jax.model import flash_attention
from babel_jax.training.mesh import batch_sharding, make_mesh
flash_attention._SCORE_BYTES = 1
rows = jax.ShapeDtypeStruct((8, 16, 2, 8), jnp.float32, sharding=batch_sharding(make_mesh({"fsdp": 4})))
mask = jnp.tril(jnp.ones((1, 16, 16), bool))
attended = jax.jit(lambda q, k, v: flash_attention.flash_attention(q, k, v, mask, 1.0, None))
print(attended.lower(rows, rows, rows).compile().as_text())
"""
    shown = subprocess.run(
        [sys.executable, "-c", program], env=forced_devices(4), capture_output=True, text=True, check=True
    ).stdout
    assert "ENTRY" in shown
    assert "all-gather" not in shown


@pytest.mark.parametrize("kernel", list(AttentionKernel)[1:])
@pytest.mark.parametrize("window", [None, 70])
def test_parts_of_a_window_see_what_the_whole_sees(inputs, kernel, window):
    """Two devices of the context axis, here the lanes of a vmap with that name: each has two parts of the
    queries, and all keys.
    """
    query, key, value, weight, segment_ids = (
        jnp.concatenate([rows, rows[:, ::-1]], axis=1) for rows in inputs
    )
    parallel = Parallelism(sizes=(("context", 2),))

    def part(query, key, value):
        attend = attention_fn_for(SHAPE, (window,), kernel, segment_ids, 2 * TIME, parallel)
        query, key, value = (parallel.sequence_shard(rows) for rows in (query, key, value))
        return attend(jnp.int32(0), query, parallel.gather_sequence(key), parallel.gather_sequence(value))

    def through(function):
        return jax.jit(jax.value_and_grad(lambda rows: function(*rows), has_aux=True))((query, key, value))

    def by_parts(*rows):
        def lane(*rows):
            own = part(*rows)
            return (own * parallel.sequence_shard(weight)).sum(), parallel.gather_sequence(own)

        losses, outs = jax.vmap(lane, in_axes=None, axis_name="context", axis_size=2)(*rows)
        return losses.sum(), outs

    def at_once(*rows):
        out = plain(*rows, segment_ids, window, None)
        return (out * weight).sum(), out

    (_, outs), gradients = through(by_parts)
    (_, expected), of_expected = through(at_once)
    for lane in outs:
        np.testing.assert_allclose(lane, expected, atol=2e-5)
    for one, other in zip(gradients, of_expected, strict=True):
        assert float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) < 1e-4


def test_auto_is_the_kernel_that_a_platform_has():
    def auto(time, platform, dtype=ComputeType.BFLOAT16, **changes):
        return kernel_for(AttentionKernel.AUTO, SHAPE.model_copy(update=changes), time, platform, dtype)

    assert auto(4096, "tpu") is AttentionKernel.SPLASH
    assert auto(100, "tpu") is AttentionKernel.XLA
    assert [auto(4096, "tpu", head_dim=size) for size in (64, 80, 96, 256)] == [AttentionKernel.SPLASH] * 4
    assert [auto(4096, "tpu", head_dim=size) for size in (16, 68)] == [AttentionKernel.XLA] * 2
    assert auto(4096, "gpu") is AttentionKernel.CUDNN
    assert auto(4096, "cpu") is AttentionKernel.XLA
    assert kernel_for(AttentionKernel.XLA, SHAPE, 4096, "tpu", ComputeType.BFLOAT16) is AttentionKernel.XLA


@pytest.mark.parametrize(
    ("time", "dtype", "changes"),
    [
        (64, ComputeType.FLOAT32, {}),
        (63, ComputeType.BFLOAT16, {}),
        (64, ComputeType.BFLOAT16, {"head_dim": 20}),
        (64, ComputeType.BFLOAT16, {"attn_logit_softcapping": 5.0}),
    ],
)
def test_what_cudnn_does_not_take_goes_to_xla_or_is_refused(time, dtype, changes):
    shape = SHAPE.model_copy(update=changes)
    assert kernel_for(AttentionKernel.AUTO, shape, time, "gpu", dtype) is AttentionKernel.XLA
    with pytest.raises(BadInput, match="training.attention = cudnn takes bfloat16"):
        kernel_for(AttentionKernel.CUDNN, shape, time, "gpu", dtype)


@pytest.mark.parametrize(
    ("changes", "remat", "forward"),
    [
        ({}, Remat.MLP, 1),
        ({}, Remat.FULL, 2),
        ({"sliding_window": 128, "layer_types": (LayerType.FULL, LayerType.SLIDING)}, Remat.MLP, 1),
    ],
    ids=["kept", "computed again", "kept, with windows"],
)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_on_a_gpu_attention_is_causal_and_not_computed_again(
    monkeypatch, changes, remat, forward, scan_layers
):
    """The program for CUDA, lowered here: calls of cuDNN in the passes through a layer.

    Without loops barriers keep these apart.
    """
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    shape = SHAPE.model_copy(update=changes)
    params = abstract_params(shape)
    batch = {name: jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32) for name in ("tokens", "segment_ids")}

    def loss(params, batch):
        parallel = Parallelism(platform="gpu")
        execution = Execution(jnp.bfloat16, remat, AttentionKernel.CUDNN, parallel, scan_layers)
        return summed_loss(shape, params, batch, execution=execution)[0]

    text = jax.jit(jax.grad(loss)).trace(params, batch).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$fmha\w+", text)
    # Of a layer; some versions of jax write a function that is called twice only once.
    counts = Counter(calls)
    assert counts["@__cudnn$fmhaScaleBiasSoftmaxBackward"] in (
        (1,) if scan_layers else (1, shape.num_hidden_layers)
    )
    assert (
        counts["@__cudnn$fmhaScaleBiasSoftmax"] == forward * counts["@__cudnn$fmhaScaleBiasSoftmaxBackward"]
    )
    assert ("optimization_barrier" in text) is not scan_layers
    assert text.count("mask_type\\22: \\22CAUSAL") == len(calls)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("largest", [2**20, 2**10], ids=["one piece", "pieces"])
def test_the_cross_entropy_in_pieces_is_the_plain_one(monkeypatch, softcap, largest):
    monkeypatch.setattr(vocabulary, "_LARGEST_PIECE", largest)
    keys = jax.random.split(jax.random.key(1), 3)
    hidden, table = jax.random.normal(keys[0], (24, 16)), jax.random.normal(keys[1], (210, 16))
    targets = jax.random.randint(keys[2], (24,), 0, 210)
    mask = np.arange(24) % 5 > 0
    assert vocabulary.pieces(210, 24, 16, "cpu") == (1 if largest == 2**20 else 5)

    def loss(pair):
        picked, log_z = pair
        return jnp.where(mask, log_z - picked, 0.0).sum() + 0.1 * jnp.where(mask, log_z**2, 0.0).sum()

    def full(hidden, table):
        logits = softcapped(hidden @ table.T, softcap)
        return jnp.take_along_axis(logits, targets[:, None], 1)[:, 0], jax.nn.logsumexp(logits, axis=1)

    expected = jax.value_and_grad(lambda h, t: loss(full(h, t)), argnums=(0, 1))(hidden, table)
    found = jax.value_and_grad(
        lambda h, t: loss(target_logits(h, t, targets, softcap, SINGLE_DEVICE)), argnums=(0, 1)
    )(hidden, table)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5)


def test_the_logits_of_a_large_vocabulary_never_exist_whole():
    """At the shape of Babel-9B, no array of the loss's own program has the size of the logits, or of the
    table in bfloat16.
    """
    hidden, table = (
        jax.ShapeDtypeStruct((4096, 3584), jnp.bfloat16),
        jax.ShapeDtypeStruct((152064, 3584), jnp.float32),
    )
    targets = jax.ShapeDtypeStruct((4096,), jnp.int32)

    def loss(hidden, table, targets):
        picked, log_z = target_logits(hidden, table, targets, None, SINGLE_DEVICE)
        return (log_z - picked).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, table, targets))
    assert "4096,152064]" not in text
    assert "bf16[152064,3584]" not in text
