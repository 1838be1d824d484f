"""`babel catalogue`, and its check against a hub that has, or no longer has, what the catalogue says."""

import json

import pytest

from babel_jax.cli import main
from babel_jax.config import BadRows, Source
from babel_jax.config.catalogue import catalogue, expand
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.evaluation.benchmarks.datasets import DATASETS
from babel_jax.hub.datasets import dataset_commit
from babel_jax.studies.catalogue import catalogue_table, check_catalogue
from tests.hub.corpora import encoded, put_corpus

ON_HUB = [
    name
    for name, entry in catalogue().items()
    if entry["source"].get("path", "").startswith("hf://") or "huggingface" in entry["source"]
]


def test_the_table():
    table = catalogue_table()
    assert [corpus["name"] for corpus in table["corpora"]] == list(catalogue())
    assert len(ON_HUB) > 12
    for corpus in table["corpora"]:
        assert corpus["name"] in table["summary"]
    assert next(corpus for corpus in table["corpora"] if corpus["name"] == "culturax")["gated"]


@pytest.mark.parametrize("name", ON_HUB)
def test_every_corpus_is_read_from_the_hub(hub, name, monkeypatch):
    """In the layout that its card describes, in the languages that it has."""
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    put_corpus(hub, name)
    for repo in hub.repos.values():
        repo.readers.add("reader")
    result = check_catalogue([name])
    assert result["checked"][0]["problems"] == []
    assert result["exit_status"] == 0
    languages = list(catalogue()[name]["configurations"])
    for code in (languages[0], languages[-1]):
        sources = expand({"catalogue": name, "language": code}, Source.model_fields)
        rows = list(read_rows(Source(**sources[0]), BadRows.REFUSE, RowCounts()))
        assert rows
        assert all(code in row.text for row in rows)


def test_what_has_changed(hub, capsys):
    def change(files):
        files["data/swa_Latn/train/00000.parquet"] = files.pop("data/swh_Latn/train/00000.parquet")
        path = "data/hin_Deva/train/00000.parquet"
        files[path] = encoded(path, [{"content": "a", "id": "1", "url": "u", "language_score": 1.0}])

    put_corpus(hub, "fineweb-2", change=change)
    hub.repos["datasets", "HuggingFaceFW/fineweb-2"].gated = True
    hub.repos["datasets", "HuggingFaceFW/fineweb-2"].readers.add(None)
    # Chinese is the first language; its columns are right. Without it Hindi is looked at.
    del hub.repos["datasets", "HuggingFaceFW/fineweb-2"].files("main")["data/cmn_Hani/train/00000.parquet"]
    assert main(["catalogue", "check", "fineweb-2", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["changed"] == ["fineweb-2"]
    gate, names, columns = told["checked"][0]["problems"]
    assert gate == "gated now"
    assert names == "has no zh (cmn_Hani), sw (swh_Latn)"
    assert columns == ("no column text, minhash_cluster_size; it has content, id, url, language_score")
    assert main(["catalogue", "check", "madlad-400", "wikipedia-tfds"]) == 1
    said = capsys.readouterr().out
    assert "madlad-400: allenai/MADLAD-400: no such dataset on the hub" in said
    assert "wikipedia-tfds: not checked: a TFDS dataset" in said
    assert main(["catalogue", "check", "fineweb-3"]) == 2
    assert "no corpus or benchmark 'fineweb-3'; known are" in capsys.readouterr().err


def test_benchmarks(hub):
    name = "xcopa"
    benchmark = DATASETS[name]
    configuration = next(iter(benchmark.configs.values()))
    row = dict.fromkeys(benchmark.keys, "a")
    files = {f"{configuration}/{split}.parquet": encoded("a.parquet", [row]) for split in benchmark.splits}
    listed = "".join(
        f"  - split: {split}\n    path: {configuration}/{split}.parquet\n" for split in benchmark.splits
    )
    card = f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{listed}---\n"
    hub.put(benchmark.hub, {**files, "README.md": card}, kind="datasets")
    assert check_catalogue([name])["checked"][0]["problems"] == []
    split = benchmark.splits[0]
    del row["premise"]
    moved = files | {f"{configuration}/{split}.parquet": encoded("a.parquet", [row]), "README.md": card}
    hub.put(benchmark.hub, moved, kind="datasets")
    dataset_commit.cache_clear()
    (problem,) = check_catalogue([name])["checked"][0]["problems"]
    assert problem.startswith("no column premise; it has choice1")
