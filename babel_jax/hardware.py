"""Published peak rates of the chips that this project runs on, in one table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Chip:
    """Peak rates of one TPU chip, dense; bytes and FLOPs per second.

    - ici: bytes of all links of the chip to other chips, in one direction
    - dcn: the chip's share of its host's network
    - capacity: HBM, in GiB, that the compiler gives to a program
    - devices: JAX devices per chip
    - torus: dimensions of a slice
    - kinds: beginnings of `jax.Device.device_kind`
    - flops_per_cycle: of the matrix units of one JAX device, to compute the clock
    - narrow: peaks of products in narrower types, by the type; a missing type has no unit

    Source: the pages of cloud.google.com/tpu/docs for v4, v5e, v5p, v6e and tpu7x. ici of v5e and v6e is half
    of the bidirectional figure there. dcn is the pod's rate divided by its chips (v5e 6.4 and v6e 25.6 Tbps
    by 256), else that of a 200 Gbps host by 4 chips; of tpu7x 100 Gbps. Capacity is from the message of
    libtpu 0.0.42 when memory runs out; for tpu7x, where this was not seen, the published 192 GB.
    flops_per_cycle: 4 (v5e) and 8 (v4, v5p) units of 128 x 128 products; for v6e and tpu7x the power of two
    above the compiler's estimate for a product of 4,096 x 4,096 matrices (456,000 and 435,000).
    """

    name: str
    kinds: tuple[str, ...]
    bf16: float
    hbm: float
    ici: float
    dcn: float
    capacity: float
    devices: int = 1
    torus: int = 2
    flops_per_cycle: int = 0
    narrow: Mapping[str, float] = field(default_factory=dict, hash=False)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, 1228e9, 300e9, 6.25e9, 30.75, 1, 3, 262_144, {"int8": 275e12}),
        Chip(
            "v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 819e9, 200e9, 3.125e9, 15.75, 1, 2, 131_072,
            {"int8": 394e12},
        ),
        Chip("v5p", ("TPU v5",), 459e12, 2765e9, 600e9, 6.25e9, 95.74, 1, 3, 262_144, {"int8": 918e12}),
        Chip(
            "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1638e9, 400e9, 12.5e9, 31.25, 1, 2, 524_288,
            {"int8": 1836e12},
        ),
        Chip(
            "tpu7x", ("TPU7x",), 2307e12, 7380e9, 1200e9, 12.5e9, 178.8, 2, 3, 524_288,
            {"float8": 4614e12},
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Cuda:
    """The properties of a card that XLA's compiler for CUDA asks for.

    - capability: CUDA's compute capability
    - cores: streaming multiprocessors; fpus, threads and shared_memory (bytes) are for each of them
    - shared_memory_per_block: bytes, with the opt-in of cudaFuncSetAttribute
    - l2: bytes
    - clock: GHz

    Source: the table of compute capabilities in NVIDIA's CUDA C++ Programming Guide, and the white papers of
    the Ampere, Ada and Hopper architectures.
    """

    capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    shared_memory: int
    shared_memory_per_block: int
    l2: int
    clock: float


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA card, by its data sheet; bytes and FLOPs per second.

    - bf16: the dense peak with float32 sums, without sparsity
    - hbm: rate of its memory
    - link: to other cards of the machine, in one direction: NVLink, or PCI Express 4.0 x16
    - capacity: memory, in GiB
    - kind: `jax.Device.device_kind`
    - cuda: None if programs are not compiled for it (the CPU)
    - narrow: peaks of products in narrower types, by the type

    Source: NVIDIA's data sheets of the H100 SXM, H200 SXM, A100 80GB SXM and L4, and the white paper of the
    Ada architecture.
    """

    title: str
    bf16: float
    hbm: float
    link: float
    capacity: float
    cuda: Cuda | None = None
    kind: str = ""
    narrow: Mapping[str, float] = field(default_factory=dict, hash=False)


_HOPPER = Cuda((9, 0), 132, 128, 2048, 233_472, 232_448, 50 * 2**20, 1.98)
_AMPERE = Cuda((8, 0), 108, 64, 2048, 167_936, 166_912, 40 * 2**20, 1.41)
_ADA_L4 = Cuda((8, 9), 58, 128, 1536, 102_400, 101_376, 48 * 2**20, 2.04)
_ADA_4090 = Cuda((8, 9), 128, 128, 1536, 102_400, 101_376, 72 * 2**20, 2.52)
_HOPPER_NARROW = {"int8": 1979e12, "float8": 1979e12}

GPUS = {
    "h100": Gpu(
        "H100 80GB SXM", 989e12, 3350e9, 450e9, 79.6, _HOPPER, "NVIDIA H100 80GB HBM3", _HOPPER_NARROW
    ),
    "h200": Gpu("H200 141GB SXM", 989e12, 4800e9, 450e9, 139.8, _HOPPER, "NVIDIA H200", _HOPPER_NARROW),
    "a100": Gpu(
        "A100 80GB SXM", 312e12, 2039e9, 300e9, 80.0, _AMPERE, "NVIDIA A100-SXM4-80GB", {"int8": 624e12}
    ),
    "l4": Gpu("L4 24GB", 121e12, 300e9, 32e9, 22.5, _ADA_L4, "NVIDIA L4", {"int8": 242e12, "float8": 242e12}),
    "rtx4090": Gpu(
        "RTX 4090 24GB",
        165e12,
        1008e9,
        32e9,
        24.0,
        _ADA_4090,
        "NVIDIA GeForce RTX 4090",
        {"int8": 660e12, "float8": 330e12},
    ),
}

# Dense bfloat16 peaks in FLOP/s of NVIDIA's data sheets, without sparsity, by the beginning of `device_kind`.
_GPU_PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


# Files of accelerators: NVIDIA's, AMD's, and TPUs of two generations of drivers.
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*")


def without_accelerator(devices: Path = Path("/dev")) -> bool:
    """True if this machine has no accelerator that JAX could use."""
    return not any(found for pattern in _ACCELERATORS for found in devices.glob(pattern))


def peak_flops(device_kind: str, devices: int) -> float | None:
    """The dense bfloat16 peak, in FLOP/s, of this number of JAX devices; None if it is unknown (CPU)."""
    peaks = dict(_GPU_PEAK_FLOPS)
    for chip in CHIPS.values():
        for kind in chip.kinds:
            peaks[kind] = chip.bf16 / chip.devices
    known = [kind for kind in peaks if device_kind.startswith(kind)]
    # The longest match: "TPU v5 lite" also begins with "TPU v5".
    return peaks[max(known, key=len)] * devices if known else None


def name_of_kind(device_kind: str) -> str | None:
    """The name of a chip or card in these tables, such as "v5e" for "TPU v5 lite"; None for other devices."""
    names = {card.kind: name for name, card in GPUS.items()}
    if device_kind in names:
        return names[device_kind]
    names = {kind: chip.name for chip in CHIPS.values() for kind in chip.kinds}
    known = [kind for kind in names if device_kind.startswith(kind)]
    # The longest match: "TPU v5 lite" also begins with "TPU v5".
    return names[max(known, key=len)] if known else None


def narrow_peaks(device_kind: str) -> Mapping[str, float] | None:
    """Peaks, in FLOP/s, of products in types narrower than bfloat16, by the type, of one chip or card; None
    for devices that are not in these tables, such as the CPU.
    """
    name = name_of_kind(device_kind)
    if name is None:
        return None
    return CHIPS[name].narrow if name in CHIPS else GPUS[name].narrow
