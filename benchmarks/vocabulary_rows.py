"""How the rows of new tokens begin, on real weights and with seeds: bits per byte on held-out text, with
paired 95% intervals, at equal compute and at equal bytes.

    python benchmarks/vocabulary_rows.py PARENT LARGER TRAIN HELDOUT OUT [--donor DIR] [--steps 4] [--seeds 2]

LARGER is the output of `babel tokenizer extend PARENT LARGER` with rows by `parts`. TRAIN and HELDOUT have
xx.jsonl for each language. Variants: `parent`; `parts`; `all`; `donor` (rows by --donor); `fit` (a third of
the steps trains the new rows alone); `bytes` (`parts` at the parent's bytes: a quarter of the steps). All
take the same text by seed, 4 windows of 256 tokens a step. Results are kept in OUT; what is there is not
computed again.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from babel_jax.config import OptimizerSettings, RowInit, Trained, TrainingSettings
from babel_jax.config.file import parse_settings
from babel_jax.data.sources.embedded import read_texts
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.evaluation.bits_per_byte import first_bytes, scored_bits, text_to_score
from babel_jax.evaluation.items import BITS, BITS_PER_BYTE, Items, Measured, changes, scores_of
from babel_jax.evaluation.scoring import score
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.training.mesh import global_batch, make_mesh
from babel_jax.training.optimizer import AdamW
from babel_jax.training.step import compiled_step, placed_state, state_shardings
from babel_jax.vocabulary.card import new_rows_of
from babel_jax.vocabulary.editable import open_vocabulary
from babel_jax.vocabulary.extension import NewRow
from babel_jax.vocabulary.growth import Growth, growing, mean_growth
from babel_jax.vocabulary.pursuit import donor_growth, open_donor

WINDOWS, SEQ_LEN, PEAK = 4, 256, 3e-4
FIT_RATE = 10  # times PEAK, for the new rows alone
LONGEST = 2048  # tokens of a scored window
BATCH_TOKENS = 2048
BYTES = {"en": 16_000}  # of held-out text; of other languages OTHER_BYTES
OTHER_BYTES = 1_800
SHORTEST, LONGEST_DOCUMENT = 200, 700  # bytes of a document: many documents make the intervals narrow


def growth_of(parent: Path, larger: Path, init: RowInit, donor: str | None) -> Growth:
    """The growth from the parent to the larger model, with another init of its rows."""
    old, new = open_vocabulary(parent), open_vocabulary(larger)
    rows = []
    for number in new_rows_of(open_folder(larger).hf_config):
        text = new.texts[number]
        rows.append(NewRow(number, text, tuple(token.id for token in old.library.model.tokenize(text)), ""))
    sizes = open_folder(parent).config.vocab_size, open_folder(larger).config.vocab_size
    if init is RowInit.DONOR:
        assert donor is not None
        return donor_growth(old, rows, open_donor(old, donor), *sizes)
    return mean_growth(rows, init, *sizes)


def windows(tokenizer: Tokenizer, texts: dict[str, list[str]], seed: int) -> Iterator[tuple[np.ndarray, int]]:
    """Windows of SEQ_LEN tokens with their bytes of text; the languages take turns."""
    orders = {code: random.Random(f"{seed} {code}").sample(rows, len(rows)) for code, rows in texts.items()}
    streams = {code: iter(rows) for code, rows in orders.items()}
    rest: dict[str, list[int]] = {code: [] for code in texts}
    while True:
        for code, stream in streams.items():
            while len(rest[code]) < SEQ_LEN:
                rest[code] += [*tokenizer.encode(next(stream)), tokenizer.eos_id]
            ids, rest[code] = rest[code][:SEQ_LEN], rest[code][SEQ_LEN:]
            yield np.array(ids, np.int32), len(tokenizer.decode(ids).encode())


class Model:
    """A model in memory: it is trained and scored."""

    def __init__(self, folder: Path):
        self.folder = open_folder(folder)
        self.config, self.tokenizer = self.folder.config, open_tokenizer(folder)
        self.mesh = make_mesh({}, jax.devices()[:1])
        self.new_rows = new_rows_of(self.folder.hf_config)

    def trained(
        self, params: PyTree[Array], texts: dict[str, list[str]], steps: list[tuple[Trained, int]], seed: int
    ) -> tuple[PyTree[Array], int]:
        """The parameters after so many steps of each kind, and the bytes of text that were read."""
        values = {"global_batch_size": WINDOWS, "compute_dtype": "float32"}
        training, settings = parse_settings(TrainingSettings, values, "benchmark"), OptimizerSettings()
        stream, read = windows(self.tokenizer, texts, seed), 0
        for what, count in steps:
            optimizer = AdamW(settings, params, what, new_rows=self.new_rows)
            shardings = state_shardings(self.config, optimizer, self.mesh)
            state = placed_state(optimizer, params, shardings, 1)
            step = compiled_step(self.config, optimizer, settings, training, self.mesh)
            rate = PEAK * (FIT_RATE if what is Trained.NEW_ROWS else 1)
            for _ in range(count):
                batch = [next(stream) for _ in range(WINDOWS)]
                read += sum(size for _, size in batch)
                fields = {
                    "tokens": np.stack([ids for ids, _ in batch]),
                    "segment_ids": np.ones((WINDOWS, SEQ_LEN), np.int32),
                    "language": np.zeros(WINDOWS, np.int32),
                }
                state, metrics = step(state, global_batch(fields, self.mesh), jnp.float32(rate))
                print(f"  loss {float(metrics['loss']):.3f}", flush=True)
            params = state.params
        return params, read

    def scored(self, params: PyTree[Array], texts: dict[str, list[str]]) -> Measured:
        """Bits per byte of each language, document by document."""
        chosen = {}
        for code, documents in texts.items():
            chosen[code] = first_bytes(documents, BYTES.get(code, OTHER_BYTES))
        text = text_to_score(self.tokenizer, chosen, LONGEST)

        def scorer(sequences: Any) -> Any:
            return score(self.config, params, sequences, self.mesh, BATCH_TOKENS)

        return {BITS_PER_BYTE: {code: [items] for code, items in scored_bits(text, scorer).items()}}


def params_of(variant: str, parent: Model, larger: Model, growths: dict[str, Growth]) -> PyTree[Array]:
    """The parameters that a variant begins with."""
    params = load_params(parent.folder, dtype=jnp.float32)
    if variant == "parent":
        return params
    init = variant if variant in growths else str(RowInit.PARTS)
    everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return growing(everywhere)(params, *growths[init].arguments)


def steps_of(variant: str, steps: int) -> list[tuple[Trained, int]]:
    """The steps that a variant trains."""
    if variant == "fit":
        first = max(1, steps // 3)
        return [(Trained.NEW_ROWS, first), (Trained.ALL, steps - first)]
    return [(Trained.ALL, max(1, round(steps / 4)) if variant == "bytes" else steps)]


def as_measured(file: Path) -> Measured:
    """The scored documents of a file of results."""
    columns = json.loads(file.read_text(encoding="utf-8"))["columns"]
    return {
        BITS_PER_BYTE: {code: [Items(np.array(rows, np.float64), BITS)] for code, rows in columns.items()}
    }


def main() -> None:
    """Computes what is missing, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("parent", "larger", "train", "heldout", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--donor")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", default="parent,parts,bytes,fit,all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parent, larger = Model(options.parent), Model(options.larger)
    texts = read_texts(options.train)
    heldout = {}
    for code, documents in read_texts(options.heldout).items():
        sizes = range(SHORTEST, LONGEST_DOCUMENT + 1)
        heldout[code] = [text for text in documents if len(text.encode()) in sizes]
    variants = [*options.variants.split(","), *(["donor"] if options.donor else [])]
    inits = [RowInit.PARTS, *(init for init in (RowInit.ALL, RowInit.DONOR) if init in variants)]
    growths = {str(init): growth_of(options.parent, options.larger, init, options.donor) for init in inits}

    # Before training a variant differs by its init alone.
    runs = [(variant, 0, "untrained") for variant in variants if variant not in ("fit", "bytes")]
    runs += [(variant, seed, "trained") for seed in range(options.seeds) for variant in variants]
    for variant, seed, when in runs:
        file = options.out / f"{variant}-{when}-{seed}.json"
        if file.is_file():
            continue
        print(f"{variant}, seed {seed}, {when}", flush=True)
        model, read = parent if variant == "parent" else larger, 0
        params = params_of(variant, parent, larger, growths)
        if when == "trained":
            params, read = model.trained(params, texts, steps_of(variant, options.steps), seed)
        measured = model.scored(params, heldout)[BITS_PER_BYTE]
        columns = {code: items.columns.tolist() for code, (items,) in measured.items()}
        file.write_text(json.dumps({"bytes": read, "columns": columns}), encoding="utf-8")

    base, codes = as_measured(options.out / "parent-untrained-0.json"), list(heldout)
    print("| variant | seed | bytes read | " + " | ".join(codes) + " | English against the parent |")
    for variant, seed, when in runs:
        file = options.out / f"{variant}-{when}-{seed}.json"
        measured, read = as_measured(file), json.loads(file.read_text(encoding="utf-8"))["bytes"]
        bits = {code: value["score"] for code, value in scores_of(measured)[BITS_PER_BYTE].items()}
        english = changes(BITS_PER_BYTE, measured, base)["en"]
        change = f"{english['difference']:+.2f}% [{english['low']:+.2f}, {english['high']:+.2f}]"
        cells = " | ".join(f"{bits[code]:.3f}" for code in codes)
        print(f"| {variant}, {when} | {seed} | {read:,} | {cells} | {change} (n = {english['n']}) |")


if __name__ == "__main__":
    main()
