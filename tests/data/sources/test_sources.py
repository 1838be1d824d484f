"""Sources of one language that read the same file, and text that changes between two runs
of `babel prepare`.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from babel_jax.config import (
    CleaningSettings,
    DataSettings,
    DecontaminationSettings,
    DeduplicationSettings,
    Rule,
    Source,
)
from babel_jax.data.refining.cleaned_parts import sources_of
from babel_jax.data.refining.refinement import refined_rows
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.errors import BadInput


def words(seed):
    chosen = random.Random(seed)
    return " ".join(
        "".join(chosen.choices("abcdefghijklmnoprstuvw", k=chosen.randint(3, 8))) for _ in range(60)
    )


@pytest.mark.parametrize("heavier_first", [True, False])
@pytest.mark.parametrize("names", [(None, None), ("A", "B"), ("A", "A")])
def test_two_sources_that_read_one_file_keep_their_weights_and_licences(
    tmp_path, small_model, write_rows, heavier_first, names
):
    """Five texts are there twice, as web and as textbook; of each the heavier source's copy stays."""
    rows = [
        {"id": f"{kind}-{number}", "kind": kind, "text": words(number)}
        for number in range(5)
        for kind in ("web", "textbook")
    ]
    rows += [{"id": f"only-{kind}", "kind": kind, "text": words(kind)} for kind in ("web", "textbook")]
    path = str(write_rows(tmp_path / "en.jsonl", rows))
    web = Source(language="en", path=path, where={"kind": "web"}, licence="CC-BY-4.0", name=names[0])
    book = Source(
        language="en", path=path, where={"kind": "textbook"}, licence="proprietary", weight=5.0, name=names[1]
    )
    settings = DataSettings(
        folder=str(tmp_path / "data"),
        seq_len=64,
        heldout_fraction=0.0,
        deduplication=DeduplicationSettings(),
        sources=(book, web) if heavier_first else (web, book),
    )
    found = prepare(settings, small_model)["languages"]["en"]
    assert {kind: counts["documents"] for kind, counts in found["kinds"].items()} == {"web": 1, "textbook": 6}
    assert sorted(
        (source["licence"], source["documents"], source["kept"]) for source in found["cleaning"].values()
    ) == [
        ("CC-BY-4.0", 6, 1),
        ("proprietary", 6, 6),
    ]


def test_labels_are_distinct():
    sources = (
        Source(language="en", path="/a.jsonl"),
        Source(language="en", path="/a.jsonl", text_key="title"),
        Source(language="en", path="/a.jsonl", where={"lang": "en", "kind": "web"}),
        Source(language="sw", path="/a.jsonl"),
    )
    settings = DataSettings(folder="data", sources=sources)
    assert [source.label for source in sources_of(settings, "en")] == [
        "/a.jsonl #1",
        "/a.jsonl #2",
        "/a.jsonl (lang = en, kind = web)",
    ]
    assert [source.label for source in sources_of(settings, "sw")] == ["/a.jsonl"]


# --- text that changes ------------------------------------------------------------------------------------


@pytest.fixture
def stale(tmp_path, small_model, write_rows):
    """Settings of prepared data, with and without cleaning, and the file that they read."""

    def prepared(cleaned):
        rows = [{"text": f"Row {number}: the secret word is hunter2. {words(number)}"} for number in range(4)]
        path = write_rows(tmp_path / "en.jsonl", rows)
        settings = DataSettings(
            folder=str(tmp_path / "data"),
            seq_len=64,
            heldout_fraction=0.0,
            cleaning=CleaningSettings(off=tuple(Rule)) if cleaned else None,
            sources=(Source(language="en", path=str(path)),),
        )
        prepare(settings, small_model)
        return settings, path

    return prepared


def overwrite(path, keep_time=False):
    """Letters of the same length in the place of the secret, within the same second."""
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b"hunter2", b"*******"))
    assert path.stat().st_size == times.st_size
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("cleaned", [True, False])
def test_text_of_the_same_length_is_other_text(stale, small_model, cleaned):
    settings, path = stale(cleaned)
    report = prepare(settings, small_model)
    overwrite(path)
    with pytest.raises(
        BadInput, match=r"prepared from other text than data.sources now names \(changed: .*en.jsonl\)"
    ):
        prepare(settings, small_model)
    path.write_bytes(path.read_bytes().replace(b"*******", b"hunter2"))
    assert prepare(settings, small_model) == report  # another time, the same bytes


def test_recheck_reads_files_whose_size_and_time_are_the_same(stale, small_model):
    settings, path = stale(False)
    prepare(settings, small_model, recheck=True)
    overwrite(path, keep_time=True)
    prepare(settings, small_model)
    with pytest.raises(BadInput, match="changed: .*en.jsonl"):
        prepare(settings, small_model, recheck=True)


def test_parts_that_were_cleaned_from_other_text_are_cleaned_again(stale, small_model):
    """As where the command was stopped after the text was cleaned."""
    settings, path = stale(True)
    for file in ("prepared.json", "languages/en.json"):
        (Path(settings.folder) / file).unlink()
    shutil.rmtree(Path(settings.folder) / "windows")
    overwrite(path)
    prepare(settings, small_model)
    assert [row.text.count("*******") for row in refined_rows(settings, "en")] == [1, 1, 1, 1]


def test_the_fingerprint_is_of_the_text_and_not_of_its_place(stale, small_model, tmp_path):
    settings, path = stale(True)
    first = open_prepared(settings.folder).fingerprint
    other = tmp_path / "elsewhere" / "en.jsonl"
    other.parent.mkdir()
    shutil.copy(path, other)
    moved = settings.model_copy(
        update={"folder": str(tmp_path / "two"), "sources": (Source(language="en", path=str(other)),)}
    )
    prepare(moved, small_model)
    assert open_prepared(moved.folder).fingerprint == first
    overwrite(other)
    changed = moved.model_copy(update={"folder": str(tmp_path / "three")})
    prepare(changed, small_model)
    assert open_prepared(changed.folder).fingerprint != first


def test_other_evaluation_files_are_other_settings(tmp_path, small_model, write_rows):
    items = write_rows(tmp_path / "items.jsonl", [{"question": words("item")}])
    settings = DataSettings(
        folder=str(tmp_path / "data"),
        seq_len=64,
        heldout_fraction=0.0,
        decontamination=DecontaminationSettings(paths=(str(items),)),
        sources=(Source(language="en", path=str(write_rows(tmp_path / "en.jsonl", [{"text": words(1)}]))),),
    )
    prepare(settings, small_model)
    write_rows(items, [{"question": words("other item")}])
    with pytest.raises(BadInput, match=r"prepared with another evaluation_files\..*items\.jsonl"):
        prepare(settings, small_model)


def test_an_evaluation_file_that_is_gone_is_another_setting(tmp_path, small_model, write_rows):
    for number in (1, 2):
        write_rows(tmp_path / f"items-{number}.jsonl", [{"question": words(f"item {number}")}])
    settings = DataSettings(
        folder=str(tmp_path / "data"),
        seq_len=64,
        heldout_fraction=0.0,
        decontamination=DecontaminationSettings(paths=(str(tmp_path / "items-*.jsonl"),)),
        sources=(Source(language="en", path=str(write_rows(tmp_path / "en.jsonl", [{"text": words(1)}]))),),
    )
    prepare(settings, small_model)
    (tmp_path / "items-2.jsonl").unlink()
    with pytest.raises(BadInput, match=r"prepared with another evaluation_files\..*items-2\.jsonl .*now off"):
        prepare(settings, small_model)


def test_what_an_earlier_version_kept_is_still_read(stale, small_model):
    settings, path = stale(False)
    file = Path(settings.folder) / "languages" / "en.json"
    entry = json.loads(file.read_text())
    for source in entry["sources"]:
        source["bytes"] = {name: described["bytes"] for name, described in source.pop("files").items()}
    file.write_text(json.dumps(entry))
    prepare(settings, small_model)
    with pytest.raises(BadInput, match="kept no digests to check"):
        prepare(settings, small_model, recheck=True)
    path.write_bytes(path.read_bytes() + b'{"text": "one more"}\n')
    with pytest.raises(BadInput, match="changed: .*en.jsonl"):
        prepare(settings, small_model)
