"""The environment of a process with several CPU devices."""

import os
import sys


def forced_devices(count: int) -> dict[str, str]:
    """This process's environment, with so many CPU devices and this process's search path. The persistent
    cache of compiled programs is off, because it cannot hold programs of several CPU devices
    (`training.compilation.compiled_in`).
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": flags.strip(),
    }
