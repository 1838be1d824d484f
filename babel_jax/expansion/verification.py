"""Verifies a written model folder: its logits must equal those of the folder that it was made from."""

import jax
import jax.numpy as jnp
import numpy as np

from babel_jax.errors import BadInput
from babel_jax.expansion.apply import expand_params
from babel_jax.expansion.plan import ExpansionPlan
from babel_jax.model.decoder import count_parameters, forward
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.transfer import layers_differ_in_type

_TOKENS = 64
_FLOAT32 = 4


def logits_difference(
    source: str, written: str, plan: ExpansionPlan | None, memory_limit: int
) -> float | str:
    """The largest difference between the float32 logits of `written` and of `source` on fixed tokens. `plan`
    deepens `source` in memory.

    Returns the reason instead if they are not compared: two such models do not fit into `memory_limit` bytes,
    or layers of different types, which cannot be deepened in memory. Raises BadInput if the difference is not
    0: both have the same tensors to the bit, and the same program.
    """
    before, after = open_folder(source), open_folder(written)
    # Both models are in memory at the same time.
    if 2 * _FLOAT32 * count_parameters(after.config) > memory_limit:
        return "not compared: the model exceeds the memory limit"
    if plan is not None and layers_differ_in_type(before):
        return "not compared: the layers differ in type"

    # Any tokens do; these are spread over the vocabulary.
    tokens = np.arange(_TOKENS, dtype=np.int32)[None] * 37 % after.config.vocab_size
    logits = jax.jit(forward, static_argnums=0)
    written_logits = logits(after.config, load_params(after, dtype=jnp.float32), tokens)
    params = (
        load_params(before, dtype=jnp.float32) if plan is None else expand_params(load_params(before), plan)
    )
    source_logits = logits(after.config, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), tokens)
    difference = float(jnp.max(jnp.abs(written_logits - source_logits)))
    if difference != 0.0:
        raise BadInput(
            f"{written}: its logits differ by {difference:g} from those of {source}; remove it, and tell "
            "the developers"
        )
    return difference
