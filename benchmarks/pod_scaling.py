"""How the compiled train step of an 83B model grows: bytes on the wire with chips, and time of compilation
with chips and layers.

    python benchmarks/pod_scaling.py [--layers 4 34 92] [--topologies v5p:2x2x2 v5p:4x4x4 v5p:8x8x8
    v5p:16x16x16]

Widths of Qwen2.5-72B, one window of 4,096 tokens a chip, full remat. Topologies are compared at the first
number of layers, layers on the last topology but one. With parameters spread over all chips, the bytes of one
chip should not grow with their number, and the time of compilation, as layers are scanned, not with theirs.
"""

import argparse
import math

from babel_jax.config.file import configs_folder, load_config
from babel_jax.expansion.plan import PRESET_SOURCES
from babel_jax.tpu.compiling import Which
from babel_jax.tpu.plan import plan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 34, 92])
    parser.add_argument(
        "--topologies", nargs="+", default=["v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8", "v5p:16x16x16"]
    )
    arguments = parser.parse_args()
    cases = [(arguments.layers[0], topology) for topology in arguments.topologies]
    cases += [(layers, arguments.topologies[-2:][0]) for layers in arguments.layers]
    print(
        f"{'layers':>6} {'pod':<14} {'chips':>5} {'compile s':>9} {'HBM GiB':>8} {'wire GB':>8} "
        f"{'of the least':>12} {'gathers':>8}"
    )
    for layers, topology in dict.fromkeys(cases):
        chips = math.prod(map(int, topology.partition(":")[2].split("x")))
        config = load_config(configs_folder() / "babel-83b.toml", [f"training.global_batch_size={chips}"])
        shape = PRESET_SOURCES["babel-83b"].model_copy(update={"num_hidden_layers": layers})
        model = config.model.model_copy(update={"shape": shape, "folder": None})
        found = plan(
            config.model_copy(update={"model": model, "expansion": None}), topology, which=Which.STEP
        )
        gathers = sum(one["times"] for one in found["collectives"] if one["kind"] == "all-gather")
        memory = found["hbm_gib"]["arguments"] + found["hbm_gib"]["temporaries"]
        ratio = found["wire_bytes"] / found["wire_bytes_minimum"]
        print(
            f"{layers:>6} {topology:<14} {chips:>5} {found['compile_seconds']:>9.1f} {memory:>8.2f} "
            f"{found['wire_bytes'] / 1e9:>8.1f} "
            f"{ratio:>12.3f} {gathers:>8}",
            flush=True,
        )


if __name__ == "__main__":
    main()
