"""A larger vocabulary on real weights: tokens per byte on held-out text before and after, and bits per byte
after training, for each way to begin the new rows, at equal bytes read and at equal compute.

    python benchmarks/vocabulary.py MODEL TEXT OUT [--tokens 16000] [--steps 12]
        [--variants parent,parts,parts:bytes,all,fit]

TEXT has xx.jsonl for each language. All variants train on the same mixture of text. `parts` takes as many
steps as the parent: equal compute. `parts:bytes` stops where it has read as many bytes. `fit` trains the
new rows alone first. Results are kept in OUT, and a variant that is there is not run again. The figures of
SmolLM2-135M are in docs/how-to/vocabulary.md: 12 steps took 2 to 10 minutes of a busy 2-core machine.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from babel_jax.config import Marks, RowInit, VocabularySettings
from babel_jax.config.file import parse_settings
from babel_jax.config.run import Config
from babel_jax.data.sources.embedded import corpus_sources
from babel_jax.data.tokens.fertility import fertility
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.model_folders.folder import open_folder
from babel_jax.recipe.recipe import run_recipe
from babel_jax.vocabulary.editable import open_vocabulary
from babel_jax.vocabulary.extension import extend_vocabulary
from babel_jax.vocabulary.folders import extended_model, write_extended
from babel_jax.vocabulary.texts import texts_of

LANGUAGES = ("my", "ta", "bn", "hi", "th")
PROTECTED = ("en",)
SEQ_LEN, BATCH, PEAK = 256, 4, 3e-4
HELDOUT_FRACTION = 0.05
HELDOUT_BYTES, SCORED_BYTES = 20_000, 4_000
ROWS_FIRST = 0.25  # of the steps of `fit` train the new rows alone


def make_models(model: Path, text: Path, out: Path, tokens: int, donor: str | None) -> dict[str, Path]:
    """The folders of the larger models by the init of their rows; the vocabulary is learned once."""
    inits = [RowInit.PARTS, RowInit.ALL, *([RowInit.DONOR] if donor else [])]
    folders = {str(init): out / f"model-{init}" for init in inits}
    if all(folder.is_dir() for folder in folders.values()):
        return folders
    settings = VocabularySettings(
        languages=LANGUAGES, tokens=tokens, protect=PROTECTED, marks=Marks.JOIN, least=2
    )
    folder, vocabulary = open_folder(model), open_vocabulary(model)
    texts = texts_of(
        corpus_sources(text), LANGUAGES, PROTECTED, settings.max_bytes, heldout_fraction=HELDOUT_FRACTION
    )
    extension = extend_vocabulary(vocabulary, texts, settings)
    for init in inits:
        if not folders[str(init)].is_dir():
            changed = settings.model_copy(
                update={"init": init, "donor": donor if init is RowInit.DONOR else None}
            )
            extended = extended_model(folder, vocabulary, dataclasses.replace(extension, settings=changed))
            write_extended(folder, folders[str(init)], extended)
    return folders


def run(
    name: str, model: Path, text: Path, out: Path, steps: int, seed: int, rows_first: bool
) -> dict[str, Any]:
    """Bits per byte of a model before and after training, with the bytes of text that it read."""
    result_file = out / f"{name}-{steps}-{seed}.json"
    if result_file.is_file():
        result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        return result
    schedule = {"kind": "wsd", "peak": PEAK, "warmup_fraction": 0.1, "decay_fraction": 0.3}
    mixture = {"strategy": "temperature", "max_epochs": 1000.0}
    first = max(1, round(ROWS_FIRST * steps)) if rows_first else 0
    stages: list[dict[str, Any]] = []
    if first:
        constant = {"kind": "constant", "peak": 10 * PEAK}
        stages.append(
            {"name": "rows", "steps": first, "train": "new_rows", "schedule": constant, "mixture": mixture}
        )
    stages.append({"name": "all", "steps": steps - first, "schedule": schedule, "mixture": mixture})
    tokenizer = open_tokenizer(model).fingerprint[:12]
    sources = [source.model_dump(mode="json", exclude_none=True) for source in corpus_sources(text)]
    values = {
        "out": str(out / f"run-{name}-{steps}-{seed}"),
        "seed": seed,
        "model": {"folder": str(model)},
        "data": {
            "folder": str(out / f"data-{tokenizer}"),
            "seq_len": SEQ_LEN,
            "heldout_fraction": HELDOUT_FRACTION,
            "heldout_bytes": HELDOUT_BYTES,
            "sources": sources,
        },
        "training": {"global_batch_size": BATCH, "compute_dtype": "float32", "checkpoint_every": 10_000},
        "evaluation": {"batch_size": 4, "max_bytes": SCORED_BYTES},
        "stages": stages,
    }
    config = parse_settings(Config, values, "benchmark")
    summary = run_recipe(config)
    result = {"bits_per_byte": summary["bits_per_byte"], "bytes": bytes_read(config), "steps": steps}
    result_file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def bytes_read(config: Config) -> float:
    """The bytes of text in all windows that a finished run read, by the bytes of a token in each language."""
    prepared = open_prepared(config.data.folder)
    lines = (Path(config.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    total = 0.0
    for code, tokens in json.loads(lines[-1])["tokens_by_language"].items():
        kinds = prepared.report["languages"][code]["kinds"].values()
        total += tokens * sum(kind["bytes"] for kind in kinds) / sum(kind["tokens"] for kind in kinds)
    return total


def tokens_per_byte(model: Path, text: Path) -> dict[str, float]:
    """By language, on the text of a folder."""
    sources = corpus_sources(text)
    texts = texts_of(sources, [source.language for source in sources], (), 10**9)
    return {code: sizes.tokens_per_byte for code, sizes in fertility(open_tokenizer(model), texts).items()}


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="folder of xx.jsonl to learn and train on")
    parser.add_argument("out", type=Path)
    parser.add_argument("--heldout", type=Path, help="folder of xx.jsonl for tokens per byte")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--donor")
    parser.add_argument("--variants", default="parent,parts,parts:bytes,all,fit")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folders = make_models(options.model, options.text, options.out, options.tokens, options.donor)
    before, after = (
        tokens_per_byte(folder, options.heldout or options.text)
        for folder in (options.model, folders["parts"])
    )
    print("| language | tokens per byte before | after | times fewer |\n| --- | ---: | ---: | ---: |")
    for code, value in before.items():
        print(f"| {code} | {value:.3f} | {after[code]:.3f} | {value / after[code]:.2f} |")

    print("\n| variant | seed | bytes read | " + " | ".join(before) + " |")
    for seed in range(options.seeds):
        for variant in options.variants.split(","):
            init, _, budget = variant.partition(":")
            folder = {**folders, "parent": options.model, "fit": folders["parts"]}[init]
            steps = options.steps
            if budget == "bytes":
                parent = run("parent", options.model, options.text, options.out, options.steps, seed, False)
                whole = run(init, folder, options.text, options.out, options.steps, seed, init == "fit")
                steps = max(1, round(options.steps * parent["bytes"] / whole["bytes"]))
            result = run(init, folder, options.text, options.out, steps, seed, init == "fit")
            for point in ("base", "all"):
                bits = result["bits_per_byte"][point]
                cells = " | ".join(f"{bits[code]:.3f}" for code in before)
                size = 0 if point == "base" else result["bytes"]
                print(f"| {variant} {point} ({steps} steps) | {seed} | {size:,.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
