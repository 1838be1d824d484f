"""Which values of a layer's forward pass are kept for the backward pass; the others are computed again."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from babel_jax.config import Remat
from babel_jax.model.checkpoint_names import CheckpointName
from babel_jax.model.execution import Execution

# What each policy keeps, beside TOKEN_MAXIMA. Gathered weights are never kept.
_KEPT = {
    Remat.FULL: (),
    Remat.ATTENTION: (CheckpointName.ATTENTION_OUTPUT,),
    Remat.PROJECTIONS: (
        CheckpointName.ATTENTION_OUTPUT,
        CheckpointName.QUERY_KEY_VALUE,
        CheckpointName.RESIDUAL,
    ),
    Remat.GATE: (
        CheckpointName.ATTENTION_OUTPUT,
        CheckpointName.QUERY_KEY_VALUE,
        CheckpointName.RESIDUAL,
        CheckpointName.GATE_PROJ,
    ),
    Remat.MLP: (
        CheckpointName.ATTENTION_OUTPUT,
        CheckpointName.QUERY_KEY_VALUE,
        CheckpointName.GATHERED_KEY_VALUE,
        CheckpointName.RESIDUAL,
        CheckpointName.GATE_PROJ,
        CheckpointName.UP_PROJ,
    ),
}


def mlp_value(
    x: Float[Array, "batch time features"], name: CheckpointName, execution: Execution
) -> Float[Array, "batch time features"]:
    """`x` under a name that policies know.

    With `execution.tokens_minor` a value that the policy keeps has the tokens along lanes in memory. XLA for
    v6e reads it so in the backward pass, but would write it with the features along lanes, and copy it.
    """
    if execution.tokens_minor and name in _KEPT.get(execution.remat, ()):
        x = with_layout_constraint(x, Layout(major_to_minor=(0, 2, 1)))
    result: Float[Array, "batch time features"] = checkpoint_name(x, name)
    return result


def rematerialized(layer: Any, execution: Execution) -> Any:
    """The layer function under the policy `execution.remat`."""
    policies, remat = jax.checkpoint_policies, execution.remat
    if remat is Remat.NONE:
        if execution.parallel.is_single_device:
            return layer
        # A gathered weight that is kept would be whole on every device until the backward pass.
        policy = policies.save_anything_except_these_names(CheckpointName.GATHERED_WEIGHT)
    elif remat is Remat.DOTS:
        policy = policies.dots_with_no_batch_dims_saveable
    else:
        policy = policies.save_only_these_names(*_KEPT[remat], CheckpointName.TOKEN_MAXIMA)
        if CheckpointName.ATTENTION_OUTPUT in _KEPT[remat]:
            policy = policies.save_from_both_policies(policy, _is_cudnn_attention)
    # Inside a scan, forward and backward pass are two loops, which the compiler does not merge. So the
    # barriers of prevent_cse would only cost time.
    return jax.checkpoint(layer, policy=policy, prevent_cse=not execution.scan_layers)


def _is_cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """True for cuDNN's attention. Its backward pass needs outputs that no name reaches, so all are kept."""
    return str(primitive).startswith("dot_product_attention_fwd")
