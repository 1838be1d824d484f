"""NVIDIA cards as compile targets: XLA compiles for them on a machine without a card.

XLA asks for a description of the card, a `GpuTargetConfigProto` in text form (xla/stream_executor/
device_description.proto). The compiler measures nothing: it chooses matrix products by rules, where on a card
it would try several. Memory and collectives are those of the program; its speed may differ.
"""

import importlib.util
from typing import Any

from jax.experimental import topologies

from babel_jax.hardware import GPUS, Chip, Gpu

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# What every card since Ampere allows: threads of a block and of a warp, blocks of a grid, registers, bytes.
_LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49_152,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
}
_CUDNN, _RUNTIME = (9, 10), (12, 8)


def has_compiler() -> bool:
    """True if JAX's plugin for CUDA is installed; it holds the compiler."""
    return any(importlib.util.find_spec(plugin) is not None for plugin in _PLUGINS)


def target_config(card: Gpu) -> str:
    """The text of XLA's GpuTargetConfigProto of a card."""
    cuda = card.cuda
    assert cuda is not None
    fields = _LIMITS | {
        "shared_memory_per_core": cuda.shared_memory,
        "shared_memory_per_block_optin": cuda.shared_memory_per_block,
        "threads_per_core_limit": cuda.threads,
        "core_count": cuda.cores,
        "fpus_per_core": cuda.fpus,
        "memory_bandwidth": int(card.hbm),
        "l2_cache_size": cuda.l2,
        "clock_rate_ghz": cuda.clock,
        "device_memory_size": int(card.capacity * 2**30),
    }
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    major, minor = cuda.capability
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"  cuda_compute_capability {{ major: {major} minor: {minor} }}",
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}",
            f"runtime_version {{ major: {_RUNTIME[0]} minor: {_RUNTIME[1]} patch: 0 }}",
            f'device_description_str: "{card.kind}"',
        ]
    )


def card_devices(device: str, count: int) -> list[Any]:
    """`count` devices of one machine with this card, to compile for."""
    described = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(GPUS[device]), topology=f"1x1x{count}"
    )
    return list(described.devices)


def as_chip(device: str, capacity: float) -> Chip:
    """The rates of a card in the form of a TPU chip: one torus dimension, its links to the other cards.

    capacity: the GiB that a program may take.
    """
    card = GPUS[device]
    link = card.link
    return Chip(device, (), card.bf16, card.hbm, link, link, capacity, 1, 1, narrow=card.narrow)
