"""Cleaning and deduplication as stages of `prepare`: what is dropped, counted, recorded and resumed, by any
number of workers.
"""

import gzip
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from babel_jax.config import (
    BadRows,
    CleaningSettings,
    DataSettings,
    DecontaminationSettings,
    DeduplicationSettings,
    Engine,
    Rule,
    Source,
)
from babel_jax.data.refining import cleaned_parts, refinement
from babel_jax.data.refining.decontamination import EvaluationText
from babel_jax.data.refining.deduplication import digests
from babel_jax.data.refining.engines import open_workers
from babel_jax.data.refining.refinement import refined_rows
from babel_jax.data.sources import records, streams
from babel_jax.data.sources import rows as rows_module
from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.data.sources.rows import MAX_LOCATED
from babel_jax.data.windows import prepare as prepare_module
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.errors import BadInput

PROSE = {language: [row.text for row in rows] for language, rows in embedded_corpus().items()}
LOOSE = CleaningSettings(min_characters=20, off=(Rule.REPETITION, Rule.WORDS))


def varied(language, number, seed=0):
    """Texts of two passages each, all different."""
    pairs = list(itertools.permutations(PROSE[language], 2))
    return ["\n".join(pair) for pair in random.Random(seed).sample(pairs, number)]


@pytest.fixture
def corpus(tmp_path, write_rows):
    """Two Swahili sources and a Thai one, with what each rule and each kind of duplicate is for; and the
    settings to prepare them.
    """
    texts = varied("sw", 30)
    crawl = [{"id": f"crawl-{number}", "text": text} for number, text in enumerate(texts[:20])]
    crawl += [
        {"id": "short", "text": "Habari."},
        {"id": "foreign", "text": PROSE["it"][0]},
        {"id": "numbers", "text": "1234567890 " * 20 + "tu"},
        {"id": "again", "text": texts[0]},
        {"id": "mail", "text": texts[20] + "\nAndika kwa mtu@example.org au +255 22 211 1234"},
    ]
    books = [
        {"id": f"book-{number}", "text": text, "kind": "textbook"} for number, text in enumerate(texts[21:28])
    ]
    books += [
        {"id": "near", "kind": "textbook", "text": texts[1].replace("a", "e", 2)},
        {"id": "crawled", "text": texts[2]},
    ]
    thai = [{"id": f"th-{number}", "text": text} for number, text in enumerate(varied("th", 8))]
    return DataSettings(
        folder=str(tmp_path / "data"),
        seq_len=64,
        heldout_fraction=0.1,
        cleaning=LOOSE.model_copy(update={"keep_dropped": True}),
        deduplication=DeduplicationSettings(),
        sources=(
            Source(
                language="sw",
                path=str(write_rows(tmp_path / "in" / "crawl.jsonl", crawl)),
                name="crawl",
                licence="CC0-1.0",
            ),
            Source(
                language="sw",
                path=str(write_rows(tmp_path / "in" / "books.jsonl", books)),
                name="books",
                weight=2.0,
            ),
            Source(language="th", path=str(write_rows(tmp_path / "in" / "th.jsonl", thai))),
        ),
    )


def ids(settings, language="sw"):
    return [row.id for row in refined_rows(settings, language)]


def lines_of(path):
    return [json.loads(line) for line in zstandard.open(path, "rt", encoding="utf-8")]


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_what_is_dropped_is_counted_and_kept_aside(corpus, small_model):
    report = prepare(corpus, small_model)
    crawl, books = (report["languages"]["sw"]["cleaning"][name] for name in ("crawl", "books"))
    assert crawl["dropped"] == {"characters": 1, "digits": 1, "language": 1}
    assert crawl["masked"] == {"email": 1, "phone": 1}
    assert crawl["duplicates"] == {"exact": 2, "near": 1}
    assert (crawl["licence"], crawl["documents"], crawl["kept"]) == ("CC0-1.0", 25, 19)
    assert books["dropped"] == {}
    assert books["duplicates"] == {"exact": 0, "near": 0}
    assert report["languages"]["sw"]["duplicates"] == 3
    dropped = lines_of(Path(corpus.folder) / "dropped" / "sw" / "000-00000.jsonl.zst")
    assert {line["id"]: line["reason"] for line in dropped} == {
        "short": "characters",
        "foreign": "language",
        "numbers": "digits",
    }
    assert all(line["text"] and line["source"] == "crawl" for line in dropped)
    # The beginning of each dropped document is an example; these rules drop one each.
    texts = {line["reason"]: [line["text"][:240]] for line in dropped}
    assert crawl["examples"] == texts
    assert books["examples"] == {}
    # The heavier source's copy stays, and of one source's the first.
    removed = {
        line["id"]: (line["reason"], line["kept_id"], line["kept_source"])
        for line in lines_of(Path(corpus.folder) / "duplicates" / "sw.jsonl.zst")
    }
    assert removed == {
        "crawl-1": ("near", "near", "books"),
        "crawl-2": ("exact", "crawled", "books"),
        "again": ("exact", "crawl-0", "crawl"),
    }
    assert set(ids(corpus)) == {f"crawl-{number}" for number in range(20) if number not in (1, 2)} | {
        "mail"
    } | {f"book-{number}" for number in range(7)} | {"near", "crawled"}
    counts = report["languages"]["sw"]
    trained = sum(kind["documents"] for kind in counts["kinds"].values())
    assert trained + counts["heldout_documents"] + counts["reserved"] == crawl["kept"] + books["kept"]
    text = next(row.text for row in refined_rows(corpus, "sw") if row.id == "mail")
    assert text.endswith("Andika kwa [email] au [phone]")
    assert not list(Path(corpus.folder).rglob("*.partial"))
    assert not (Path(corpus.folder) / "links" / "sw").exists()


def test_rules_that_are_off_for_one_source(corpus, small_model):
    crawl, *others = corpus.sources
    sources = (crawl.model_copy(update={"off": (Rule.DIGITS, Rule.LETTERS, Rule.LANGUAGE)}), *others)
    report = prepare(corpus.model_copy(update={"sources": sources}), small_model)
    assert report["languages"]["sw"]["cleaning"]["crawl"]["dropped"] == {"characters": 1}
    foreign = {"text": PROSE["it"][0], "kind": "textbook"}
    Path(crawl.path).write_text(
        "".join(json.dumps({**foreign, "kind": kind}) + "\n" for kind in ("web", "textbook"))
    )
    split = [crawl.model_copy(update={"name": kind, "where": {"kind": kind}}) for kind in ("web", "textbook")]
    sources = (split[0], split[1].model_copy(update={"off": (Rule.LANGUAGE,)}), *others)
    report = prepare(
        corpus.model_copy(update={"sources": sources, "folder": corpus.folder + "2"}), small_model
    )
    dropped = {name: found["dropped"] for name, found in report["languages"]["sw"]["cleaning"].items()}
    assert dropped == {"web": {"language": 1}, "textbook": {}, "books": {}}


def test_the_higher_score_stays_then_the_longer(tmp_path, small_model, write_rows):
    texts = varied("sw", 6)
    rows = [{"id": f"r{number}", "text": text} for number, text in enumerate(texts)]
    rows += [
        {"id": "scored", "text": texts[0], "score": 0.7},
        {"id": "better", "text": texts[0], "score": 0.9},
    ]
    rows += [{"id": "longer", "text": texts[1] + " Ndiyo."}]
    path = write_rows(tmp_path / "sw.jsonl", rows)
    settings = DataSettings(
        folder=str(tmp_path / "data"),
        seq_len=64,
        deduplication=DeduplicationSettings(),
        sources=(Source(language="sw", path=str(path)),),
    )
    prepare(settings, small_model)
    assert ids(settings) == ["r2", "r3", "r4", "r5", "better", "longer"]


def test_near_duplicates_can_stay(corpus, small_model):
    settings = corpus.model_copy(update={"deduplication": DeduplicationSettings(near=False)})
    report = prepare(settings, small_model)
    assert report["languages"]["sw"]["cleaning"]["crawl"]["duplicates"] == {"exact": 2, "near": 0}
    assert {"crawl-1", "near"} <= set(ids(settings))


def test_recall_and_precision_against_brute_force(tmp_path, small_model, write_rows):
    """Documents with planted copies at all similarities; what is removed must be what comparing every pair
    says, but near the threshold.
    """
    draw = random.Random(5)
    originals = [text for language in ("sw", "ha", "tl", "id") for text in varied(language, 25, seed=3)]
    texts = list(originals)
    for text in originals[:80]:
        words = text.split(" ")
        for place in draw.sample(range(len(words)), round(draw.random() * 0.12 * len(words))):
            words[place] = draw.choice(words)
        texts.append(" ".join(words))
    draw.shuffle(texts)

    def shingles(text):
        folded = " ".join(text.casefold().split())
        return {folded[place : place + 5] for place in range(len(folded) - 4)}

    sets = [shingles(text) for text in texts]
    pairs = {
        (one, other): len(sets[one] & sets[other]) / len(sets[one] | sets[other])
        for one, other in itertools.combinations(range(len(texts)), 2)
    }
    path = write_rows(
        tmp_path / "sw.jsonl", [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    )
    settings = DataSettings(
        folder=str(tmp_path / "data"),
        seq_len=64,
        deduplication=DeduplicationSettings(),
        sources=(Source(language="sw", path=str(path)),),
    )
    prepare(settings, small_model)
    found = {
        (int(line["id"]), int(line["kept_id"]))
        for line in lines_of(tmp_path / "data" / "duplicates" / "sw.jsonl.zst")
    }
    removed = {one for one, _ in found}
    certain = {pair for pair, similarity in pairs.items() if similarity >= 0.88}
    assert len(certain) > 20
    assert all(set(pair) & removed for pair in certain)
    assert all(pairs[min(pair), max(pair)] > 0.68 for pair in found)
    true = {pair for pair, similarity in pairs.items() if similarity >= 0.8}
    right = sum((min(pair), max(pair)) in true for pair in found)
    assert right >= 0.85 * len(found)
    assert sum(bool(set(pair) & removed) for pair in true) >= 0.93 * len(true)


def test_a_name_in_latin_letters_is_no_evaluation_item(tmp_path):
    (tmp_path / "items.txt").write_text(f"{PROSE['en'][0]}\n\n{PROSE['zh'][0]}\n", encoding="utf-8")
    evaluation = EvaluationText(DecontaminationSettings(paths=(str(tmp_path / "items.txt"),)))
    for language in ("zh", "en"):
        assert evaluation.file_of(f"名字：{PROSE['en'][0][:40]}。", language) is None
        assert evaluation.file_of(f"名字：{PROSE['en'][0][:80]}。", language) == str(tmp_path / "items.txt")
    assert evaluation.file_of(f"名字：{PROSE['zh'][0][:30]}。", "zh") == str(tmp_path / "items.txt")


def test_evaluation_items_are_removed(tmp_path, small_model, write_rows):
    items = [{"question": PROSE["sw"][0], "choices": ["ndiyo", PROSE["sw"][1]], "answer": 1}]
    flores = tmp_path / "flores.txt"
    flores.write_text(PROSE["zh"][0] + "\n\n" + PROSE["zh"][1] + "\n", encoding="utf-8")
    clean = {language: PROSE[language][4:16] for language in ("sw", "zh")}
    rows = {
        "sw": [
            *clean["sw"],
            "Utangulizi wa jambo. " + PROSE["sw"][1].upper().replace(" ", "  ") + " Mwisho.",
            PROSE["sw"][0][:20],
        ],
        "zh": [*clean["zh"], "前言。" + PROSE["zh"][0][5:45] + "。后记。"],
    }
    settings = DataSettings(
        folder=str(tmp_path / "data"),
        seq_len=64,
        decontamination=DecontaminationSettings(
            paths=(str(write_rows(tmp_path / "mmlu.jsonl", items)), str(flores))
        ),
        sources=tuple(
            Source(
                language=code,
                path=str(write_rows(tmp_path / f"{code}.jsonl", [{"text": text} for text in texts])),
                name=code,
            )
            for code, texts in rows.items()
        ),
    )
    report = prepare(settings, small_model)["languages"]
    assert report["sw"]["cleaning"]["sw"]["evaluation"] == {str(tmp_path / "mmlu.jsonl"): 1}
    assert report["zh"]["cleaning"]["zh"]["evaluation"] == {str(flores): 1}
    assert report["zh"]["cleaning"]["zh"]["dropped"] == {"evaluation": 1}
    assert [row.text for row in refined_rows(settings, "sw")] == [*clean["sw"], PROSE["sw"][0][:20]]
    empty = tmp_path / "short.txt"
    empty.write_text("ab\n")
    with pytest.raises(BadInput, match=r"short.txt: no text of 50 letters or more \(20 in"):
        prepare(
            settings.model_copy(
                update={
                    "folder": str(tmp_path / "other"),
                    "decontamination": DecontaminationSettings(paths=(str(empty),)),
                }
            ),
            small_model,
        )


# --- workers and restarts ---------------------------------------------------------------------------------


def test_the_same_bytes_from_one_and_from_two_workers(corpus, small_model, tmp_path):
    one = corpus.model_copy(update={"shard_documents": 7})
    two = one.model_copy(update={"folder": str(tmp_path / "two"), "workers": 2})
    assert prepare(one, small_model) == prepare(two, small_model)
    assert files_of(one.folder) == files_of(two.folder)
    assert len(list((Path(one.folder) / "cleaned" / "sw").glob("*.parquet"))) > 3


def test_shards_and_buckets_make_no_difference_to_what_is_removed(corpus, small_model, tmp_path):
    prepare(corpus, small_model)
    small = corpus.model_copy(
        update={
            "folder": str(tmp_path / "small"),
            "shard_documents": 4,
            "deduplication": DeduplicationSettings(bucket_documents=3),
        }
    )
    prepare(small, small_model)
    assert list(refined_rows(small, "sw")) == list(refined_rows(corpus, "sw"))
    assert len(list((tmp_path / "small" / "cleaned" / "sw").glob("*.removed.npy"))) == 2


TASK = """
import os, pathlib, signal
def double(task):
    number, folder = task
    marker = pathlib.Path(folder) / f"{number}.begun"
    if number % 3 == 0 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number
def die(task):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_workers(workers, folder, monkeypatch):
    """Workers that die the first time at every third task."""
    (folder / "tasks_of_a_test.py").write_text(TASK)
    monkeypatch.syspath_prepend(folder)
    import tasks_of_a_test  # type: ignore[import-not-found]

    tasks = [(number, str(folder)) for number in range(7)]
    done = dict(workers.run(tasks_of_a_test.double, tasks))
    assert done == {task: 2 * task[0] for task in tasks}
    assert dict(workers.run(tasks_of_a_test.double, tasks)) == done
    return tasks_of_a_test.die


def test_the_task_of_a_killed_worker_is_done_again(tmp_path, monkeypatch):
    with open_workers(Engine.LOCAL, 2) as workers:
        die = killed_workers(workers, tmp_path, monkeypatch)
        with pytest.raises(BadInput, match="killed 3 times, likely for want of memory"):
            list(workers.run(die, [1]))


def test_workers_end_with_the_process_that_is_killed(tmp_path):
    (tmp_path / "tasks_of_a_test.py").write_text(
        "import os, time\ndef sleep(folder):\n    open(f'{folder}/{os.getpid()}.pid', 'w').close()\n    "
        "time.sleep(600)\n"
    )
    program = (
        "import sys, tasks_of_a_test\nfrom babel_jax.config import Engine\nfrom "
        "babel_jax.data.refining.engines import open_workers\n"
        "if __name__ == '__main__':\n    with open_workers(Engine.LOCAL, 2) as workers:\n"
        f"        list(workers.run(tasks_of_a_test.sleep, ['{tmp_path}'] * 4))\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "JAX_PLATFORMS": "cpu",
    }
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], env=environment)
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_alive(path.stem) for path in tmp_path.glob("*.pid")))


def is_alive(pid):
    """A process that nobody has waited for has no command line any more."""
    try:
        return bool(Path("/proc", pid, "cmdline").read_bytes())
    except OSError:
        return False


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_the_same_bytes_on_ray(corpus, small_model, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    there = corpus.model_copy(update={"folder": str(tmp_path / "ray"), "engine": Engine.RAY})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # its processes import our tasks
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        assert prepare(there, small_model) == prepare(corpus, small_model)
        bad = corpus.model_copy(
            update={
                "folder": str(tmp_path / "bad"),
                "engine": Engine.RAY,
                "sources": (Source(language="sw", path=__file__),),
            }
        )
        with pytest.raises(BadInput, match="not a kind of file"):
            prepare(bad, small_model)
        with open_workers(Engine.RAY, 0) as workers:
            die = killed_workers(workers, tmp_path, monkeypatch)
            with pytest.raises(BadInput, match="a task was lost on Ray: .*died"):
                list(workers.run(die, [1]))
    finally:
        ray.shutdown()
    assert files_of(corpus.folder) == files_of(there.folder)


@pytest.mark.parametrize("function", ["clean_part", "pair_bucket", "remove_duplicates"])
def test_what_is_finished_is_not_done_again(corpus, small_model, tmp_path, monkeypatch, function):
    whole = corpus.model_copy(update={"folder": str(tmp_path / "whole")})
    prepare(whole, small_model)
    done, real = [], getattr(refinement, function)

    def stop(task):
        if len(done) == 1:
            raise KeyboardInterrupt
        real(task)
        done.append(task.done)

    with monkeypatch.context() as patch:
        patch.setattr(refinement, function, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, small_model)
    monkeypatch.setattr(refinement, function, lambda task: (done.append(task.done), real(task)))
    prepare(corpus, small_model)
    assert len(done) == len(set(done)) > 1
    assert files_of(corpus.folder) == files_of(whole.folder)


def test_stopped_in_the_midst_of_a_part_nothing_of_it_counts(corpus, small_model, tmp_path, monkeypatch):
    small = corpus.model_copy(update={"shard_documents": 6})
    whole = small.model_copy(update={"folder": str(tmp_path / "whole")})
    prepare(whole, small_model)
    with monkeypatch.context() as patch:
        patch.setattr(cleaned_parts.ShardWriter, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(small, small_model)
    assert not list(Path(small.folder).rglob("*.partial"))
    assert not list((Path(small.folder) / "cleaned" / "sw").glob("*.json"))
    prepare(small, small_model)
    assert files_of(small.folder) == files_of(whole.folder)


@pytest.mark.parametrize(
    "stopped_in", ["clean_part", "pair_bucket", "remove_duplicates", "_prepare_language"]
)
@pytest.mark.parametrize("change", ["edited", "first gone", "one more"])
def test_stopped_and_gone_on_with_other_text_it_gives_what_that_text_gives(
    corpus, small_model, tmp_path, write_rows, monkeypatch, stopped_in, change
):
    module, done = prepare_module if stopped_in == "_prepare_language" else refinement, []
    real = getattr(module, stopped_in)

    def stop(task):
        if len(done) == (0 if stopped_in == "_prepare_language" else 1):
            raise KeyboardInterrupt
        done.append(real(task))

    with monkeypatch.context() as patch:
        patch.setattr(module, stopped_in, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, small_model)
    crawl, books, thai = corpus.sources
    if change == "edited":
        write_rows(
            Path(crawl.path),
            [{"id": str(number), "text": text} for number, text in enumerate(varied("sw", 9, seed=2))],
        )
    more = Source(
        language="sw",
        path=str(write_rows(tmp_path / "more.jsonl", [{"text": text} for text in varied("sw", 25)])),
    )
    sources = {
        "edited": (crawl, books, thai),
        "first gone": (books, thai),
        "one more": (crawl, books, more, thai),
    }[change]
    changed = corpus.model_copy(update={"sources": sources})
    whole = changed.model_copy(update={"folder": str(tmp_path / "whole")})
    assert prepare(changed, small_model) == prepare(whole, small_model)
    # What was dropped of a source that is gone may stay.
    there, here = files_of(whole.folder), files_of(changed.folder)
    assert {name: here[name] for name in there} == there


def test_other_rules_on_the_same_folder_are_refused(corpus, small_model):
    prepare(corpus, small_model)
    with pytest.raises(BadInput, match=r"another cleaning \(then on, now off\)"):
        prepare(corpus.model_copy(update={"cleaning": None}), small_model)
    with pytest.raises(BadInput, match=r"another deduplication.similarity \(then 0.8, now 0.7\)"):
        prepare(
            corpus.model_copy(update={"deduplication": DeduplicationSettings(similarity=0.7)}), small_model
        )
    assert prepare(corpus.model_copy(update={"workers": 2, "shard_documents": 3}), small_model)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.fixture
def prepared_from(tmp_path, small_model):
    """Prepares one Swahili file with cleaning and deduplication and gives the language's part of the report
    and the ids left.
    """

    def run(path, **settings):
        settings = DataSettings(
            folder=str(tmp_path / "data"),
            seq_len=64,
            cleaning=LOOSE,
            deduplication=DeduplicationSettings(),
            sources=(Source(language="sw", path=str(path)),),
            **settings,
        )
        report = prepare(settings, small_model)["languages"]["sw"]
        return report, ids(settings)

    return run


def as_jsonl(texts):
    return "".join(
        json.dumps({"id": f"r{number}", "text": text}) + "\n" for number, text in enumerate(texts)
    ).encode()


@pytest.mark.parametrize("workers", [1, 2])
def test_files_that_are_cut_or_corrupt(tmp_path, prepared_from, workers):
    whole = gzip.compress(as_jsonl(varied("sw", 30)))
    for name, content in (
        ("cut.jsonl.gz", whole[: len(whole) // 2]),
        ("bad.jsonl.gz", whole[:200] + b"\0" * 50 + whole[250:]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=rf"{name}: unreadable after line \d+.*corrupt or cut short"):
            prepared_from(tmp_path / name, workers=workers)
        shutil.rmtree(tmp_path / "data")


def test_a_truncated_parquet_file_and_a_wrong_column(tmp_path, prepared_from):
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"content": varied("sw", 20)}), buffer)
    path = tmp_path / "sw.parquet"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(BadInput, match=r"sw.parquet: no column 'text'; set text_key to one of content"):
        prepared_from(path)
    path.write_bytes(buffer.getvalue()[:-100])
    with pytest.raises(BadInput, match=r"sw.parquet: unreadable after row 0.*corrupt or cut short"):
        prepared_from(path)


def test_rows_that_no_document_can_be(tmp_path, prepared_from, monkeypatch):
    for module in (records, streams, rows_module):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1 << 12)
    texts = varied("sw", 9)
    lines = as_jsonl(texts).splitlines(keepends=True)
    lines[2:2] = [
        json.dumps({"id": "huge", "text": "a" * 50_000}).encode() + b"\n",
        b'{"id": "latin", "text": "caf\xe9"}\n',
        json.dumps({"id": "nul", "text": texts[0].replace(" ", "\0 ", 3) + " Mwisho."}).encode() + b"\n",
        json.dumps({"id": "twice-encoded", "text": texts[3] + "â€œkaribuâ€\u009d Ã©cole Ã©tÃ©"}).encode()
        + b"\n",
        b"\n",
        b"not json\n",
    ]
    path = tmp_path / "sw.jsonl"
    path.write_bytes(b"".join(lines))
    with pytest.raises(BadInput, match=r"sw.jsonl:3: longer than 0 MiB"):
        prepared_from(path)
    shutil.rmtree(tmp_path / "data")
    report, left = prepared_from(path, bad_rows=BadRows.SKIP)
    assert report["bad"] == 3
    assert [place.split(": ")[0] for place in report["located"]] == [f"{path}:{line}" for line in (3, 4, 8)]
    assert report["cleaning"][str(path)]["dropped"] == {"encoding": 1}
    assert report["cleaning"][str(path)]["duplicates"] == {"exact": 0, "near": 1}
    assert left == ["r1", "nul", *(f"r{number}" for number in range(2, 9))]
    assert not any(
        "\0" in line for line in (tmp_path / "data" / "heldout" / "sw.jsonl").read_text().splitlines()
    )


def test_identical_ids_are_different_documents(tmp_path, prepared_from, write_rows):
    path = write_rows(tmp_path / "sw.jsonl", [{"id": "same", "text": text} for text in varied("sw", 12)])
    report, left = prepared_from(path, heldout_fraction=0.0)
    assert left == ["same"] * 12
    assert report["kinds"]["web"]["documents"] == 12


def test_empty_files_and_documents_of_another_language(tmp_path, prepared_from, write_rows):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(
        BadInput,
        match=(
            r"language sw: no text to train on: of 0 rows 0 are bad, 0 empty, 0 dropped in cleaning, 0 "
            r"duplicates"
        ),
    ):
        prepared_from(tmp_path / "empty.jsonl")
    shutil.rmtree(tmp_path / "data")
    path = write_rows(tmp_path / "it.jsonl", [{"text": text} for text in PROSE["it"]])
    with pytest.raises(BadInput, match=r"of 30 rows .* 30 dropped in cleaning \(30 another language: min_"):
        prepared_from(path)


def test_a_source_that_vanishes_midway(tmp_path, small_model, write_rows, monkeypatch):
    sources = []
    for number in range(3):
        rows = [
            {"id": f"{number}-{row}", "text": text} for row, text in enumerate(varied("sw", 5, seed=number))
        ]
        sources.append(
            Source(language="sw", path=str(write_rows(tmp_path / f"{number}.jsonl", rows)), name=str(number))
        )
    settings = DataSettings(folder=str(tmp_path / "data"), seq_len=64, cleaning=LOOSE, sources=tuple(sources))
    real = refinement.clean_part

    def vanish(task):
        real(task)
        (tmp_path / "1.jsonl").rename(tmp_path / "away") if task.source == 0 else None

    with monkeypatch.context() as patch:
        patch.setattr(refinement, "clean_part", vanish)
        with pytest.raises(BadInput, match=r"1.jsonl: (no such file|gone, though it was there)"):
            prepare(settings, small_model)
    (tmp_path / "away").rename(tmp_path / "1.jsonl")
    assert set(prepare(settings, small_model)["languages"]["sw"]["cleaning"]) == {"0", "1", "2"}


@pytest.mark.parametrize("kilobytes", [12, 40])
def test_a_full_disk_is_named(tmp_path, corpus, small_model, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(BadInput, match="no space left"):
            prepare(corpus.model_copy(update={"folder": str(disk / "data")}), small_model)
        assert not (disk / "data" / "prepared.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_runs_on_one_folder_give_what_one_gives(corpus, small_model, tmp_path):
    import threading

    found = []
    threads = [threading.Thread(target=lambda: found.append(prepare(corpus, small_model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1] == open_prepared(corpus.folder).report


def test_the_first_bad_rows_of_all_parts_are_located(tmp_path, small_model, write_rows):
    for number in range(3):
        write_rows(
            tmp_path / "in" / f"{number}.jsonl",
            [{"text": text} for text in varied("sw", 4, seed=number)] + [{}] * 9,
        )
    settings = DataSettings(
        folder=str(tmp_path / "data"),
        seq_len=64,
        bad_rows=BadRows.SKIP,
        deduplication=DeduplicationSettings(near=False),
        sources=(Source(language="sw", path=str(tmp_path / "in" / "*.jsonl")),),
    )
    entry = prepare(settings, small_model)["languages"]["sw"]
    assert (entry["rows"], entry["bad"], len(entry["located"])) == (39, 27, MAX_LOCATED)
    assert Counter(Path(place).name.split(".")[0] for place in entry["located"]) == {"0": 9, "1": 9, "2": 2}


def test_digests_are_of_the_whole_text():
    found = digests(["a", "b", "a", ""])
    assert [(found[0] == other).all() for other in found] == [True, False, True, False]
