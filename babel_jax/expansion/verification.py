"""Whether a model folder that was written computes what it should: its logits beside those of the folder that
it was made of.
"""

import jax
import jax.numpy as jnp
import numpy as np

from babel_jax.errors import BadInput
from babel_jax.expansion.apply import expand_params
from babel_jax.expansion.plan import ExpansionPlan
from babel_jax.model.decoder import count_parameters, forward
from babel_jax.model_folders.folder import layers_differ_in_type, load_params, open_folder

_TOKENS = 64
_FLOAT32 = 4


def logits_difference(
    source: str, written: str, plan: ExpansionPlan | None, memory_limit: int
) -> float | str:
    """The largest difference between float32 logits of `written` and of `source` (deepened in memory by
    `plan`) on fixed tokens.

    Why not, where they are not compared: two such models do not fit into `memory_limit` bytes, or layers of
    different types could not be deepened in memory as they are in files. Raises BadInput where the difference
    is not 0: the tensors are the same to the bit, and so is the program.
    """
    before, after = open_folder(source), open_folder(written)
    if 2 * _FLOAT32 * count_parameters(after.config) > memory_limit:
        return "not compared: the model exceeds the memory limit"
    if plan is not None and layers_differ_in_type(before):
        return "not compared: the layers differ in type"
    tokens = np.arange(_TOKENS, dtype=np.int32)[None] * 37 % after.config.vocab_size
    logits = jax.jit(forward, static_argnums=0)
    found = logits(after.config, load_params(after, dtype=jnp.float32), tokens)
    params = (
        load_params(before, dtype=jnp.float32) if plan is None else expand_params(load_params(before), plan)
    )
    expected = logits(after.config, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), tokens)
    difference = float(jnp.max(jnp.abs(found - expected)))
    if difference != 0.0:
        raise BadInput(
            f"{written}: its logits differ by {difference:g} from those of {source}; remove it, and tell "
            "the developers"
        )
    return difference
