"""Run by test_classifier.py with eight devices: scores, losses of training and the largest share of the
parameters that a device has, on meshes whose every axis is over 1 somewhere, as JSON."""

import json

import jax

from babel_jax.training.mesh import make_mesh, mesh_for
from tests.evaluation.test_scoring import CONFIGS
from tests.quality.test_classifier import MESHES, measured_regressor


def main() -> None:
    assert jax.device_count() == 8
    # Without a mesh setting, devices that do not divide the model's features hold copies.
    shape = CONFIGS["qwen2"].model_copy(update={"hidden_size": 20})
    assert {axis: size for axis, size in mesh_for(shape).shape.items() if size > 1} == {"data": 2, "fsdp": 4}
    for family, config in CONFIGS.items():
        for sizes in MESHES[family]:
            found = measured_regressor(config, make_mesh(sizes))
            print("SEEN " + json.dumps([family, sizes, *found]))


if __name__ == "__main__":
    main()
