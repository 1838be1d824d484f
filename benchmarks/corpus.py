"""Documents a second of the steps from raw text to packed windows, beside peers; workers; memory and cost as
documents grow.

    python benchmarks/corpus.py peers [--documents 10000] [--rounds 3] [--tokenizer FOLDER]
    python benchmarks/corpus.py workers [--documents 20000]
    python benchmarks/corpus.py scale [--sizes 100000,1000000]

Documents of about 1,000 characters in the 25 languages, made of words of the package's own text, one in ten a
copy with a few letters changed. Rates of `peers` are per core: documents by second of processor time of all
threads, which other work on the machine hardly changes. Peers: datasketch 2 (its candidates as they are) and
gaoya 0.2, for near-duplicates by the same shingles, bands and rows; rensa fed with shingles as strings; and
`datasets.map` with the same tokenizer, batched, into Arrow files (tokens alone, not packed).
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from babel_jax.config import CleaningSettings, DataSettings, DeduplicationSettings, Engine, Rule, Source
from babel_jax.data.refining.cleaning import Cleaner
from babel_jax.data.refining.deduplication import band_keys, components, digests, links_in_band, signatures
from babel_jax.data.refining.engines import open_workers
from babel_jax.data.refining.identification import language_probabilities
from babel_jax.data.refining.refinement import refine
from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.data.windows.packing import pack
from babel_jax.data.windows.storage import write_windows

CHARACTERS = 1_000
SETTINGS = DeduplicationSettings()


def documents(number: int, characters: int = CHARACTERS, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(language, text), the languages in turn."""
    draw = random.Random(seed)
    words = {
        code: [word for row in rows for word in row.text.split()] for code, rows in embedded_corpus().items()
    }
    mean = {code: sum(map(len, own)) / len(own) + 1 for code, own in words.items()}
    last: dict[str, str] = {}
    for count in range(number):
        code = list(words)[count % len(words)]
        if code in last and draw.random() < 0.1:
            text = list(last[code])
            for place in draw.sample(range(len(text)), 5):
                text[place] = draw.choice(text)
            yield code, "".join(text)
            continue
        text_words = draw.choices(words[code], k=max(1, round(characters / mean[code])))
        last[code] = "\n".join(" ".join(text_words[at : at + 12]) for at in range(0, len(text_words), 12))
        yield code, last[code]


def shingles(text: str) -> set[str]:
    folded = " ".join(text.casefold().split()).ljust(SETTINGS.shingle)
    return {folded[place : place + SETTINGS.shingle] for place in range(len(folded) - SETTINGS.shingle + 1)}


def ours(texts: list[str]) -> int:
    """How many of the texts have an earlier one like them, as all the others here."""
    signature = np.concatenate(
        [signatures(texts[at : at + 1000], SETTINGS) for at in range(0, len(texts), 1000)]
    )
    keys = band_keys(digests(texts), signature, SETTINGS)
    links = []
    for band in range(1, len(keys)):
        order = np.argsort(keys[band], kind="stable")

        def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            return (signature[one] == signature[other]).mean(1) >= SETTINGS.similarity

        links.append(links_in_band(keys[band][order], order, alike))
    linked, component = components(np.concatenate(links))
    return len(linked) - len(np.unique(component))


def datasketch(texts: list[str]) -> int:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=SETTINGS.bands * SETTINGS.rows, params=(SETTINGS.bands, SETTINGS.rows))
    found = 0
    for number, text in enumerate(texts):
        hashed = MinHash(num_perm=SETTINGS.bands * SETTINGS.rows)
        hashed.update_batch([shingle.encode() for shingle in shingles(text)])
        found += bool(index.query(hashed))
        index.insert(str(number), hashed)
    return found


def gaoya(texts: list[str]) -> int:
    from gaoya.minhash import MinHashStringIndex

    index = MinHashStringIndex(
        hash_size=32,
        jaccard_threshold=SETTINGS.similarity,
        num_bands=SETTINGS.bands,
        band_size=SETTINGS.rows,
        analyzer="char",
        lowercase=True,
        ngram_range=(SETTINGS.shingle, SETTINGS.shingle),
    )
    index.par_bulk_insert_docs(list(range(len(texts))), texts)
    return sum(min(found) < number for number, found in enumerate(index.par_bulk_query(texts)) if found)


def rensa_alone(texts: list[str]) -> int:
    from rensa import RMinHash, RMinHashLSH

    values = SETTINGS.bands * SETTINGS.rows
    matrix = RMinHash.digest_matrix_from_token_sets([list(shingles(text)) for text in texts], values, 42)
    index = RMinHashLSH(SETTINGS.similarity, values, SETTINGS.bands)
    # It flags both documents of a pair, so that it says about twice as many.
    return sum(index.insert_matrix_and_query_duplicate_flags(matrix, 0))


def measure(
    contestants: dict[str, Callable[[], Any]], number: int, rounds: int
) -> dict[str, tuple[float, Any]]:
    """Documents by second of processor time, the median of rounds in alternation, and what each gives."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    given: dict[str, Any] = {}
    for _ in range(rounds):
        for name, work in contestants.items():
            start = time.process_time()
            given[name] = work()
            rates[name].append(number / (time.process_time() - start))
    return {name: (statistics.median(found), given[name]) for name, found in rates.items()}


def peers(options: argparse.Namespace) -> None:
    rows = list(documents(options.documents))
    texts = [text for _, text in rows]
    mean = sum(len(text.encode()) for text in texts) / len(texts)
    print(
        f"{len(texts)} documents, {sum(map(len, texts)) / len(texts):.0f} characters or {mean:.0f} bytes "
        "each\n"
    )

    cleaners = {code: Cleaner(CleaningSettings(), code) for code in dict.fromkeys(code for code, _ in rows)}
    without = {code: Cleaner(CleaningSettings(off=(Rule.LANGUAGE,)), code) for code in cleaners}
    fresh = lambda: ["".join(text) for text in texts]  # noqa: E731 - new strings, whose UTF-8 no library has kept
    steps = {
        "clean, all rules": lambda: [cleaners[code](text)[1] for code, text in rows],
        "clean, without language": lambda: [without[code](text)[1] for code, text in rows],
        "language alone": lambda: [language_probabilities(text) for text in texts],
        "sign (MinHash)": lambda: [
            signatures(texts[at : at + 1000], SETTINGS) for at in range(0, len(texts), 1000)
        ],
    }
    _table("step", measure(steps, len(texts), options.rounds), show=False)
    few = texts[: max(1000, len(texts) // 5)]
    near = {"babel": lambda: ours(fresh()[: len(few)]), "rensa, string shingles": lambda: rensa_alone(few)}
    near |= {"gaoya": lambda: gaoya(few), "datasketch": lambda: datasketch(few)}
    _table("near-duplicates (found)", measure(near, len(few), options.rounds))

    if options.tokenizer:
        tokenizer = open_tokenizer(options.tokenizer)
        packing = {
            "babel: tokenize, pack, write": lambda: _pack(tokenizer, texts),
            "datasets.map: tokenize, write": lambda: _map(options.tokenizer, texts),
        }
        _table("tokens", measure(packing, len(texts), options.rounds))


def _pack(tokenizer: Any, texts: list[str]) -> int:
    counted = 0

    def encoded() -> Iterator[list[int]]:
        nonlocal counted
        for at in range(0, len(texts), 1000):
            for ids in tokenizer.encode_batch(texts[at : at + 1000]):
                counted += len(ids)
                yield ids

    with tempfile.TemporaryDirectory() as folder:
        write_windows(Path(folder), "en-web", pack(encoded(), 4096, tokenizer.eos_id), 4096)
    return counted


def _map(path: str, texts: list[str]) -> int:
    import datasets
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    datasets.disable_progress_bars()

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {
            "input_ids": [
                encoding.ids
                for encoding in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
            ]
        }

    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.Dataset.from_dict({"text": texts})
        mapped = rows.map(
            tokenize,
            batched=True,
            remove_columns="text",
            cache_file_name=f"{folder}/mapped.arrow",
            load_from_cache_file=False,
        )
        return sum(len(ids) for batch in mapped.with_format("numpy").iter(1000) for ids in batch["input_ids"])


def _table(title: str, measured: dict[str, tuple[float, Any]], show: bool = True) -> None:
    first = next(iter(measured.values()))[0]
    print(f"{title:<34} {'documents/s/core':>17} {'first/this':>11}")
    for name, (rate, given) in measured.items():
        print(f"{name:<34} {rate:>17,.0f} {first / rate:>11.2f}" + (f"   {given:,}" if show else ""))
    print()


def write_files(folder: Path, number: int, files: int, characters: int = CHARACTERS) -> tuple[Source, ...]:
    """Swahili-labelled files of such documents, `files` of them."""
    folder.mkdir(parents=True)
    for file in range(files):
        with open(folder / f"{file:04d}.jsonl", "w", encoding="utf-8") as lines:
            for row, (_, text) in enumerate(documents(number // files, characters, seed=file)):
                lines.write(json.dumps({"id": f"{file}-{row}", "text": text}, ensure_ascii=False) + "\n")
    return (Source(language="sw", path=str(folder / "*.jsonl"), name="made"),)


def workers(options: argparse.Namespace) -> None:
    """Wall-clock seconds of cleaning and deduplication by one and by two processes, in alternation."""
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as place:
        sources = write_files(Path(place) / "in", options.documents, files=8)
        for attempt in range(options.rounds):
            for number in found:
                cleaning = CleaningSettings(off=(Rule.LANGUAGE,))
                settings = DataSettings(
                    folder=f"{place}/{attempt}-{number}",
                    cleaning=cleaning,
                    deduplication=SETTINGS,
                    workers=number,
                    sources=sources,
                )
                with open_workers(Engine.LOCAL, number) as opened:
                    start = time.perf_counter()
                    refine(settings, ["sw"], opened)
                    found[number].append(time.perf_counter() - start)
    one, two = (statistics.median(found[number]) for number in (1, 2))
    print(
        f"{options.documents} documents: 1 worker {one:.1f} s, 2 workers {two:.1f} s, {one / two:.2f} times "
        "as fast (with their start)"
    )


def scale(options: argparse.Namespace) -> None:
    """Peak memory, processor seconds and disk by number of documents, each in its own process; and what a
    trillion tokens would take.
    """
    seconds = []
    for size in options.sizes:
        command = [
            sys.executable,
            __file__,
            "one",
            "--documents",
            str(size),
            "--characters",
            str(options.characters),
        ]
        result = json.loads(
            subprocess.run(
                [*command, *options.extra], check=True, capture_output=True, text=True
            ).stdout.splitlines()[-1]
        )
        seconds.append((size, result["seconds"], result["bytes"], result["disk"]))
        print(
            f"{size:>10,} documents: peak {result['mib']:,.0f} MiB, {result['seconds']:,.1f} processor "
            "seconds, "
            f"{result['bytes'] / 2**20:,.0f} MiB of text, {result['disk'] / 2**20:,.0f} MiB of shards and "
            "sketches at the most",
            flush=True,
        )
    sizes = np.array([text for _, _, text, _ in seconds], float)
    (slope, _), residual, *_ = np.linalg.lstsq(
        np.stack([sizes, np.ones_like(sizes)], 1), np.array([took for _, took, _, _ in seconds])
    )
    disk = seconds[-1][3] / seconds[-1][2]
    trillion = 1e12 * options.bytes_a_token
    print(
        f"for 10^12 tokens of {options.bytes_a_token} bytes: {slope * trillion / 3600:,.0f} core-hours, "
        f"{disk * trillion / 1e12:,.1f} TB (linear fit, residual "
        f"{float(residual[0]) if len(residual) else 0:.2g} s^2)"
    )


def one(options: argparse.Namespace) -> None:
    """Cleans (where asked) and deduplicates so many documents, and prints what it took as JSON."""
    with tempfile.TemporaryDirectory() as place:
        command = [
            sys.executable,
            __file__,
            "write",
            "--documents",
            str(options.documents),
            "--characters",
            str(options.characters),
        ]
        subprocess.run([*command, "--out", f"{place}/in"], check=True)
        source = Source(language="sw", path=f"{place}/in/*.jsonl", name="made")
        cleaning = CleaningSettings(off=(Rule.LANGUAGE,)) if options.clean else None
        settings = DataSettings(
            folder=f"{place}/data",
            cleaning=cleaning,
            deduplication=SETTINGS.model_copy(update={"bucket_documents": options.bucket}),
            shard_documents=options.shard,
            sources=(source,),
        )
        most = 0

        class Watched:
            def run(self, function: Any, tasks: Any) -> Iterator[Any]:
                nonlocal most
                for task in tasks:
                    yield task, function(task)
                most = max(
                    most,
                    sum(path.stat().st_size for path in Path(settings.folder).rglob("*") if path.is_file()),
                )

        start = time.process_time()
        refine(settings, ["sw"], Watched())
        taken = time.process_time() - start
        size = sum(path.stat().st_size for path in (Path(place) / "in").iterdir())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps({"seconds": taken, "bytes": size, "disk": most, "mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["peers", "workers", "scale", "one", "write"])
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--characters", type=int, default=CHARACTERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", help="folder with tokenizer.json and its configs")
    parser.add_argument(
        "--sizes",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[100_000, 300_000, 1_000_000],
    )
    parser.add_argument("--bytes-a-token", type=float, default=4.0)
    parser.add_argument("--bucket", type=int, default=50_000, help="documents of a pairing task")
    parser.add_argument("--shard", type=int, default=20_000, help="documents of a shard")
    parser.add_argument("--clean", action="store_true")
    parser.add_argument("--out")
    options = parser.parse_args()
    options.extra = [
        "--bucket",
        str(options.bucket),
        "--shard",
        str(options.shard),
        *(["--clean"] if options.clean else []),
    ]
    if options.what == "write":
        write_files(
            Path(options.out), options.documents, max(1, options.documents // 50_000), options.characters
        )
    else:
        {"peers": peers, "workers": workers, "scale": scale, "one": one}[options.what](options)


if __name__ == "__main__":
    main()
