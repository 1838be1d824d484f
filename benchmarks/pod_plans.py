"""The shipped configs compiled for the pods that they are meant for, beside MaxText's figures; the table of
docs/pods/index.md.

    python benchmarks/pod_plans.py [--results FILE] [--only v5p] [--rest] [--table]

Each plan is one `babel plan --step-only` (3 to 10 minutes on two cores) and is written as soon as it is
there: the same command goes on. A step that was compiled with other options of the compiler than a run has is
compiled again. `--rest` compiles the other programs of the runs too (about 10 minutes a row); rows that
differ in the train step alone share them. `--table` prints what is there: a table of the steps, and one of
all programs. MaxText's figures are those of its own ahead-of-time check: MaxText 0.2.5, jax 0.12.0, its
Qwen2.5-7B config with 34 layers and the shape of Babel-83B, one window of 4,096 tokens a chip, pure FSDP,
float32 parameters and Adam, full remat.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from babel_jax.config.file import configs_folder, load_config
from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.tpu.chips import chip_of
from babel_jax.tpu.compiling import Which
from babel_jax.tpu.plan import plan
from babel_jax.training.compilation import tpu_options

# Model, topology, slices, settings; those that stand for all of MaxText's are without remat and seq_len.
LONG = ("data.seq_len=32768",)
HALVES, OFFLOAD = "training.mesh={fsdp=-1, context=2}", "training.offload_optimizer_state=true"
PLANS: list[tuple[str, str, int, tuple[str, ...]]] = [
    ("babel-9b", "v5e:16x16", 1, ("training.global_batch_size=256",)),
    ("babel-83b", "v5p:8x8x8", 1, ("training.global_batch_size=512",)),
    ("babel-83b", "v5e:16x16", 16, ("training.global_batch_size=2048", HALVES)),
    (
        "babel-83b",
        "v5e:16x16",
        16,
        ("training.global_batch_size=2048", HALVES, "training.remat=attention", OFFLOAD),
    ),
    ("babel-9b", "v5p:4x4x4", 1, ("training.global_batch_size=64",)),
    ("babel-9b", "v6e:8x8", 1, ("training.global_batch_size=64", "training.remat=mlp")),
    ("babel-83b", "v6e:16x16", 1, ("training.global_batch_size=256",)),
    ("babel-83b", "v6e:16x16", 1, ("training.global_batch_size=256", "training.remat=attention")),
    (
        "babel-83b",
        "v6e:16x16",
        1,
        ("training.global_batch_size=128", HALVES, "training.remat=projections", OFFLOAD),
    ),
    (
        "babel-9b",
        "v5p:4x4x4",
        1,
        ("training.global_batch_size=16", "training.mesh={fsdp=-1, context=4}", "training.remat=mlp", *LONG),
    ),
    ("babel-83b", "v5p:8x8x8", 1, ("training.global_batch_size=512", "training.remat=mlp")),
    ("babel-9b", "v5e:16x16", 1, ("training.global_batch_size=256", "training.remat=gate")),
    (
        "babel-83b",
        "v5p:8x8x8",
        1,
        ("training.global_batch_size=64", "training.mesh={fsdp=-1, context=8}", "training.remat=mlp", *LONG),
    ),
    ("babel-9b", "v5p:4x4x4", 1, ("training.global_batch_size=64", "training.remat=mlp")),
    (
        "babel-9b",
        "v5e:16x16",
        1,
        ("training.global_batch_size=16", "training.mesh={fsdp=-1, context=16}", "training.remat=mlp", *LONG),
    ),
]
MAXTEXT = {  # GiB of arguments and temporaries, GB on the wire
    ("babel-9b", "v5p:4x4x4"): (1.58, 5.52, 67),
    ("babel-9b", "v5e:16x16"): (0.45, 5.23, None),
    ("babel-83b", "v5p:8x8x8"): (1.85, 16.08, 647),
}


# Settings that change the train step and none of the other programs.
STEP_ALONE = ("training.global_batch_size", "training.remat", "training.gradient_accumulation")
_REST = "rest: "


_HEAD = """# Plans of all programs

The rows are those of [the table of pods](pods/index.md).

Made by `python benchmarks/pod_plans.py --rest --page docs/plans.md`. `beside` is what else is on the chip
while the program runs. Seconds are the least at the chip's published peaks: one run of the program (a step,
a batch, a new token). Rows that differ in the train step alone share the other programs. The samples of the
parent are made by the programs of "samples" with fewer layers. Nothing ran on hardware."""


def rest_name_of(model: str, topology: str, slices: int, settings: tuple[str, ...]) -> str:
    """The name under which the programs of a run other than its steps are kept."""
    return _REST + name_of(
        model, topology, slices, tuple(one for one in settings if not one.startswith(STEP_ALONE))
    )


def name_of(model: str, topology: str, slices: int, settings: tuple[str, ...]) -> str:
    return " ".join([model, topology, str(slices), *settings])


def table(results: dict[str, Any]) -> str:
    """Markdown, a row for each plan."""
    lines = [
        "| model | pod | settings | HBM a chip, GiB: arguments + temporaries of capacity | hardware / model "
        "FLOPs | wire GB (of the least) "
        "| seconds a step: at least, forecast | binds | MFU: at most, forecast | MaxText: GiB, wire GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, topology, slices, settings in PLANS:
        found = results.get(name_of(model, topology, slices, settings))
        if found is None:
            continue
        pod = topology if slices == 1 else f"{slices} x {topology}"
        shown = ", ".join(setting.removeprefix("training.").removeprefix("data.") for setting in settings)
        if "error" in found or not found["fits"]:
            why = found.get("error") or found["summary"].splitlines()[-1]
            lines.append(f"| {model} | {pod} | {shown} | does not fit: {why} | | | | | | |")
            continue
        hbm, wire, least = found["hbm_gib"], found["wire_bytes"], found["wire_bytes_minimum"]
        peer = MAXTEXT.get((model, topology)) if "remat" not in shown and "seq_len" not in shown else None
        theirs = "" if peer is None else f"{peer[0]} + {peer[1]}" + (f", {peer[2]}" if peer[2] else "")
        lines.append(
            f"| {model} | {pod} | {shown} | {hbm['arguments']:.2f} + {hbm['temporaries']:.2f} of "
            f"{hbm['capacity']:g} "
            f"| {found['hardware_flops'] / found['model_flops']:.3f} | {wire / 1e9:.1f} ({wire / least:.3f}) "
            f"| {found['step_seconds_bound']:.2f}, {_shown(found.get('forecast_seconds'), '.2f')} "
            f"| {found['bound_by']} "
            f"| {found['mfu_bound']:.0%}, {_shown(found.get('forecast_mfu'), '.0%')} | {theirs} |"
        )
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    """A figure of the forecast, or a mark that there is none."""
    return "?" if value is None else format(value, form)


def is_current(found: dict[str, Any] | None, topology: str, which: Which) -> bool:
    """False for a plan that is missing, or whose step was compiled with other options of the compiler."""
    if found is None:
        return False
    return which is not Which.STEP or found.get("compiler_options") == tpu_options(chip_of(topology).name)


def programs_table(results: dict[str, Any]) -> str:
    """Markdown: a row for each program of each plan, the step first; and under it the most that any program
    of the run needs.
    """
    sizes = "arguments + temporaries + results + beside = total"
    lines = [
        f"| plan | program | HBM a chip, GiB: {sizes} | fits | seconds, at least | binds | wire GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in PLANS:
        step, rest = results.get(name_of(*row)), results.get(rest_name_of(*row))
        if step is None or rest is None:
            continue
        if "programs" not in rest:
            lines.append(f"| {name_of(*row)} | {rest['error']} | | | | | |")
            continue
        hbm = step["hbm_gib"]
        most, of = hbm["arguments"] + hbm["temporaries"], "step"
        memory = (
            f"{hbm['arguments']:.2f} + {hbm['temporaries']:.2f} + 0 + 0 = {most:.2f} of {hbm['capacity']:g}"
        )
        work = f"{step['step_seconds_bound']:.3g} | {step['bound_by']} | {step['wire_bytes'] / 1e9:.3g}"
        lines.append(f"| {name_of(*row)} | step | {memory} | {'yes' if step['fits'] else 'no'} | {work} |")
        for one in rest["programs"]:
            hbm = one["hbm_gib"]
            if one["seconds"] is None:
                lines.append(
                    f"| | {one['name']} | {'more' if hbm['total'] is None else format(hbm['total'], '.2f')} "
                    "| no | | | |"
                )
                continue
            parts = " + ".join(
                f"{hbm[part]:.2f}" for part in ("arguments", "temporaries", "results", "beside")
            )
            lines.append(
                f"| | {one['name']} | {parts} = {hbm['total']:.2f} | {'yes' if one['fits'] else 'no'} | "
                f"{one['seconds']:.3g} "
                f"| {one['bound_by']} | {one['wire_bytes'] / 1e9:.3g} |"
            )
            most, of = max((most, of), (hbm["total"], one["name"]))
        lines.append(f"| | **peak of the run** | {most:.2f} of {hbm['capacity']:g} ({of}) | | | | |")
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """The page docs/plans.md: all programs, and the plans whose other programs are not compiled yet."""
    missing = [name_of(*row) for row in PLANS if rest_name_of(*row) not in results]
    parts = [_HEAD, programs_table(results)]
    if missing:
        parts.append(f"Not compiled yet, but for the step (the table of pods): {'; '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def compiled(
    model: str, topology: str, slices: int, settings: tuple[str, ...], which: Which
) -> dict[str, Any]:
    """One plan, or under `error` why there is none; a step with its options of the compiler."""
    options = {"compiler_options": tpu_options(chip_of(topology).name)} if which is Which.STEP else {}
    try:
        config = load_config(configs_folder() / f"{model}.toml", settings)
        return plan(config, topology, slices, which) | options
    except BadInput as error:
        return {"fits": False, "error": str(error)} | options


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("pod_plans.json"))
    parser.add_argument("--only", default="", help="plans whose name holds this")
    parser.add_argument("--rest", action="store_true", help="compile the programs other than the steps too")
    parser.add_argument(
        "--table", action="store_true", help="print the table of what is there, and compile nothing"
    )
    parser.add_argument("--page", type=Path, help="write the page of all programs (docs/plans.md)")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    for row in PLANS:
        wanted = [(name_of(*row), Which.STEP)] + (
            [(rest_name_of(*row), Which.REST)] if arguments.rest else []
        )
        for name, which in wanted:
            current = is_current(results.get(name), row[1], which)
            if arguments.table or current or arguments.only not in name_of(*row):
                continue
            results[name] = compiled(*row, which)
            print(name, results[name].get("summary", results[name]), "", sep="\n", flush=True)
            write_text(arguments.results, json.dumps(results, indent=1) + "\n")
    if arguments.page is not None:
        write_text(arguments.page, page(results))
    print(table(results), programs_table(results), sep="\n\n")


if __name__ == "__main__":
    main()
