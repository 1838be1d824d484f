"""Tokens a second of the loader on one core: 25 datasets of packed windows mixed, shuffled and batched,
beside peers.

    python benchmarks/loader.py [--windows 100] [--seq-len 4096] [--batch 32] [--rounds 5]

Peers, in alternation with it: Grain's own mix of the same datasets, and bare random reads of one dataset
through TFDS and ArrayRecord.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grain
import numpy as np

from babel_jax.config import MixtureSettings
from babel_jax.data.batches.loading import Batches
from babel_jax.data.batches.mixture import make_mixture
from babel_jax.data.windows.packing import pack
from babel_jax.data.windows.prepared import REPORT, dataset_folder, heldout_file, open_prepared
from babel_jax.data.windows.storage import open_windows, write_windows
from babel_jax.languages import BABEL

VOCABULARY = 152_064
MEAN_DOCUMENT = 800
READS = 1024


def write_datasets(folder: Path, windows: int, seq_len: int) -> None:
    """A folder as `babel prepare` leaves it, one dataset for each of the 25 languages, of random tokens in
    documents of random length.
    """
    generator = np.random.default_rng(0)
    languages = {}
    for code in BABEL:
        lengths = generator.geometric(1 / MEAN_DOCUMENT, size=2 * windows * seq_len // MEAN_DOCUMENT)
        lengths = lengths[: np.searchsorted(np.cumsum(lengths + 1), windows * seq_len) - 1]
        documents = [generator.integers(0, VOCABULARY, length, dtype=np.uint32) for length in lengths]
        place = dataset_folder(folder, code, "web")
        place.mkdir(parents=True)
        write_windows(place, place.name, pack(documents, seq_len, eos_id=0), seq_len)
        languages[code] = {
            "kinds": {"web": {"tokens": int(np.sum(lengths + 1)), "windows": len(open_windows(place))}}
        }
        heldout_file(folder, code).parent.mkdir(parents=True, exist_ok=True)
        heldout_file(folder, code).touch()
    (folder / REPORT).write_text(
        json.dumps({"seq_len": seq_len, "tokenizer": {"fingerprint": "none"}, "languages": languages})
    )


def measure(contestants: dict[str, tuple[int, Callable[[int], None]]], rounds: int) -> dict[str, list[float]]:
    """Tokens a second by contestant and round; each is called with the number of the round, once before for
    warmth.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, (tokens, work) in contestants.items():
            start = time.perf_counter()
            work(number)
            if number:
                rates[name].append(tokens / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=100, help="windows of each dataset")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        write_datasets(folder, arguments.windows, arguments.seq_len)
        available = open_prepared(folder).available
        print(f"wrote {sum(available.values()):,} tokens in {time.perf_counter() - start:.1f} s")

        steps = max(1, READS // arguments.batch)
        mixture = make_mixture(available, MixtureSettings(), steps * arguments.batch * arguments.seq_len)
        batches = Batches(folder, mixture, arguments.batch, arguments.seq_len, seed=0)
        ahead = batches.iterate()
        sources = [open_windows(dataset_folder(folder, code, "web")) for code in BABEL]
        own_mix = grain.MapDataset.mix(
            [grain.MapDataset.source(source).shuffle(seed=0).repeat() for source in sources]
        ).batch(arguments.batch)
        one = sources[0]
        order = np.random.default_rng(0).integers(0, len(one), steps * arguments.batch).tolist()
        tokens = steps * arguments.batch * arguments.seq_len

        def read(get: Callable[[int], object]) -> Callable[[int], None]:
            return lambda number: [get(index) for index in order] and None

        rates = measure(
            {
                "Batches[step]": (
                    tokens,
                    lambda number: [batches[number * steps + step] for step in range(steps)] and None,
                ),
                "Batches.iterate": (tokens, lambda number: [next(ahead) for _ in range(steps)] and None),
                "Grain's own mix": (
                    tokens,
                    lambda number: [own_mix[number * steps + step] for step in range(steps)] and None,
                ),
                "one TFDS dataset": (tokens, read(one.__getitem__)),
                "one ArrayRecord file, bytes": (tokens, read(one.data_source.__getitem__)),
            },
            arguments.rounds,
        )
    print(f"{'million tokens/s':<28} {'median':>8} {'least':>8} {'most':>8}")
    for name, each in rates.items():
        print(
            f"{name:<28} {statistics.median(each) / 1e6:>8.1f} {min(each) / 1e6:>8.1f} "
            f"{max(each) / 1e6:>8.1f}"
        )


if __name__ == "__main__":
    main()
