"""A tiny run on disk, on gs:// and on s3:// (servers of the tests, on this machine): seconds, and the
requests and bytes of a checkpoint.

python -m benchmarks.buckets [--hidden 256] [--steps 8]

The servers answer at once, so the seconds are of the clients and of the servers' own work; a real bucket adds
its latency to each request.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from babel_jax.config import Config
from babel_jax.config.file import parse_settings
from babel_jax.data.tokens.sentencepiece_tokenizer import train_sentencepiece
from babel_jax.recipe.recipe import run_recipe
from tests.buckets.gcs_server import GcsServer
from tests.buckets.s3_server import S3Server
from tests.conftest import ARTICLE_1, parallel_rows

KEPT = 2
EVERY = 2


def config_of(out: str, data: str, folder: Path, hidden: int, steps: int) -> Config:
    """A run from random weights, on text of four languages."""
    sources = []
    for language in ("en", "zh", "sw", "ha"):
        path = folder / f"{language}.jsonl"
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in parallel_rows(language)),
            encoding="utf-8",
        )
        sources.append({"language": language, "path": str(path)})
    shape = {
        "vocab_size": 1280,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    stage = {
        "name": "pretraining",
        "result": "base",
        "steps": steps,
        "schedule": {"peak": 1e-3},
        "mixture": {"max_epochs": 1000.0},
    }
    values = {
        "out": out,
        "model": {"shape": shape},
        "data": {
            "folder": data,
            "seq_len": 64,
            "heldout_fraction": 0.1,
            "sources": sources,
            "tokenizer": str(folder / "small.model"),
        },
        "training": {
            "global_batch_size": 4,
            "checkpoint_every": EVERY,
            "keep_checkpoints": KEPT,
            "compilation_cache": False,
        },
        "evaluation": {"batch_size": 4, "max_bytes": 500},
        "stages": [stage],
    }
    return parse_settings(Config, values, "benchmark")


def run(config: Config) -> tuple[float, float, int]:
    """Seconds of the run, those of them spent on checkpoints, and its parameters."""
    start = time.monotonic()
    result = run_recipe(config)
    return time.monotonic() - start, result["goodput"]["checkpoint"], result["parameters"]


def costs(log: list[tuple[str, str, int, int]], steps: int) -> dict[str, Any]:
    """Requests and bytes of a checkpoint, and of all else, from a server's log."""
    requests: Counter[str] = Counter()
    sent = received = other = 0
    for method, path, into, out in log:
        if re.search(r"/checkpoints/\d+|checkpoints%2F|prefix=run/checkpoints", path):
            requests[method] += 1
            received, sent = received + into, sent + out
        else:
            other += 1
    number = steps // EVERY
    return {
        "checkpoints": number,
        "requests_per_checkpoint": {method: round(count / number, 1) for method, count in requests.items()},
        "bytes_written_per_checkpoint": received // number,
        "bytes_read_per_checkpoint": sent // number,
        "other_requests": other,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    os.environ["BABEL_SCRATCH"] = str(folder / "scratch")
    train_sentencepiece(ARTICLE_1.values(), 1200, folder / "small.model")
    gcs, s3 = GcsServer(), S3Server()
    os.environ.update(gcs.environment | s3.environment)
    gcs.reset()
    s3.reset()

    def config(out: str, data: str) -> Config:
        return config_of(out, data, folder, arguments.hidden, arguments.steps)

    run(config(str(folder / "warm"), str(folder / "data")))  # compiles, and prepares the data
    found: dict[str, Any] = {}
    for name, url in (("disk", str(folder)), ("gs", "gs://bucket"), ("s3", "s3://bucket")):
        prepared = config(f"{url}/run", f"{url}/data")
        if name != "disk":
            run(config(f"{url}/first", f"{url}/data"))  # prepares the data there
        gcs.log.clear()
        s3.requests.clear()
        seconds, part, parameters = run(prepared)
        found[name] = {
            "seconds": round(seconds, 2),
            "seconds_of_checkpoints": round(seconds * part, 2),
            "parameters": parameters,
        }
        if name == "gs":
            found[name] |= costs(gcs.log, arguments.steps)
        if name == "s3":
            found[name] |= {"requests": dict(s3.requests)}
    state = sum(
        path.stat().st_size
        for path in (folder / "run" / "checkpoints" / str(arguments.steps)).rglob("*")
        if path.is_file()
    )
    found["disk"]["bytes_of_a_checkpoint"] = state
    print(json.dumps(found, indent=2))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
