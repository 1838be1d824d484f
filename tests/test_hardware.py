"""The devices of a machine."""

import pytest

from babel_jax.hardware import without_accelerator


@pytest.mark.parametrize("device", ["nvidia0", "kfd", "accel0", "vfio/0"])
def test_an_accelerator_is_seen(device, tmp_path):
    # Files that machines without an accelerator may have too.
    (tmp_path / "vfio").mkdir()
    for name in ("null", "nvidiactl", "vfio/vfio"):
        (tmp_path / name).touch()
    assert without_accelerator(tmp_path)
    (tmp_path / device).touch()
    assert not without_accelerator(tmp_path)
