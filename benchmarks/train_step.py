"""Tokens a second of the float32 train step on a CPU, beside a minimal step in plain JAX and torch
`transformers` in eager mode.

    python benchmarks/train_step.py [--shape small large] [--rounds 4]

The three take turns in one process, on the same batch, with the same work a step: loss, gradients, clipping
at norm 1, AdamW. Ours alone also masks packed segments, decides what to do with a gradient that is not
finite, and counts losses by language. A turn is a few steps, the first of them not counted: it has to fetch
the memory that the kernel took back while the others worked, as no run does.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from babel_jax.config import ComputeType, ModelConfig, OptimizerSettings, TrainingSettings
from babel_jax.model.decoder import abstract_params, count_parameters, init_params
from babel_jax.training.mesh import global_batch, make_mesh
from babel_jax.training.optimizer import AdamW
from babel_jax.training.step import compiled_step, placed_state, state_shardings

SHAPES = {
    "small": (
        {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 1024, "vocab_size": 8192},
        8,
        512,
    ),
    "large": (
        {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 2048, "vocab_size": 32000},
        4,
        512,
    ),
}
RATE = 1e-3
STEPS = 2  # counted, in a turn
Step = Callable[[], float]


def our_step(config: ModelConfig, tokens: np.ndarray, training: TrainingSettings) -> Step:
    """The step as `babel train` runs it."""
    mesh = make_mesh({"fsdp": -1})
    settings = OptimizerSettings()
    optimizer = AdamW(settings, abstract_params(config))
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    state = placed_state(optimizer, params, state_shardings(config, optimizer, mesh), 25)
    step = compiled_step(config, optimizer, settings, training, mesh)
    language = np.zeros(len(tokens), np.int32)
    batch = global_batch({"tokens": tokens, "segment_ids": np.ones_like(tokens), "language": language}, mesh)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch, jnp.float32(RATE))
        return float(metrics["loss"])

    return run


def plain_step(config: ModelConfig, tokens: np.ndarray) -> Step:
    """What one would write in an afternoon: matrices [in, out], one scan, one causal mask, AdamW over
    `jax.tree.map`.
    """
    c, batch, time_steps = config, *tokens.shape
    heads, kv_heads, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def matrix(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    layers = c.num_hidden_layers
    params: dict[str, Any] = {
        "embed": matrix(c.vocab_size, c.hidden_size),
        "head": matrix(c.hidden_size, c.vocab_size),
        "norm": jnp.ones(c.hidden_size),
        "layers": {
            "norm1": jnp.ones((layers, c.hidden_size)),
            "norm2": jnp.ones((layers, c.hidden_size)),
            "q": matrix(layers, c.hidden_size, heads * width),
            "k": matrix(layers, c.hidden_size, kv_heads * width),
            "v": matrix(layers, c.hidden_size, kv_heads * width),
            "q_bias": jnp.zeros((layers, heads * width)),
            "k_bias": jnp.zeros((layers, kv_heads * width)),
            "v_bias": jnp.zeros((layers, kv_heads * width)),
            "o": matrix(layers, heads * width, c.hidden_size),
            "gate": matrix(layers, c.hidden_size, c.intermediate_size),
            "up": matrix(layers, c.hidden_size, c.intermediate_size),
            "down": matrix(layers, c.intermediate_size, c.hidden_size),
        },
    }
    angles = np.arange(time_steps)[:, None] * c.rope_theta ** (-np.arange(0, width, 2) / width)
    cos, sin = (
        jnp.asarray(f(np.concatenate([angles, angles], -1)), jnp.float32)[None, :, None]
        for f in (np.cos, np.sin)
    )
    causal = np.tril(np.ones((time_steps, time_steps), bool))

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + c.rms_norm_eps) * weight

    def rotate(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, -1)
        return x * cos + jnp.concatenate([-second, first], -1) * sin

    def layer(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        h = norm(x, p["norm1"])
        q = rotate((h @ p["q"] + p["q_bias"]).reshape(batch, time_steps, heads, width))
        k = rotate((h @ p["k"] + p["k_bias"]).reshape(batch, time_steps, kv_heads, width))
        v = (h @ p["v"] + p["v_bias"]).reshape(batch, time_steps, kv_heads, width)
        q = q.reshape(batch, time_steps, kv_heads, heads // kv_heads, width)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / width**0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), -1)
        x = x + jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, time_steps, -1) @ p["o"]
        h = norm(x, p["norm2"])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None

    def loss_of(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
        log_p = jax.nn.log_softmax(norm(x, params["norm"]) @ params["head"])
        return -jnp.mean(jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1))

    def step(
        state: tuple[Any, Any, Any, jax.Array], tokens: jax.Array
    ) -> tuple[tuple[Any, Any, Any, jax.Array], jax.Array]:
        params, m, v, count = state
        loss, grads = jax.value_and_grad(loss_of)(params, tokens)
        total = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / total), grads)
        count = count + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)

        def update(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            return p - RATE * (m / (1 - 0.9**count) / (jnp.sqrt(v / (1 - 0.95**count)) + 1e-8) + 0.1 * p)

        return (jax.tree.map(update, params, m, v), m, v, count), loss

    compiled = jax.jit(step, donate_argnums=0)
    state = (
        params,
        jax.tree.map(jnp.zeros_like, params),
        jax.tree.map(jnp.zeros_like, params),
        jnp.zeros((), jnp.int32),
    )
    inputs = jnp.asarray(tokens)

    def run() -> float:
        nonlocal state
        state, loss = compiled(state, inputs)
        return float(loss)

    return run


def torch_step(config: ModelConfig, tokens: np.ndarray) -> Step:
    """Qwen2ForCausalLM, eager attention, fused AdamW, all cores."""
    names = {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    }  # fmt: skip
    hf_config = transformers.Qwen2Config(**config.model_dump(include=names), use_cache=False)
    hf_config._attn_implementation = "eager"
    model = transformers.Qwen2ForCausalLM(hf_config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    inputs = torch.from_numpy(tokens).long()

    def run() -> float:
        loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    for name in arguments.shape:
        sizes, batch, seq_len = SHAPES[name]
        config = ModelConfig(
            **sizes, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=seq_len
        )
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, seq_len), dtype=np.int32)
        steps = {
            "babel_jax": our_step(
                config, tokens, TrainingSettings(global_batch_size=batch, compute_dtype=ComputeType.FLOAT32)
            ),
            "plain JAX": plain_step(config, tokens),
            "torch": torch_step(config, tokens),
        }
        first = {peer: step() for peer, step in steps.items()}  # compiles
        rates: dict[str, list[float]] = {peer: [] for peer in steps}
        for _ in range(arguments.rounds):
            for peer, step in steps.items():
                step()
                for _ in range(STEPS):
                    start = time.perf_counter()
                    step()
                    rates[peer].append(tokens.size / (time.perf_counter() - start))
        counted = f"{arguments.rounds} x {STEPS} steps"
        print(
            f"{name}: {count_parameters(config):,} parameters, {batch} x {seq_len} tokens; tokens/s of "
            f"{counted}"
        )
        print(f"{'':<12} {'median':>8} {'least':>8} {'most':>8} {'ours / it':>10} {'first loss':>11}")
        ours = statistics.median(rates["babel_jax"])
        for peer, each in rates.items():
            median = statistics.median(each)
            print(
                f"{peer:<12} {median:>8,.0f} {min(each):>8,.0f} {max(each):>8,.0f} {ours / median:>10.3f} "
                f"{first[peer]:>11.3f}"
            )


if __name__ == "__main__":
    main()
