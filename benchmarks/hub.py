"""Requests and bytes of `babel prepare` on data sets of the hub: 10 shards in each of 25 languages.

python -m benchmarks.hub [--shards 10] [--languages 25] [--by path|name] [--busy 25] [--code FOLDER]

The hub is that of the tests, on this machine: it counts, and its seconds say nothing about the real one. --by
path names the files (hf://datasets/...), --by name the data set and a configuration. --busy answers so many
requests with 429. --code is a checkout of another version to measure in place of this one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from babel_jax.data.tokens.sentencepiece_tokenizer import train_sentencepiece
from babel_jax.languages import BABEL
from tests.conftest import ARTICLE_1
from tests.hub.corpora import encoded
from tests.hub.stand_in import StandInHub

ROWS = 40
REPO = "bench/web"


def put_text(hub: StandInHub, languages: list[str], shards: int) -> None:
    """A data set of Parquet files, with a configuration for each language."""
    files: dict[str, bytes | str] = {}
    configs = []
    for language in languages:
        words = ARTICLE_1.get(language, ARTICLE_1["en"]).split()
        for shard in range(shards):
            rows = []
            for number in range(ROWS):
                start = (7 * shard + number) % len(words)
                text = " ".join([language, str(shard), str(number), *words[start:], *words[:start]])
                rows.append({"id": f"{shard}-{number}", "text": text})
            path = f"data/{language}/train/{shard:03}.parquet"
            files[path] = encoded(path, rows)
        configs.append(f"- config_name: {language}\n  data_files: data/{language}/train/*.parquet\n")
    files["README.md"] = f"---\nconfigs:\n{''.join(configs)}---\n"
    hub.put(REPO, files, kind="datasets")


def config_of(folder: Path, languages: list[str], by: str) -> str:
    """A config whose sources are on the hub."""
    train_sentencepiece(ARTICLE_1.values(), 800, folder / "small.model")
    lines = [
        f'out = "{folder}/run"',
        "[model.shape]",
        "vocab_size = 800",
        "hidden_size = 32",
        "intermediate_size = 48",
        "num_hidden_layers = 2",
        "num_attention_heads = 4",
        "[data]",
        f'folder = "{folder}/data"',
        f'tokenizer = "{folder}/small.model"',
        "seq_len = 128",
    ]
    for language in languages:
        lines += ["[[data.sources]]", f'language = "{language}"']
        if by == "path":
            lines.append(f'path = "hf://datasets/{REPO}/data/{language}/train/*.parquet"')
        else:
            lines += [f'huggingface = "{REPO}"', f'huggingface_config = "{language}"']
    return "\n".join(lines) + "\n"


def prepare(hub: StandInHub, folder: Path, code: Path) -> tuple[float, int]:
    """Seconds and exit status of one call of the command."""
    changed = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "BABEL_SCRATCH": str(folder / "scratch"),
        "PYTHONPATH": str(code),
    }
    command = [sys.executable, "-m", "babel_jax.cli", "prepare", str(folder / "a.toml"), "--json"]
    begun = time.monotonic()
    done = subprocess.run(
        command, cwd=code, env=os.environ | changed, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    return time.monotonic() - begun, done.returncode


def counts(hub: StandInHub) -> dict[str, Any]:
    """Requests by kind, and bytes."""
    kinds = Counter[str]()
    for request in hub.requests:
        if request.host == "storage":
            kinds["storage"] += 1
        elif "/resolve" in request.path:
            kinds["resolve"] += 1
        else:
            kinds["api"] += 1
    return {
        **kinds,
        "requests to the hub": kinds["api"] + kinds["resolve"],
        "429": hub.count(status=429),
        "bytes": sum(request.sent for request in hub.requests),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--languages", type=int, default=25)
    parser.add_argument("--by", choices=["path", "name"], default="path")
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--code", type=Path, default=Path(__file__).parents[1])
    options = parser.parse_args()
    languages = list(BABEL)[: options.languages]
    hub = StandInHub()
    put_text(hub, languages, options.shards)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "a.toml").write_text(config_of(folder, languages, options.by))
        stored = sum(map(len, hub.repos["datasets", REPO].files("main").values()))
        print(json.dumps({"languages": len(languages), "shards": options.shards, "bytes on the hub": stored}))
        for number in range(options.busy):
            path = f"*/{languages[number % len(languages)]}/train/*"
            hub.fail(path, status=429, headers={"Retry-After": "0"})
        for call in ("first", "again"):
            hub.requests.clear()
            seconds, status = prepare(hub, folder, options.code.absolute())
            print(json.dumps({"call": call, "status": status, "seconds": round(seconds, 1), **counts(hub)}))
    hub.close()


if __name__ == "__main__":
    main()
