"""The devices of a machine."""

import pytest

from babel_jax.hardware import name_of_kind, without_accelerator


@pytest.mark.parametrize("device", ["nvidia0", "kfd", "accel0", "vfio/0"])
def test_an_accelerator_is_seen(device, tmp_path):
    # Files that machines without an accelerator may have too.
    (tmp_path / "vfio").mkdir()
    for name in ("null", "nvidiactl", "vfio/vfio"):
        (tmp_path / name).touch()
    assert without_accelerator(tmp_path)
    (tmp_path / device).touch()
    assert not without_accelerator(tmp_path)


def test_a_device_has_its_name_in_the_tables():
    names = {
        "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v4": "v4", "NVIDIA H200": "h200",
        "NVIDIA L4": "l4", "NVIDIA L40S": None, "cpu": None,
    }  # fmt: skip
    assert {kind: name_of_kind(kind) for kind in names} == names
