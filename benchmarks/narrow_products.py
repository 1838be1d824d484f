"""The loss with products in int8 and float8 beside that with bfloat16's, with its spread over seeds; and the
change of a real model's loss and gradients on one batch.

    python benchmarks/narrow_products.py TOKENIZER [--steps 200] [--seeds 3] [--model FOLDER] [--no-training]

Trains a model of four layers from random weights on the text in the package, in 25 languages, with a
tokenizer of at most 8,192 entries, such as that of `babel demo`. Each seed gives one order of batches and one
first state, the same for all types. The loss is the mean over the last tenth of the steps, in nats a token.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from babel_jax.config import MatmulType, ModelConfig, OptimizerSettings, TrainingSettings
from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.model.decoder import abstract_params, init_params
from babel_jax.model.execution import Execution
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.training.loss import summed_loss
from babel_jax.training.mesh import global_batch, make_mesh
from babel_jax.training.optimizer import AdamW
from babel_jax.training.step import compiled_step, placed_state, state_shardings

BATCH, LENGTH, PEAK = 16, 128, 2e-3
TYPES = (None, *MatmulType)


def windows(tokenizer: Any) -> np.ndarray:
    """All text of the package, one document after the other: int32[windows, LENGTH]."""
    rows = [row for rows in embedded_corpus().values() for row in rows]
    random = np.random.default_rng(0)
    texts = [rows[number].text for number in random.permutation(len(rows))]
    ids = np.concatenate([np.asarray(tokenizer.encode(text), np.int32) for text in texts])
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def final_loss(text: np.ndarray, matmul_dtype: MatmulType | None, seed: int, steps: int) -> float:
    config = ModelConfig(
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    mesh, settings = make_mesh({}), OptimizerSettings()
    training = TrainingSettings(global_batch_size=BATCH, matmul_dtype=matmul_dtype)
    optimizer = AdamW(settings, abstract_params(config))
    shardings = state_shardings(config, optimizer, mesh)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
    state = placed_state(optimizer, params, shardings, 1)
    step = compiled_step(config, optimizer, settings, training, mesh)
    random, losses = np.random.default_rng(seed), []
    for number in range(steps):
        tokens = text[random.integers(0, len(text), BATCH)]
        batch = {
            "tokens": tokens,
            "segment_ids": np.ones_like(tokens),
            "language": np.zeros(BATCH, np.int32),
        }
        rate = PEAK * min(1.0, 20 * (number + 1) / steps) * min(1.0, 3.3 * (steps - number) / steps)
        state, metrics = step(state, global_batch(batch, mesh), jnp.float32(rate))
        losses.append(float(metrics["loss"]))
    return statistics.mean(losses[-steps // 10 :])


def on_a_real_model(folder: Path) -> None:
    opened = open_folder(folder)
    params, tokenizer = load_params(opened), open_tokenizer(folder)
    text = windows(tokenizer)[:4]
    batch = {"tokens": jnp.asarray(text), "segment_ids": jnp.ones_like(text)}

    def of(dtype: Any, matmul_dtype: MatmulType | None) -> tuple[float, np.ndarray]:
        def loss(params: Any) -> jax.Array:
            execution = Execution(dtype, matmul_dtype=matmul_dtype)
            return summed_loss(opened.config, params, batch, execution=execution)[0] / text[:, 1:].size

        value, gradients = jax.jit(jax.value_and_grad(loss))(params)
        layers = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(gradients["model"]["layers"])]
        return float(value), np.concatenate(layers)

    exact, exact_gradient = of(jnp.float32, None)
    print(f"{folder.name}, {text.size} tokens: loss in float32 {exact:.5f}")
    for matmul_dtype in TYPES:
        value, gradient = of(jnp.bfloat16, matmul_dtype)
        cosine = gradient @ exact_gradient / np.linalg.norm(gradient) / np.linalg.norm(exact_gradient)
        print(
            f"{matmul_dtype or 'bfloat16'}: loss {value:.5f} ({value / exact - 1:+.3%}), "
            f"cosine of the layers' gradient with float32's {cosine:.5f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--no-training", action="store_true")
    options = parser.parse_args()
    if options.model is not None:
        on_a_real_model(options.model)
    if options.no_training:
        return
    text = windows(open_tokenizer(options.tokenizer))
    for matmul_dtype in TYPES:
        losses = [final_loss(text, matmul_dtype, seed, options.steps) for seed in range(options.seeds)]
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"{matmul_dtype or 'bfloat16'}: mean {statistics.mean(losses):.4f} ({shown})", flush=True)


if __name__ == "__main__":
    main()
