"""The same loss curve, to rounding, whatever mesh the eight forced CPU devices form."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from babel_jax.errors import BadInput
from babel_jax.training.mesh import check_batch, make_mesh, param_shardings

MESHES = [
    ({"data": 8}, 1),
    ({"fsdp": 8}, 1),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
    ({"fsdp": 4, "tensor": 2}, 2),
    ({"data": 8}, 2),
]


def forced(devices: int, meshes: list) -> list:
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("eight_devices.py")
    found = subprocess.run([sys.executable, script, json.dumps(meshes)], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def one_device():
    return forced(1, [({}, 1)])[0]


@pytest.fixture(scope="module")
def eight_devices():
    return forced(8, MESHES)


@pytest.mark.parametrize("number", range(len(MESHES)), ids=[f"{sizes} by {parts}".replace('"', "") for sizes, parts in MESHES])
def test_losses_are_those_of_one_device(one_device, eight_devices, number):
    found = eight_devices[number]
    np.testing.assert_allclose(found["losses"], one_device["losses"], rtol=2e-5)
    assert found["norm"] == pytest.approx(one_device["norm"], rel=1e-3)
    assert found["compiled"] == 1
    sizes = MESHES[number][0]
    assert found["share"] == 1 / math.prod(size for axis, size in sizes.items() if axis != "data")


class FakeMesh:
    """What the checks look at."""

    def __init__(self, **shape):
        self.shape = shape


def test_sizes_that_do_not_divide_are_refused_with_those_that_do(tiny_config):
    with pytest.raises(BadInput, match=r"training.mesh: tensor = 3 does not divide the model's vocab = 512; sizes that do: \["):
        param_shardings(tiny_config, FakeMesh(data=1, fsdp=1, tensor=3))
    with pytest.raises(BadInput, match=r"micro-batches of 6 windows do not divide by the 4 devices .*; give a multiple of 8"):
        check_batch(FakeMesh(data=2, fsdp=2, tensor=1), 12, 2)
    check_batch(FakeMesh(data=2, fsdp=2, tensor=1), 16, 2)
    with pytest.raises(BadInput, match="one of them may be -1"):
        make_mesh({"data": -1, "fsdp": -1})
