"""Run by test_scoring.py with eight devices: scores on meshes whose every axis is over 1 somewhere, as JSON."""

import json

import jax
import numpy as np

from babel_jax.evaluation.scoring import score
from babel_jax.model.decoder import init_params
from babel_jax.training.mesh import make_mesh, param_shardings
from tests.evaluation.test_scoring import CONFIGS, MESHES, random_sequences


def main() -> None:
    for family, config in CONFIGS.items():
        params = init_params(config.model_copy(update={"initializer_range": 0.3}), jax.random.key(0))
        sequences = random_sequences(np.random.default_rng(0), 14)
        for sizes in MESHES[family]:
            mesh = make_mesh(sizes)
            placed = jax.device_put(params, param_shardings(config, mesh))
            print("SEEN " + json.dumps([family, sizes, score(config, placed, sequences, mesh, 512)]))


if __name__ == "__main__":
    main()
