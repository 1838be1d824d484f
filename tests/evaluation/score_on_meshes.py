"""Run by test_scoring.py with eight devices, on meshes whose every axis is over 1 somewhere: scores,
continuations and sensitivities, as JSON."""

import dataclasses
import json

import jax
import numpy as np

from babel_jax.evaluation.scoring import score
from babel_jax.inference.generation import generate
from babel_jax.model import cross_entropy as vocabulary
from babel_jax.model.decoder import init_params
from babel_jax.studies.sensitivity import sensitivity
from babel_jax.training.mesh import make_mesh, param_shardings
from tests.evaluation.test_scoring import CONFIGS, MESHES, PROMPTS, SAMPLED, encoded_texts, random_sequences


def main() -> None:
    vocabulary._LARGEST_PIECE = 2**10  # several pieces of the vocabulary
    for family, config in CONFIGS.items():
        params = init_params(config.model_copy(update={"initializer_range": 0.3}), jax.random.key(0))
        sequences = random_sequences(np.random.default_rng(0), 14)
        for sizes in MESHES[family]:
            mesh = make_mesh(sizes)
            placed = jax.device_put(params, param_shardings(config, mesh))
            scores = score(config, placed, sequences, mesh, 512)
            seen = [family, sizes, scores, None, None]
            if sizes is MESHES[family][0]:
                written = [
                    generate(config, placed, PROMPTS, 8, mesh=mesh, **sampling) for sampling in SAMPLED
                ]
                seen[3:] = written, dataclasses.asdict(sensitivity(config, placed, encoded_texts(), mesh))
            print("SEEN " + json.dumps(seen))


if __name__ == "__main__":
    main()
