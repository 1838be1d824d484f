"""The compiler's forecast of any program for TPUs, from its HLO text: ours beside others.

    python benchmarks/forecast_peers.py v5e ours.txt maxtext.txt --attention-flops 1.2e11 --kernels 20

How a text is dumped: `compiled.as_text()` of a jitted function that was compiled for a topology, or
XLA_FLAGS=--xla_dump_to=DIR and the file that ends in after_optimizations.txt. MaxText writes one with
`train_compile.py compile_topology=v5e-256` and that flag.

The FLOPs of Pallas kernels are in no text. --attention-flops gives those of one run of an attention kernel;
without it these kernels count zero, and the line says how many there are. Collectives count their bytes over
all links of the chip, as if each used every dimension of the torus. So compare texts of the same mesh.
"""

import argparse
import json
from pathlib import Path

from babel_jax.errors import BadInput
from babel_jax.hardware import CHIPS
from babel_jax.tpu.forecast import Kind, forecast_line, forecast_of, kernels_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chip", choices=CHIPS)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--attention-flops", type=float, default=0.0)
    parser.add_argument("--kernels", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chip = CHIPS[options.chip]
    # The empty name is part of every name: one figure for all Pallas kernels.
    flops = {"": options.attention_flops}
    results = {}
    for path in options.texts:
        forecast = forecast_of(
            path.read_text(), chip, flops, lambda moved: moved.bytes / (chip.ici / chip.devices)
        )
        if forecast is None:
            raise BadInput(f"{path}: no estimated_cycles in it; it is no text of libtpu's compiler")
        results[str(path)] = forecast.described()
        if options.json:
            continue
        pallas = sum(kernel.times for kernel in forecast.kernels if kernel.kind is Kind.ATTENTION)
        print(f"{path}: {forecast_line(forecast.described())}; {pallas:,} runs of Pallas kernels")
        print(kernels_table(forecast.grouped(), options.kernels), end="\n\n")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        raise SystemExit(f"forecast_peers: {error}") from None
