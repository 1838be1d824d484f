"""FLOPs of the model, as utilization counts them."""

from babel_jax.config import ModelConfig
from babel_jax.model.decoder import count_parameters


def model_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """6 FLOPs for each parameter but those of the input embedding, plus attention, forward and backward.

    Causal attention counts half of the square, or its sliding window. Recomputation is not counted. Each
    sequence counts as one document.
    """
    # The lookup of an input embedding multiplies nothing. A tied table is multiplied as the head.
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    seen = sum(_mean_seen(window, seq_len) for window in config.windows)
    return 6.0 * (count_parameters(config) - embedding) + 3 * 4.0 * heads * seen


def _mean_seen(window: int | None, seq_len: int) -> float:
    """Keys that a query sees, on average. Full causal attention counts as seq_len / 2, as is the custom."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return window - window**2 / 2 / seq_len
