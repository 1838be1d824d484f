from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from babel_jax.config import Config, ModelConfig
from babel_jax.config.file import parse_settings
from babel_jax.training.deepening import Depth
from babel_jax.training.metrics import Metrics
from babel_jax.training.run import train_stages
from tests.compiled import init_params


@pytest.fixture(scope="session")
def run_config(small_prepared, small_model):
    """Makes the config of a run of two stages, 6 and 4 steps, on the small corpus; changes are by top-level
    key.
    """

    def make(out: Path, **changes: Any) -> Config:
        schedule = {"peak": 1e-2}
        values = {
            "out": str(out),
            "model": {
                "shape": {
                    "vocab_size": 1280,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                }
            },
            "data": {"folder": str(small_prepared), "tokenizer": str(small_model), "seq_len": 64},
            "training": {
                "global_batch_size": 4,
                "compute_dtype": "float32",
                "checkpoint_every": 3,
                "max_skipped_steps": 3,
            },
            "stages": [
                {"name": "first", "steps": 6, "schedule": schedule, "mixture": {"max_epochs": 1000.0}},
                {
                    "name": "second",
                    "steps": 4,
                    "schedule": schedule,
                    "mixture": {"strategy": "temperature", "max_epochs": 1000.0},
                },
            ],
        }
        for key, change in changes.items():
            values[key] = {**values[key], **change} if isinstance(values.get(key), dict) else change
        return parse_settings(Config, values, "test")

    return make


@pytest.fixture(scope="session")
def begin():
    """Fresh initial parameters of a config's shape."""

    def make(shape: ModelConfig) -> Any:
        return jax.tree.map(jnp.copy, init_params(shape, jax.random.key(0)))

    return make


@pytest.fixture
def cut_off(monkeypatch):
    """Calls a function that trains, as if the process were killed when a step has been taken."""

    def run(step: int, train: Callable[[], Any]) -> None:
        def cut(self: Metrics, now: int, *rest: Any, log: Any = Metrics.log) -> int:
            if now == step:
                raise RuntimeError("killed")
            return log(self, now, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Metrics, "log", cut)
            with pytest.raises(RuntimeError, match="killed"):
                train()

    return run


@pytest.fixture
def train_at(run_config, begin):
    """Runs a folder to its end at one depth, with these new layers and rows; gives the parameters."""

    def go(folder, new_layers=(), new_rows=(), **changes):
        folder.mkdir(exist_ok=True)
        config = run_config(folder, **changes)
        shape = config.model.shape
        models = [Depth(0, shape, new_layers, new_rows=new_rows)]
        return train_stages(config, models, lambda: begin(shape), folder, lambda *_: None)

    return go
