"""Names of the values of a layer that a rematerialization policy may keep (`jax.ad_checkpoint`)."""

from enum import StrEnum


class CheckpointName(StrEnum):
    """Each name is given to one value in the forward pass of a layer; tests look for each in the trace."""

    # An all-gathered parameter; no policy keeps it.
    GATHERED_WEIGHT = "gathered_weight"
    # Queries, keys and values of this device, after norms and rotary positions.
    QUERY_KEY_VALUE = "query_key_value"
    # Keys and values of the whole sequence.
    GATHERED_KEY_VALUE = "gathered_key_value"
    # What attention gives, before o_proj, and the logarithm of its normalizer.
    ATTENTION_OUTPUT = "attention_output"
    # The residual stream between attention and MLP.
    RESIDUAL = "residual"
    GATE_PROJ = "gate_proj"
    UP_PROJ = "up_proj"
    # The largest absolute value of each token that a narrow product multiplies.
    TOKEN_MAXIMA = "token_maxima"
