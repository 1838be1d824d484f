"""Programs kept on disk."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import pytest

from babel_jax.training.compilation import Profile, compiled_program

PROGRAM = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from babel_jax.training.compilation import compiled_in
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
step = jax.jit(lambda x: jnp.sin(x) @ x)
folder = pathlib.Path(sys.argv[1])
for _ in range(2):
    with compiled_in(folder):
        step(jnp.ones((4, 4))).block_until_ready()
    jax.clear_caches()
step(jnp.ones((5, 5)))
kept = [file.name for file in folder.glob("jit__lambda*-cache")]
print(json.dumps({"hits": len(hits), "kept": kept, "devices": jax.device_count()}))
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_that_goes_on_compiles_nothing_again(tmp_path, devices):
    """But on several CPU devices, where programs that were loaded make devices wait for each other for ever,
    nothing is kept.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")
    } | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    shown = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "compiled"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr[-2000:]
    found = json.loads(shown.stdout)
    assert found["devices"] == devices
    assert len(found["kept"]) == (1 if devices == 1 else 0)
    assert (found["hits"] > 0) == (devices == 1)


def test_processes_of_one_host_trace_into_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with Profile(tmp_path, range(1, 2)) as traced:
            traced.before(1)
            traced.after(1, ())
    traces = tmp_path.glob("process-*/plugins/profile/*/*.xplane.pb")
    assert sorted(trace.relative_to(tmp_path).parts[0] for trace in traces) == ["process-0", "process-1"]


class Device(NamedTuple):
    """What the compiler's options depend on."""

    platform: str
    device_kind: str


def test_on_tpus_a_step_has_our_options_and_a_run_may_change_each():
    """The options that are given to XLA, with a stand-in for the lowered step."""
    given = []

    class Lowered:
        def compile(self, compiler_options):
            given.append(compiler_options)

    v5e, v6e = Device("tpu", "TPU v5 lite"), Device("tpu", "TPU v6 lite")
    for device, changes in (
        (Device("cpu", "cpu"), {}),
        (v5e, {}),
        (v5e, {"xla_enable_async_all_gather": False}),
        (v6e, {}),
        (Device("tpu", "TPU v5"), {}),
    ):
        compiled_program(Lowered(), device, changes)
    on_cpu, on_tpu, changed, on_v6e, on_v5p = given
    assert on_cpu is None
    # Gathers start ahead, and run beside the products of the tensor core.
    assert on_tpu["xla_enable_async_all_gather"] is True
    assert on_tpu["xla_tpu_overlap_compute_collective_tc"] is True
    assert changed == on_tpu | {"xla_enable_async_all_gather": False}
    # v5e has no SparseCore. On v5p and v6e gathers and scatters run there.
    for collective in ("all_gather", "2d_all_gather", "reduce_scatter"):
        offload = f"xla_tpu_enable_sparse_core_collective_offload_{collective}"
        assert offload not in on_tpu
        assert on_v6e[offload] is on_v5p[offload] is True
    # On v5e gathers run in the steps of a product, which libtpu calls unsafe on every other chip.
    fused = "xla_tpu_enable_async_collective_fusion"
    for option in (fused, f"{fused}_fuse_all_gather", f"{fused}_multiple_steps"):
        assert (on_tpu[option], on_v5p[option], on_v6e[option]) == (True, False, False)
    # Half of the VMEM, and so half of a kernel's part.
    vmem = "xla_tpu_scoped_vmem_limit_kib"
    assert on_v5p[vmem] * 2 == on_v6e[vmem]
