"""Which values of a layer's forward pass are kept for the backward pass."""

from typing import Any

import jax

from babel_jax.config import Remat
from babel_jax.model.parallel import GATHERED, Placement

# What each policy keeps for the backward pass, by the names given with `checkpoint_name`; gathered weights
# never stay.
_KEPT = {
    Remat.FULL: (),
    Remat.ATTENTION: ("attended",),
    Remat.PROJECTIONS: ("attended", "heads", "between"),
    Remat.GATE: ("attended", "heads", "between", "gate"),
    Remat.MLP: ("attended", "heads", "seen", "between", "gate", "up"),
}


def rematerialized(layer: Any, remat: Remat, placement: Placement, scan_layers: bool) -> Any:
    """The layer function, with the backward pass computing again what `remat` says."""
    policies = jax.checkpoint_policies
    if remat is Remat.NONE:
        if placement.alone:
            return layer
        policy = policies.save_anything_except_these_names(GATHERED)
    elif remat is Remat.DOTS:
        policy = policies.dots_with_no_batch_dims_saveable
    else:
        policy = policies.save_only_these_names(*_KEPT[remat])
        if "attended" in _KEPT[remat]:
            policy = policies.save_from_both_policies(policy, _is_cudnn_attention)
    # Inside a scan forward and backward are separate loops, so nothing merges them back and the barriers of
    # prevent_cse only cost.
    return jax.checkpoint(layer, policy=policy, prevent_cse=not scan_layers)


def _is_cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps what cuDNN's attention gives, and with it what its backward pass needs, which no name reaches."""
    return str(primitive).startswith("dot_product_attention_fwd")
