"""The same loss curve, to rounding, whatever mesh the eight forced CPU devices form."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from babel_jax.errors import BadInput
from babel_jax.model.parallel import AXES
from babel_jax.training.mesh import check_batch, make_mesh, param_shardings
from tests.forced_devices import forced_devices

MESHES = [
    ({"data": 2, "context": 2}, {"devices": 4, "remat": "none"}),
    ({"fsdp": 8, "ring": 2}, {"remat": "full", "offload_optimizer_state": True}),
    ({"tensor": 2, "data": 2, "fsdp": 2}, {"remat": "projections"}),
    ({"fsdp": 2, "ring": 2, "context": 2, "tensor": 2}, {"gradient_accumulation": 2, "remat": "gate"}),
    ({"fsdp": 2}, {"devices": 2, "gradient_accumulation": 4, "remat": "dots", "scan_layers": False}),
]


def forced(devices: int, meshes: list) -> list:
    script = Path(__file__).with_name("eight_devices.py")
    found = subprocess.run(
        [sys.executable, script, json.dumps(meshes)],
        env=forced_devices(devices),
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout)


# Products in int8: a row that `tensor` splits has a scale for each part.
INT8 = {"matmul_dtype": "int8", "remat": "full"}
INT8_MESHES = [
    ({"fsdp": 2, "ring": 2, "context": 2, "tensor": 2}, INT8),
    ({"fsdp": 4, "ring": 2, "context": 2}, INT8),
]


@pytest.fixture(scope="module")
def one_device():
    return forced(1, [({}, {})])[0]


@pytest.fixture(scope="module")
def eight_devices():
    return forced(8, [*MESHES, *INT8_MESHES])


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(MESHES)), ids=[json.dumps(mesh).replace('"', "") for mesh in MESHES]
)
def test_losses_are_those_of_one_device(one_device, eight_devices, number):
    found = eight_devices[number]
    np.testing.assert_allclose(found["losses"], one_device["losses"], rtol=2e-5)
    assert found["norm"] == pytest.approx(one_device["norm"], rel=1e-3)
    assert found["compiled"] == 1
    sizes, settings = MESHES[number]
    assert found["memory"] == ("pinned_host" if settings.get("offload_optimizer_state") else "device")
    # A replica with another bit is found, and the gradients of one batch are the same twice.
    assert ("differ on host" in found["other_replicas"]) == ("data" in sizes)
    assert found["share"] == 1 / math.prod(
        size for axis, size in sizes.items() if axis not in ("data", "ring")
    )


@pytest.mark.slow
def test_products_in_int8_on_every_axis(one_device, eight_devices):
    found = eight_devices[len(MESHES)]
    np.testing.assert_allclose(found["losses"], one_device["losses"], rtol=3e-3)
    assert found["losses"] != pytest.approx(one_device["losses"], rel=1e-6)
    assert found["norm"] == pytest.approx(one_device["norm"], rel=2e-2)


@pytest.mark.slow
def test_weights_are_gathered_in_int8_with_the_scales_of_whole_rows(eight_devices):
    in_int8 = forced(1, [({}, INT8)])[0]
    found = eight_devices[len(MESHES) + 1]
    # The forward pass is that of one device, to rounding. Each device quantizes gradients of its own tokens.
    assert found["losses"][0] == pytest.approx(in_int8["losses"][0], rel=2e-6)
    np.testing.assert_allclose(found["losses"], in_int8["losses"], rtol=1e-3)
    # Seven matrices of the one layer in the program, in the forward pass and to compute it again.
    assert (in_int8["narrow_gathers"], found["narrow_gathers"]) == (0, 2 * 7)


class FakeMesh:
    """What the checks look at."""

    def __init__(self, **shape):
        self.shape = dict.fromkeys(AXES, 1) | shape


def test_sizes_that_do_not_divide_are_refused_with_those_that_do(tiny_config):
    with pytest.raises(
        BadInput,
        match=r"training.mesh: tensor = 3 does not divide the model's vocab = 512; sizes that do: \[",
    ):
        param_shardings(tiny_config, FakeMesh(tensor=3))
    with pytest.raises(BadInput, match=r"kv_heads = 2; sizes that do: \[1, 2\]"):
        param_shardings(tiny_config, FakeMesh(tensor=4))
    with pytest.raises(BadInput, match=r"fsdp x context = 96 does not divide the model's embed = 64"):
        param_shardings(tiny_config, FakeMesh(fsdp=32, context=3))
    with pytest.raises(
        BadInput, match=r"6 windows do not divide by the 4 devices .*; give a multiple of 8, such as 8 or 16"
    ):
        check_batch(FakeMesh(data=2, fsdp=2), 12, 2, 128)
    with pytest.raises(
        BadInput,
        match=(
            r"context = 3 cuts windows into 6 parts, which does not divide data.seq_len = 128; sizes that "
            r"do: \[1, 2, 4\]"
        ),
    ):
        check_batch(FakeMesh(context=3), 1, 1, 128)
    check_batch(FakeMesh(data=2, fsdp=2, context=4), 16, 2, 128)


@dataclass(frozen=True)
class FakeChip:
    """A chip of one of several slices, as libtpu describes it."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    core_on_chip: int = 0


def chips(slices, *extents):
    places = itertools.product(range(slices), *(range(extent) for extent in reversed(extents)))
    return [
        FakeChip(number, tuple(reversed(xyz)), number_of_slice, number_of_slice)
        for number, (number_of_slice, *xyz) in enumerate(places)
    ]


def test_a_mesh_over_slices_keeps_each_slice_together():
    mesh = make_mesh({"fsdp": -1, "context": 2}, chips(3, 4, 4, 1))
    assert dict(mesh.shape) == {"data": 3, "fsdp": 4, "ring": 2, "context": 2, "tensor": 1}
    for number, one in enumerate(mesh.devices):
        assert {chip.slice_index for chip in one.flat} == {number}
    with pytest.raises(BadInput, match="data = 2 with 3 slices; leave it out, or give a multiple of 3"):
        make_mesh({"data": 2, "fsdp": 24}, chips(3, 4, 4, 1))


def test_the_ring_is_one_dimension_of_the_torus():
    assert make_mesh({"fsdp": -1}, chips(1, 4, 4, 2)).shape["ring"] == 2
    assert make_mesh({"fsdp": -1, "context": 2}, chips(1, 4, 4, 2)).shape["ring"] == 1
    ring = make_mesh({"fsdp": -1}, chips(1, 4, 4, 1)).devices[0, 0, :, 0, 0]
    assert sum(len({chip.coords[axis] for chip in ring}) > 1 for axis in range(3)) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, r"does not fit 8 devices; .*; with the others as they are, fsdp = 8 would"),
        ({"fsdp": -1, "tensor": 3}, r"tensor = 2 or 4 would"),
        ({"data": -1, "fsdp": -1}, r"one of them may be -1"),
        ({"fsdp": 8, "ring": 3}, r"ring = 3 is a part of fsdp = 8; sizes that divide it: \[1, 2, 4, 8\]"),
        ({"fsdb": 8}, r"unknown axis fsdb; valid axes"),
    ],
)
def test_a_mesh_that_does_not_match_the_devices_is_refused_with_sizes_that_do(sizes, message):
    with pytest.raises(BadInput, match=message):
        make_mesh(sizes, chips(1, 4, 2, 1))
