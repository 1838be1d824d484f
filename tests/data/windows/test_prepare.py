import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from babel_jax.config import BadRows, DataSettings, Source
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.data.windows import datasets
from babel_jax.data.windows import prepare as prepare_module
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import dataset_folder, open_prepared
from babel_jax.data.windows.storage import open_windows
from babel_jax.errors import BadInput
from tests.data.tokens.test_special_tokens import byte_level


def documents_of(folder, language, kind, tokenizer):
    """The texts in a dataset of windows, put together again."""
    texts, document = [], []
    for window in open_windows(dataset_folder(Path(folder), language, kind)):
        for token, segment in zip(window["tokens"].tolist(), window["segment_ids"].tolist(), strict=True):
            if segment and token == tokenizer.eos_id:
                texts.append(tokenizer.decode(document))
                document = []
            elif segment:
                document.append(token)
    assert not document
    return texts


def files_of(folder):
    """The bytes of each file by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_windows_hold_the_training_text_and_heldout_files_the_rest(
    small_prepared, small_settings, small_model
):
    tokenizer = open_tokenizer(small_model)
    prepared = open_prepared(small_prepared)
    assert prepared.languages == ("en", "zh", "sw", "ha")
    for source in small_settings.sources:
        rows = list(read_rows(source, BadRows.REFUSE, RowCounts()))
        heldout = prepared.heldout(source.language)
        assert heldout
        for kind in {row.kind for row in rows}:
            trained = documents_of(small_prepared, source.language, kind, tokenizer)
            assert trained == [row.text for row in rows if row.kind == kind and row not in heldout]


def test_parallel_rows_are_held_out_together(small_prepared):
    prepared = open_prepared(small_prepared)
    ids = {}
    for language in prepared.languages:
        ids[language] = [row.id for row in prepared.heldout(language)]
    assert ids["en"] == ids["zh"] == ids["sw"]
    assert set(ids["ha"]) <= set(ids["en"])


def test_the_report_counts_what_is_there(small_prepared, small_model):
    tokenizer = open_tokenizer(small_model)
    prepared = open_prepared(small_prepared)
    assert prepared.report == json.loads((Path(small_prepared) / "prepared.json").read_text())
    assert prepared.seq_len == 64
    assert prepared.tokenizer_fingerprint == tokenizer.fingerprint
    assert set(prepared.available) == {
        (language, kind) for language in ("en", "zh", "sw") for kind in ("web", "textbook")
    } | {("ha", "web")}
    for (language, kind), tokens in prepared.available.items():
        counts = prepared.report["languages"][language]["kinds"][kind]
        texts = documents_of(small_prepared, language, kind, tokenizer)
        windows = tfds.data_source(f"windows/{language}-{kind}", split="train", data_dir=small_prepared)
        assert counts == {
            "tokens": tokens,
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "windows": len(windows),
        }
        assert tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
        assert sum(int((window["segment_ids"] > 0).sum()) for window in windows) == tokens
    entry = prepared.report["languages"]["sw"]
    heldout = prepared.heldout("sw")
    assert (entry["rows"], entry["bad"], entry["duplicates"], entry["reserved"]) == (80, 0, 0, 0)
    assert (entry["heldout_documents"], entry["heldout_bytes"]) == (
        len(heldout),
        sum(len(row.text.encode()) for row in heldout),
    )


@pytest.mark.parametrize(("fraction", "told"), [(0.05, True), (0.5, False), (0.0, False)])
def test_few_heldout_documents_are_told(tmp_path, small_model, write_rows, rows_of, caplog, fraction, told):
    path = write_rows(tmp_path / "sw.jsonl", rows_of("sw", ("web",)))
    sources = (Source(language="sw", path=str(path)),)
    settings = DataSettings(
        folder=str(tmp_path / "data"), seq_len=64, heldout_fraction=fraction, sources=sources
    )
    prepare(settings, small_model)
    assert ("sw: fewer than 6 held-out documents" in caplog.text) is told


def test_duplicates_and_heldout_text_are_not_trained_on(tmp_path, small_model, write_rows, rows_of):
    rows = rows_of("sw", ("web",))
    again = [{**row, "id": f"again-{row['id']}"} for row in rows]
    path = write_rows(tmp_path / "sw.jsonl", rows + again)
    folder = str(tmp_path / "data")
    prepare(
        DataSettings(
            folder=folder, seq_len=64, heldout_fraction=0.2, sources=(Source(language="sw", path=str(path)),)
        ),
        small_model,
    )
    trained = documents_of(folder, "sw", "web", open_tokenizer(small_model))
    heldout = {row.text for row in open_prepared(folder).heldout("sw")}
    assert len(trained) == len(set(trained))
    assert heldout
    assert not heldout & set(trained)
    assert heldout | set(trained) == {row["text"] for row in rows}


def test_done_again_nothing_is_written(small_settings, small_model, monkeypatch, tmp_path):
    settings = small_settings.model_copy(update={"folder": str(tmp_path / "data")})
    first = prepare(settings, small_model)
    before = files_of(tmp_path)
    monkeypatch.setattr(datasets, "write_windows", None)
    monkeypatch.setattr(prepare_module, "survey", None)
    assert prepare(settings, small_model) == first
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [0, 3, 6])
def test_stopped_it_goes_on_where_it_was(
    small_settings, small_prepared, small_model, monkeypatch, tmp_path, stopped_by, after
):
    settings = small_settings.model_copy(update={"folder": str(tmp_path / "data")})
    written = []

    def stop(folder, name, windows, seq_len):
        if len(written) == after:
            next(iter(windows))
            raise stopped_by
        write(folder, name, windows, seq_len)
        written.append(name)

    write = datasets.write_windows
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "write_windows", stop)
        with pytest.raises(stopped_by):
            prepare(settings, small_model)
    with pytest.raises(BadInput, match=r"is not finished \(it has no prepared.json\); run `babel prepare`"):
        open_prepared(settings.folder)
    assert not list(Path(settings.folder).rglob("*.partial"))
    monkeypatch.setattr(
        datasets,
        "write_windows",
        lambda folder, name, *rest: (written.append(name), write(folder, name, *rest)),
    )
    prepare(settings, small_model)
    assert len(written) == len(set(written)) == 7
    assert files_of(settings.folder) == files_of(small_prepared)


PREPARE = """
import sys
from babel_jax.config import DataSettings, Source
from babel_jax.data.windows import prepare as module
folder, corpus, tokenizer = sys.argv[1:]
sources = tuple(Source(language=code, path=f"{corpus}/{code}.jsonl") for code in ("en", "zh", "sw", "ha"))
print("ready", flush=True)
module.prepare(DataSettings(folder=folder, seq_len=64, heldout_fraction=0.1, sources=sources), tokenizer)
"""


def test_killed_at_any_moment_it_goes_on(small_settings, small_prepared, small_model, tmp_path):
    settings = small_settings.model_copy(update={"folder": str(tmp_path / "data")})
    corpus = str(Path(small_settings.sources[0].path).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PREPARE, settings.folder, corpus, str(small_model)]
    killed = 0
    for seconds in (0.02, 0.05, 0.1, 0.15):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed
    prepare(settings, small_model)
    assert files_of(settings.folder) == files_of(small_prepared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 32}, r"another seq_len \(then 64, now 32\)"),
        ({"heldout_fraction": 0.2}, "another heldout_fraction"),
        ({"heldout_bytes": 7}, "another heldout_bytes"),
    ],
)
def test_other_settings_on_the_same_folder_are_refused(
    small_settings, small_prepared, small_model, change, message
):
    with pytest.raises(BadInput, match=message):
        prepare(small_settings.model_copy(update=change), small_model)


def test_another_tokenizer_or_other_text_on_the_same_folder_is_refused(
    small_settings, small_prepared, small_model, texts, tmp_path, write_rows
):
    model = tmp_path / "other"
    model.mkdir()
    open_tokenizer(small_model).save(model)
    (model / "config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(BadInput, match="another tokenizer"):
        prepare(small_settings, model)
    other = Source(language="ha", path=str(write_rows(tmp_path / "ha.jsonl", [{"text": texts["ha"]}])))
    with pytest.raises(BadInput, match=r"ha was prepared from other text than data.sources now names"):
        prepare(small_settings.model_copy(update={"sources": (*small_settings.sources, other)}), small_model)


def test_languages_can_be_added(small_settings, small_prepared, small_model, tmp_path):
    settings = small_settings.model_copy(update={"folder": str(tmp_path / "data")})
    prepare(settings.model_copy(update={"sources": settings.sources[2:]}), small_model)
    prepare(settings, small_model)
    assert files_of(settings.folder) == files_of(small_prepared)


def test_bad_rows_are_refused_or_reported(tmp_path, small_model, write_rows, rows_of):
    path = write_rows(tmp_path / "sw.jsonl", [*rows_of("sw", ("web",), 10), {"id": "x"}])
    settings = DataSettings(
        folder=str(tmp_path / "data"), seq_len=64, sources=(Source(language="sw", path=str(path)),)
    )
    with pytest.raises(BadInput, match=r"sw.jsonl:11: no 'text'"):
        prepare(settings, small_model)
    # The way out that the message names works on the same folder.
    report = prepare(settings.model_copy(update={"bad_rows": BadRows.SKIP}), small_model)
    assert report["languages"]["sw"]["bad"] == 1
    assert report["languages"]["sw"]["located"][0].startswith(f"{path}:11: no 'text'")
    with pytest.raises(BadInput, match="prepared with 1 bad rows skipped"):
        prepare(settings, small_model)


def test_unusable_input(tmp_path, small_model, small_settings, write_rows):
    empty = Source(language="jv", path=str(write_rows(tmp_path / "jv.jsonl", [{"text": " "}, {"text": ""}])))
    settings = DataSettings(folder=str(tmp_path / "data"), sources=(empty,))
    with pytest.raises(BadInput, match=r"language jv: no text to train on: of 2 rows 0 are bad, 2 empty"):
        prepare(settings, small_model)
    with pytest.raises(BadInput, match=r"data.sources is empty"):
        prepare(settings.model_copy(update={"sources": ()}), small_model)
    with pytest.raises(BadInput, match=r"data.tokenizer is not set"):
        prepare(settings)
    with pytest.raises(BadInput, match="not empty and not a folder of prepared data"):
        prepare(settings.model_copy(update={"folder": str(tmp_path)}), small_model)
    with pytest.raises(BadInput, match=r"is no folder of prepared data \(it has no prepared.json\)"):
        open_prepared(tmp_path)


@pytest.mark.parametrize("kilobytes", [4, 40, 120])
def test_a_full_disk_is_named(tmp_path, small_settings, small_model, kilobytes, capfd):
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
        with pytest.raises(BadInput, match="no space left") as raised:
            prepare(small_settings.model_copy(update={"folder": str(disk / "data")}), small_model)
        assert "\n" not in str(raised.value)
        assert not (disk / "data" / "prepared.json").exists()
        for counts in (disk / "data").rglob("counts.json"):
            assert len(open_windows(counts.parent)) == json.loads(counts.read_text())["windows"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: (folder / "prepared.json").write_text("{}"),
            r"prepared.json: damaged; remove the folder",
        ),
        (lambda folder: (folder / "prepared.json").write_text("["), r"prepared.json: not readable JSON"),
        (lambda folder: shutil.rmtree(folder / "windows" / "sw-web"), r"sw-web: missing; remove the folder"),
        (lambda folder: (folder / "heldout" / "en.jsonl").unlink(), r"en.jsonl: missing; remove the folder"),
    ],
)
def test_damaged_folders_are_named(small_prepared, tmp_path, damage, says):
    folder = tmp_path / "data"
    shutil.copytree(small_prepared, folder)
    damage(folder)
    with pytest.raises(BadInput, match=says):
        open_prepared(folder)


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_a_conversation_that_the_template_refuses_is_a_bad_row(chat_tokenizer, tmp_path, bad_rows):
    def talk(number):
        return [
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": f"It is {number}."},
        ]

    rows = [{"id": str(number), "messages": talk(number)} for number in range(8)]
    rows[5]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    (tmp_path / "en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    source = Source(language="en", path=str(tmp_path / "en.jsonl"), text_key="messages")
    settings = DataSettings(
        folder=str(tmp_path / "data"), seq_len=128, heldout_fraction=0.0, bad_rows=BadRows(bad_rows),
        conversations=True,
        chat_template=str(tmp_path / "chat.jinja"), sources=(source,),
    )  # fmt: skip
    if bad_rows == "refuse":
        with pytest.raises(BadInput, match=r"en\.jsonl:6: .*chat\.jinja, line 1: .*no system"):
            prepare(settings, chat_tokenizer)
    else:
        entry = prepare(settings, chat_tokenizer)["languages"]["en"]
        assert (entry["bad"], entry["kinds"]["web"]["documents"]) == (1, 7)
        assert entry["located"][0].startswith(f"{tmp_path / 'en.jsonl'}:6: ")


def test_each_document_begins_as_its_tokenizer_begins_it(tmp_path):
    tokenizer = byte_level(tmp_path / "tokenizer", begin="<s> $A")
    (tmp_path / "en.jsonl").write_text(
        "".join(json.dumps({"id": str(one), "text": f"Text {one}"}) + "\n" for one in range(3))
    )
    source = Source(language="en", path=str(tmp_path / "en.jsonl"))
    settings = DataSettings(
        folder=str(tmp_path / "data"), seq_len=64, heldout_fraction=0.0, sources=(source,)
    )
    report = prepare(settings, tokenizer)
    (window,) = open_windows(dataset_folder(tmp_path / "data", "en", "web"))
    opened = open_tokenizer(tokenizer)
    expected = [token for one in range(3) for token in [256, *opened.encode(f"Text {one}"), 257]]
    assert window["tokens"][window["segment_ids"] > 0].tolist() == expected
    assert report["tokenizer"]["begin_ids"] == open_prepared(tmp_path / "data").begin_ids == [256]
    assert report["languages"]["en"]["kinds"]["web"]["tokens"] == len(expected)
    # The setting may say otherwise, for another folder alone, and a run notices what does not fit.
    without = settings.model_copy(update={"add_bos_token": False})
    with pytest.raises(BadInput, match="prepared with another begin_ids"):
        prepare(without, tokenizer)
    prepare(without.model_copy(update={"folder": str(tmp_path / "other")}), tokenizer)
    with pytest.raises(
        BadInput,
        match=r"each document begins with the token ids \[\], and the tokenizer begins a text with \[256\]",
    ):
        open_prepared(tmp_path / "other").check_tokenizer(opened, conversations=False)
