"""Products in int8 and float8, against plain NumPy and against products that are not quantized."""

import contextlib
from collections import Counter

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from babel_jax.config import CHANGEABLE, MatmulType, OptimizerSettings, TrainingSettings
from babel_jax.errors import BadInput
from babel_jax.model import quantized
from babel_jax.model.decoder import abstract_params
from babel_jax.model.execution import Execution
from babel_jax.model.layers import product
from babel_jax.model.parallel import Parallelism
from babel_jax.model.quantized import check_matmul_type, quantized_product, quantized_weight, row_scales
from babel_jax.tpu.costs import compute_seconds
from babel_jax.tpu.flops import program_flops
from babel_jax.training.loss import summed_loss
from babel_jax.training.mesh import make_mesh
from babel_jax.training.optimizer import AdamW
from babel_jax.training.step import _execution, compiled_step, summed_gradients

VALUES = {MatmulType.INT8: np.int8, MatmulType.FLOAT8: ml_dtypes.float8_e4m3fn}
GRADIENTS = {MatmulType.INT8: np.int8, MatmulType.FLOAT8: ml_dtypes.float8_e5m2}
# Of one product: the norm of the error over the norm of the product.
LARGEST_ERROR = {MatmulType.INT8: 0.015, MatmulType.FLOAT8: 0.06}


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    # Rows of very different sizes, as those of tokens and of output features are.
    x = random.normal(size=(24, 64)) * 10.0 ** random.integers(-3, 3, (24, 1))
    weight = random.normal(size=(40, 64)) * 10.0 ** random.integers(-2, 1, (40, 1))
    gradient = random.normal(size=(24, 40)) * 10.0 ** random.integers(-6, 2, (24, 1))
    return tuple(array.astype(np.float32) for array in (x, weight, gradient))


def narrowed(rows, dtype):
    """Each row over its largest absolute value, times the largest number of the type, rounded; and scales."""
    # The bucket of int8's largest number is used whole, so its border is at 127.5.
    largest = 127.5 if dtype is np.int8 else float(ml_dtypes.finfo(dtype).max)
    scale = (np.abs(rows).max(axis=1, keepdims=True) / np.float32(largest)).astype(np.float32)
    narrow = rows / scale
    narrow = np.clip(np.rint(narrow), -128, 127) if dtype is np.int8 else narrow.astype(dtype)
    return narrow.astype(np.float32), scale


def multiplied(x, weight, matmul_dtype):
    """The product of one device."""
    of = (("mlp", "embed"), Execution(x.dtype, matmul_dtype=matmul_dtype))
    return quantized_product(x, quantized_weight(weight, row_scales(weight, *of), *of))


def positive_largest(rows):
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1, keepdims=True), axis=1)
    return rows * np.sign(largest)


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("matmul_dtype", list(MatmulType))
def test_forward_and_backward_by_their_definition(arrays, matmul_dtype):
    # The largest of a row is at the border of a bucket: -127.5 is -127 or -128, as rounding has it. So it is
    # a positive number here.
    x, weight, gradient = positive_largest(arrays[0]), positive_largest(arrays[1]), np.abs(arrays[2])
    x_narrow, x_scale = narrowed(x, VALUES[matmul_dtype])
    w_narrow, w_scale = narrowed(weight, VALUES[matmul_dtype])
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    out, backward = jax.vjp(lambda x, weight: multiplied(x, weight, matmul_dtype), x, weight)
    np.testing.assert_allclose(out, (x_narrow @ w_narrow.T) * x_scale * w_scale.T, rtol=1e-5, atol=1e-9)
    # The gradient takes the scale of the other operand, and is then quantized by its own rows.
    of_x, of_weight = backward(jnp.asarray(gradient))
    narrow, scale = narrowed(gradient * w_scale.T, GRADIENTS[matmul_dtype])
    np.testing.assert_allclose(of_x, (narrow @ w_narrow) * scale, rtol=1e-5, atol=1e-9)
    narrow, scale = narrowed((gradient * x_scale).T, GRADIENTS[matmul_dtype])
    np.testing.assert_allclose(of_weight, (narrow @ x_narrow) * scale, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("matmul_dtype", list(MatmulType))
def test_rows_of_any_size_keep_their_precision(arrays, matmul_dtype, dtype):
    x, weight, gradient = arrays

    def gradients(multiply):
        out, backward = jax.vjp(multiply, jnp.asarray(x, dtype), jnp.asarray(weight, dtype))
        return out, *backward(jnp.asarray(gradient, dtype))

    found = gradients(lambda x, weight: multiplied(x, weight, matmul_dtype))
    wanted = gradients(product)
    for of_found, of_wanted in zip(found[:2], wanted[:2], strict=True):
        assert of_found.dtype == dtype
        for row, reference in zip(np.float32(of_found), np.float32(of_wanted), strict=True):
            assert error(row, reference) < 3 * LARGEST_ERROR[matmul_dtype]
    assert error(np.float32(found[2]), np.float32(wanted[2])) < LARGEST_ERROR[matmul_dtype]


def test_a_row_of_zeros_is_zero_and_what_is_not_finite_shows(arrays):
    x, weight, _ = arrays
    x = x.copy()
    x[0], x[1, 3], x[2, 5] = 0.0, np.nan, np.inf
    out = np.asarray(multiplied(jnp.asarray(x), jnp.asarray(weight), MatmulType.INT8))
    assert (out[0] == 0.0).all()
    assert not np.isfinite(out[1]).any()
    assert not np.isfinite(out[2]).any()
    assert np.isfinite(out[3:]).all()


@pytest.fixture(scope="module")
def windows():
    tokens = np.random.default_rng(1).integers(0, 512, (2, 64), dtype=np.int32)
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.ones_like(tokens)}


def products_of(jaxpr, times=1):
    """How often each type is multiplied, in a jaxpr and those within it."""
    found = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found[str(equation.invars[0].aval.dtype)] += times
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in equation.params.values():
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                found += products_of(getattr(value, "jaxpr", value), inner)
    return found


def test_products_of_layers_alone_are_quantized(tiny_config, windows):
    def program(matmul_dtype):
        execution = Execution(jnp.bfloat16, matmul_dtype=matmul_dtype)
        gradient = jax.grad(lambda params: summed_loss(tiny_config, params, windows, execution=execution)[0])
        return jax.make_jaxpr(gradient)(abstract_params(tiny_config)).jaxpr

    plain, narrow = program(None), program(MatmulType.INT8)
    before, after = products_of(plain), products_of(narrow)
    # Seven matrices in each layer, three products each.
    assert after["int8"] == 7 * 3 * tiny_config.num_hidden_layers
    assert before["int8"] == 0
    assert before.total() == after.total()

    # `babel plan` counts them at the chip's rate for the type, and their sum is as before.
    total, in_int8 = (program_flops(narrow, tiny_config, 64, of) for of in (None, MatmulType.INT8))
    assert total == program_flops(plain, tiny_config, 64)
    hidden, inner = tiny_config.hidden_size, tiny_config.intermediate_size
    matrices = hidden * (2 * hidden + 2 * hidden // 2 + 3 * inner) * tiny_config.num_hidden_layers
    assert in_int8 == 3 * 2 * windows["tokens"].size * matrices
    measurements = {"hardware_flops": total, "narrow_flops": {"int8": in_int8}}
    seconds = compute_seconds(measurements, 100.0, {"int8": 200.0})
    assert seconds == pytest.approx((total - in_int8 / 2) / 100.0)


@pytest.mark.parametrize("matmul_dtype", list(MatmulType))
def test_loss_and_gradients_are_near_those_of_wide_products(tiny_config, tiny_params, windows, matmul_dtype):
    def of(matmul_dtype):
        execution = Execution(matmul_dtype=matmul_dtype)

        def loss(params):
            return summed_loss(tiny_config, params, windows, execution=execution)[0]

        return jax.jit(jax.value_and_grad(loss))(tiny_params)

    (loss, gradients), (wide_loss, wide) = of(matmul_dtype), of(None)
    assert float(loss) == pytest.approx(float(wide_loss), rel=1e-3)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(wide), strict=True):
        assert error(np.asarray(found), np.asarray(wanted)) < 5 * LARGEST_ERROR[matmul_dtype]


def test_the_train_step_takes_the_setting(tiny_config, windows, monkeypatch):
    mesh, training = make_mesh({}), TrainingSettings(global_batch_size=2, matmul_dtype="int8")
    batch = {**windows, "language": jnp.zeros(2, jnp.int32)}
    gradients_of = summed_gradients(tiny_config, training, 0.0, mesh)
    products = products_of(jax.make_jaxpr(gradients_of)(abstract_params(tiny_config), batch).jaxpr)
    assert products["int8"] >= 7 * 3 * tiny_config.num_hidden_layers

    # Of a chip with int8 alone, float8 is refused before anything is compiled.
    monkeypatch.setattr(quantized, "narrow_peaks", lambda kind: {"int8": 1.0})
    optimizer = AdamW(OptimizerSettings(), abstract_params(tiny_config))
    for matmul_dtype, refused in (("int8", False), ("float8", True)):
        training = TrainingSettings(global_batch_size=2, matmul_dtype=matmul_dtype)
        with pytest.raises(BadInput, match="has no float8") if refused else contextlib.nullcontext():
            compiled_step(tiny_config, optimizer, OptimizerSettings(), training, mesh)


def test_a_run_is_not_resumed_with_products_in_another_type():
    assert "matmul_dtype" not in CHANGEABLE


@pytest.mark.parametrize(
    ("matmul_dtype", "kind", "valid"),
    [
        ("float8", "TPU v5 lite", "give int8, or leave it out"),
        ("float8", "TPU v5", "give int8, or leave it out"),
        ("int8", "TPU7x", "give float8, or leave it out"),
        ("float8", "NVIDIA A100-SXM4-80GB", "give int8, or leave it out"),
    ],
)
def test_a_type_that_a_chip_does_not_have_is_refused(matmul_dtype, kind, valid):
    with pytest.raises(BadInput, match=f"training.matmul_dtype = {matmul_dtype}: {kind} has no .*; {valid}"):
        check_matmul_type(MatmulType(matmul_dtype), kind)


@pytest.mark.parametrize(
    ("matmul_dtype", "kind"),
    [
        ("int8", "TPU v6 lite"),
        ("float8", "NVIDIA H100 80GB HBM3"),
        ("float8", "NVIDIA GeForce RTX 4090"),
        ("float8", "cpu"),
        ("int8", "AMD Instinct MI300X"),
        (None, "TPU v5 lite"),
    ],
)
def test_other_types_are_taken(matmul_dtype, kind):
    check_matmul_type(matmul_dtype and MatmulType(matmul_dtype), kind)


@pytest.mark.parametrize(("matmul_dtype", "tokens_minor"), [(None, True), (MatmulType.INT8, False)])
def test_kept_values_have_the_layout_that_products_read(matmul_dtype, tokens_minor):
    training = TrainingSettings(global_batch_size=1, matmul_dtype=matmul_dtype)
    execution = _execution(training, Parallelism(), "TPU v6 lite")
    assert execution.tokens_minor == tokens_minor
