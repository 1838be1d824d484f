"""The shipped configs compiled for the pods that they are meant for, beside MaxText's figures; the table of the README.

    python benchmarks/pod_plans.py [--results FILE] [--only v5p] [--table]

Each plan is one `babel plan` (1 to 5 minutes on two cores) and is written as soon as it is there: the same command goes on. `--table`
prints what is there. MaxText's figures are those of its own ahead-of-time check: MaxText 0.2.5, jax 0.12.0, its Qwen2.5-7B config with 34
layers and the shape of Babel-83B, one window of 4,096 tokens a chip, pure FSDP, float32 parameters and Adam, full remat.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from babel_jax.config.file import configs_folder, load_config
from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.tpu.plan import plan

# Model, topology, slices, settings; those that stand for all of MaxText's are without remat and seq_len.
LONG = ("data.seq_len=32768",)
HALVES, OFFLOAD = "training.mesh={fsdp=-1, context=2}", "training.offload_optimizer_state=true"
PLANS: list[tuple[str, str, int, tuple[str, ...]]] = [
    ("babel-9b", "v5e:16x16", 1, ("training.global_batch_size=256",)),
    ("babel-83b", "v5p:8x8x8", 1, ("training.global_batch_size=512",)),
    ("babel-83b", "v5e:16x16", 16, ("training.global_batch_size=2048", HALVES)),
    ("babel-83b", "v5e:16x16", 16, ("training.global_batch_size=2048", HALVES, "training.remat=attention", OFFLOAD)),
    ("babel-9b", "v5p:4x4x4", 1, ("training.global_batch_size=64",)),
    ("babel-9b", "v6e:8x8", 1, ("training.global_batch_size=64", "training.remat=mlp")),
    ("babel-83b", "v6e:16x16", 1, ("training.global_batch_size=256",)),
    ("babel-83b", "v6e:16x16", 1, ("training.global_batch_size=256", "training.remat=attention")),
    ("babel-83b", "v6e:16x16", 1, ("training.global_batch_size=128", HALVES, "training.remat=gate", OFFLOAD)),
    ("babel-9b", "v5p:4x4x4", 1, ("training.global_batch_size=16", "training.mesh={fsdp=-1, context=4}", "training.remat=mlp", *LONG)),
    ("babel-83b", "v5p:8x8x8", 1, ("training.global_batch_size=512", "training.remat=mlp")),
    ("babel-9b", "v5e:16x16", 1, ("training.global_batch_size=256", "training.remat=gate")),
    ("babel-83b", "v5p:8x8x8", 1, ("training.global_batch_size=64", "training.mesh={fsdp=-1, context=8}", "training.remat=mlp", *LONG)),
    ("babel-9b", "v5p:4x4x4", 1, ("training.global_batch_size=64", "training.remat=mlp")),
    ("babel-9b", "v5e:16x16", 1, ("training.global_batch_size=16", "training.mesh={fsdp=-1, context=16}", "training.remat=mlp", *LONG)),
]
MAXTEXT = {  # GiB of arguments and temporaries, GB on the wire
    ("babel-9b", "v5p:4x4x4"): (1.58, 5.52, 67),
    ("babel-9b", "v5e:16x16"): (0.45, 5.23, None),
    ("babel-83b", "v5p:8x8x8"): (1.85, 16.08, 647),
}


def name_of(model: str, topology: str, slices: int, settings: tuple[str, ...]) -> str:
    return " ".join([model, topology, str(slices), *settings])


def table(results: dict[str, Any]) -> str:
    """Markdown, a row for each plan."""
    lines = [
        "| model | pod | settings | HBM a chip, GiB: arguments + temporaries of capacity | hardware / model FLOPs | wire GB (of the least) "
        "| seconds a step, at least | binds | MFU at most | MaxText: GiB, wire GB |",
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
            f"| {model} | {pod} | {shown} | {hbm['arguments']:.2f} + {hbm['temporaries']:.2f} of {hbm['capacity']:g} "
            f"| {found['hardware_flops'] / found['model_flops']:.3f} | {wire / 1e9:.1f} ({wire / least:.3f}) "
            f"| {found['step_seconds_bound']:.2f} | {found['bound_by']} | {found['mfu_bound']:.0%} | {theirs} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("pod_plans.json"))
    parser.add_argument("--only", default="", help="plans whose name holds this")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and compile nothing")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    for model, topology, slices, settings in PLANS:
        name = name_of(model, topology, slices, settings)
        if arguments.table or name in results or arguments.only not in name:
            continue
        try:
            results[name] = plan(load_config(configs_folder() / f"{model}.toml", settings), topology, slices)
        except BadInput as error:
            results[name] = {"fits": False, "error": str(error)}
        print(name, results[name].get("summary", results[name]), "", sep="\n", flush=True)
        write_text(arguments.results, json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
