"""Memory and least time of one compiled program on a chip, and what to change where it does not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from babel_jax.config import Config
from babel_jax.hardware import Chip
from babel_jax.tpu.kinds import BITS_PER_BYTE, CARRYING, EXPANSION, GROWTH, OPTIMIZER, STEP, SUITE

_GIB = 2**30


def described_program(config: Config, measurements: dict[str, Any], chip: Chip) -> dict[str, Any]:
    """A program as `babel plan` shows it, from the worker's measurements; per chip, and for one run of the
    program.
    """
    described = {
        "name": measurements["name"],
        "kind": measurements["kind"],
        "compile_seconds": round(measurements["compile_seconds"], 1),
    }
    described["hardware_flops"] = measurements["hardware_flops"] * chip.devices
    hbm = hbm_of(measurements, chip)
    # The compiler gives no program that does not fit: its need of memory at most is known.
    if short := measurements.get("out_of_memory"):
        hbm |= {"total": short["needs"] + hbm["beside"] if short["needs"] else None}
        described |= dict.fromkeys(("seconds", "bound_by", "wire_bytes", "collectives"))
        fits = False
    else:
        seconds = seconds_of(measurements, chip)
        described["seconds"] = max(seconds.values())
        described["bound_by"] = max(seconds, key=lambda name: seconds[name])
        described["wire_bytes"] = (
            sum(moved["bytes"] * moved["times"] for moved in measurements["collectives"]) * chip.devices
        )
        described["collectives"] = by_axes(measurements["collectives"])
        fits = hbm["total"] <= chip.capacity
    described |= {"fits": fits, "hbm_gib": hbm}
    forecast = measurements.get("forecast")
    described["forecast_seconds"] = None if forecast is None else forecast["seconds"]
    if forecast is not None:
        described["forecast"] = {name: value for name, value in forecast.items() if name != "kernels"}
    if not fits:
        described["advice"] = _advice_for(measurements["kind"], config, measurements["mesh"])
    return described


def hbm_of(measurements: dict[str, Any], chip: Chip) -> dict[str, Any]:
    """GiB per chip: arguments, temporaries, results (those that take no argument's memory), other arrays on
    the chip ("beside"), the total, and the capacity.
    """
    parts = ("arguments", "temporaries", "results", "beside")
    # Without the compiler's program its parts are unknown. What is beside it is known from shapes.
    if "out_of_memory" in measurements:
        known: dict[str, Any] = dict.fromkeys(parts) | {
            "beside": measurements.get("beside", 0) / _GIB * chip.devices,
            "total": None,
        }
    else:
        known = {name: measurements.get(name, 0) / _GIB * chip.devices for name in parts}
        known["total"] = sum(known.values())
    return known | {"capacity": chip.capacity}


def seconds_of(measurements: dict[str, Any], chip: Chip) -> dict[str, float]:
    """Bounds on the time of one run at the published peaks, if all parts overlap."""
    compute = compute_seconds(measurements, chip.bf16, chip.narrow, chip.devices)
    return {"compute": compute, "hbm": measurements["hbm_bytes"] * chip.devices / chip.hbm} | wire_seconds(
        measurements["collectives"], chip
    )


def compute_seconds(
    measurements: dict[str, Any], peak: float, narrow: Mapping[str, float], devices: int = 1
) -> float:
    """The time of the products of one run at the peaks of a chip, in FLOP/s: `peak` is the peak of the run's
    type, `narrow` has the peaks of narrower types.
    """
    # Products in narrower types run at their own peaks, all others at that of the run's type.
    wide, seconds = measurements["hardware_flops"], 0.0
    for dtype, flops in measurements.get("narrow_flops", {}).items():
        if flops:
            wide -= flops
            seconds += flops * devices / narrow[dtype]
    result: float = seconds + wide * devices / peak
    return result


def programs_table(programs: Sequence[dict[str, Any]]) -> str:
    """A line for each program."""
    width = max(len(program["name"]) for program in programs)
    columns = f"{'arguments':>9} {'temp.':>7} {'results':>7} {'beside':>7} {'total':>7}"
    head = f"{'GiB a chip':<{width}} {columns}  fits {'seconds':>8}  binds   wire GB {'forecast':>8}"
    lines = [head]
    for program in programs:
        hbm, name = program["hbm_gib"], program["name"]
        sizes = [_shown(hbm[part]) for part in ("arguments", "temporaries", "results", "beside", "total")]
        memory = f"{sizes[0]:>9} " + " ".join(f"{size:>7}" for size in sizes[1:])
        if program["seconds"] is None:
            lines.append(f"{name:<{width}} {memory}  no")
            continue
        fits = "yes" if program["fits"] else "no"
        lines.append(
            f"{name:<{width}} {memory}  {fits:<4} {program['seconds']:>8.3g}  {program['bound_by']:<7} "
            f"{program['wire_bytes'] / 1e9:>7.3g} {_short(program.get('forecast_seconds')):>8}".rstrip()
        )
    lines.append(
        "seconds: the least for one run (a step, a batch, a new token); forecast: seconds as the compiler "
        "expects them; beside: other arrays on the chip during the run"
    )
    return "\n".join(lines)


def short_of(program: dict[str, Any]) -> str:
    """The line about a program that does not fit."""
    hbm = program["hbm_gib"]
    missing = (
        "more than there is" if hbm["total"] is None else f"{hbm['total'] - hbm['capacity']:.2f} GiB too many"
    )
    needs = "" if hbm["total"] is None else f" needs {hbm['total']:.2f} of {hbm['capacity']:.2f} GiB,"
    return f"{program['name']}:{needs} {missing}; try {program['advice']}"


def _short(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g}"


def _shown(gib: float | None) -> str:
    return "" if gib is None else f"{gib:.2f}"


def _advice_for(kind: str, config: Config, mesh: dict[str, int]) -> str:
    """Changes with which a program needs less, the cheapest first."""
    kind, tries = kind.partition(",")[0], []
    if kind == STEP:
        return advice(config, mesh)
    if kind == BITS_PER_BYTE and config.evaluation.batch_size > 1:
        tries.append(f"evaluation.batch_size = {max(1, config.evaluation.batch_size // 2)}")
    if kind == SUITE:
        tries.append("evaluation.suite_items = 0")
    if kind in (CARRYING, OPTIMIZER, BITS_PER_BYTE, SUITE):
        tries += _smaller_moments(config)
    if kind == EXPANSION:
        tries.append("babel expand of the folder before the run, in place of [expansion]")
    if kind == GROWTH:
        tries.append("babel tokenizer extend of the folder before the run, in place of [vocabulary]")
    return ", ".join([*tries, "more chips"]).replace(", more chips", ", or more chips")


def advice(config: Config, mesh: dict[str, int]) -> str:
    """Changes with which a train step needs less, the cheapest first."""
    training, tries = config.training, []
    if training.remat != "full":
        tries.append('training.remat = "full"')
    # More pieces help only if a device has several windows of a piece.
    windows = training.global_batch_size // training.gradient_accumulation
    if windows > mesh["data"] * mesh["fsdp"] * mesh["ring"]:
        tries.append(f"training.gradient_accumulation = {training.gradient_accumulation * 2}")
    if config.data.seq_len % (4 * mesh["context"]) == 0:
        tries.append(f"training.mesh.context = {mesh['context'] * 2}")
    tries += _smaller_moments(config)
    return ", ".join(tries) + ", or more chips"


def _smaller_moments(config: Config) -> list[str]:
    tries = []
    if not config.training.offload_optimizer_state:
        tries.append("training.offload_optimizer_state = true")
    if config.optimizer.first_moment != "bfloat16":
        tries.append('optimizer.first_moment = "bfloat16"')
    return tries


def wire_seconds(collectives: Sequence[dict[str, Any]], chip: Chip) -> dict[str, float]:
    """Bounds on the time of collectives: within slices, where a collective along some dimensions of the torus
    uses only the links of these, and between slices.
    """
    within = between = 0.0
    for collective in collectives:
        moved = collective["bytes"] * collective["times"] * chip.devices
        if collective["slices"]:
            between += moved / chip.dcn
        elif collective["axes"]:
            within += moved / (chip.ici * max(1, collective["dimensions"]) / chip.torus)
    return {"ici": within, "dcn": between}


def by_axes(collectives: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bytes of collectives by kind and mesh axes, the largest first."""
    sums: dict[tuple[str, str], list[int]] = {}
    for collective in collectives:
        total = sums.setdefault((collective["kind"], " x ".join(collective["axes"])), [0, 0])
        total[0] += collective["bytes"] * collective["times"]
        total[1] += collective["times"]
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    table = []
    for (kind, axes), (moved, times) in ordered:
        # Without axes nothing is moved: each device is a group of its own.
        if axes:
            table.append({"kind": kind, "axes": axes, "bytes": moved, "times": times})
    return table
