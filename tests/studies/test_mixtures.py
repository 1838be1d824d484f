"""`babel mixture`: the stages side by side, on prepared folders that hold nothing but their report."""

import csv
import json

import numpy as np
import pytest

from babel_jax.cli import main
from babel_jax.config.file import configs_folder, load_config
from babel_jax.data.windows.prepared import dataset_folder, heldout_file
from babel_jax.languages import BABEL, LANGUAGES
from babel_jax.studies.mixtures import stage_mixtures


@pytest.fixture
def prepared(tmp_path):
    """Makes a folder that `open_prepared` takes for one with so many tokens of each language and kind."""

    def make(available, seq_len=64):
        folder = tmp_path / "data"
        languages = {}
        for (code, kind), tokens in available.items():
            dataset_folder(folder, code, kind).mkdir(parents=True)
            heldout_file(folder, code).parent.mkdir(exist_ok=True)
            heldout_file(folder, code).touch()
            languages.setdefault(code, {"kinds": {}})["kinds"][kind] = {"tokens": tokens}
        report = {"seq_len": seq_len, "tokenizer": {"fingerprint": "x"}, "languages": languages}
        (folder / "prepared.json").write_text(json.dumps(report))
        return folder

    return make


@pytest.fixture
def config_file(tmp_path):
    def write(folder, *stages):
        path = tmp_path / "config.toml"
        shape = (
            "vocab_size = 64\nhidden_size = 8\nintermediate_size = 8\nnum_hidden_layers = "
            "1\nnum_attention_heads = 1\n"
        )
        path.write_text(
            f'out = "{tmp_path / "run"}"\n[model.shape]\n{shape}[data]\nfolder = "{folder}"\nseq_len = 64\n'
            "[training]\nglobal_batch_size = 1\n"
            + "".join(f"[[stages]]\nschedule = {{ peak = 1.0 }}\n{stage}\n" for stage in stages)
        )
        return path

    return write


def test_two_stages_side_by_side(prepared, config_file, tmp_path, capsys):
    # 100 steps of 64 tokens. Equal parts are 1600 each; ha and sw have less, and en and zh share what they
    # leave.
    folder = prepared(
        {
            ("en", "web"): 9000,
            ("zh", "web"): 9000,
            ("sw", "textbook"): 100,
            ("sw", "web"): 300,
            ("ha", "web"): 20,
        }
    )
    config = config_file(
        folder,
        'name = "one"\nsteps = 100\nmixture = { max_epochs = 2.0 }',
        'name = "two"\nsteps = 10\nmixture = { strategy = "temperature", languages = ["en", "sw"], '
        "textbook_multiplier = 3.0 }",
    )
    assert main(["mixture", str(config), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    one, two = found["stages"]["one"], found["stages"]["two"]
    shares = {(row["language"], row["kind"]): row["share"] for row in one["rows"]}
    expected = {
        ("en", "web"): 2780,
        ("zh", "web"): 2780,
        ("sw", "textbook"): 200,
        ("sw", "web"): 600,
        ("ha", "web"): 40,
    }
    assert shares == {key: pytest.approx(tokens / 6400) for key, tokens in expected.items()}
    assert [row["at_cap"] for row in one["rows"]] == [False, False, True, True, True]
    assert one["rows"][0]["uncapped_share"] == pytest.approx(0.25)
    assert one["classes"] == {"high": pytest.approx(5560 / 6400), "low": pytest.approx(840 / 6400)}
    assert [warning.split(":")[0] for warning in one["warnings"]] == [
        "too little text in Swahili (sw)",
        "too little text in Hausa (ha)",
    ]
    assert "it gives 0.625% of the tokens in 2 passes, and its part would be 25%" in one["warnings"][1]
    assert {(row["language"], row["kind"]): round(row["share"], 6) for row in two["rows"]} == {
        ("en", "web"): round(9000 / 9400, 6),
        ("sw", "textbook"): round(200 / 9400, 6),
        ("sw", "web"): round(200 / 9400, 6),
    }
    assert two["warnings"] == []

    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"mixture.md", "mixture.json", "mixture.csv", "mixture.png", "mixture.html"}
    assert (tmp_path / "out" / "mixture.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "mixture.md").read_text()
    assert "| Hausa (ha) | low | web | 20 | 0.625 | 25.000 | 2.00 = |  |  |  |" in table
    assert "warning: one: too little text in Hausa (ha)" in table
    page = (tmp_path / "out" / "mixture.html").read_text(encoding="utf-8")
    assert '<th scope="row">Hausa</th><td>0.62</td><td>25.00</td><td>2.00 (cap)</td><td>web</td>' in page
    assert "Warning: too little text in Hausa (ha)" in page
    rows = list(csv.DictReader((tmp_path / "out" / "mixture.csv").open()))
    assert [row["language"] for row in rows] == ["en", "zh", "sw", "sw", "ha"]
    assert sum(float(row["one_share"]) for row in rows) == pytest.approx(1)
    assert rows[1]["two_share"] == ""


def test_a_curated_share_that_is_not_there_is_said(prepared, config_file):
    folder = prepared({("en", "curated"): 10, ("en", "web"): 9000, ("sw", "web"): 9000})
    config = config_file(folder, 'name = "one"\nsteps = 100\nmixture = { curated_extra = { en = 0.5 } }')
    (stage,) = stage_mixtures(load_config(config))
    assert stage.parts["en", "curated"].at_cap
    assert len(stage.warnings) == 1
    assert "too little text in English (en)" in stage.warnings[0]


@pytest.mark.parametrize("name", ["babel-9b.toml", "babel-83b.toml"])
def test_the_shipped_stages_follow_the_report(prepared, name):
    """On supplies like the web's (Common Crawl shares of 2 * 10**12 tokens, and a textbook for each
    language).
    """
    supply = {(code, "web"): round(LANGUAGES[code].common_crawl_percent / 100 * 2e12) for code in BABEL}
    supply |= {(code, "textbook"): tokens // 50 for (code, _), tokens in list(supply.items())}
    supply |= {("en", "curated"): 10**11, ("zh", "curated"): 10**10}
    folder = prepared(supply, seq_len=4096)
    recovery, continued = stage_mixtures(load_config(configs_folder() / name, (f"data.folder={folder}",)))
    low = [key for key in supply if LANGUAGES[key[0]].resource == "low"]
    textbooks = [key for key in supply if key[1] == "textbook"]
    # Recovery: equal but where text runs short, with curated English and Chinese on top.
    shares = {code: recovery.share([(code, "web"), (code, "textbook")]) for code in BABEL}
    full = []
    for code in BABEL:
        if not (recovery.parts[code, "web"].at_cap or recovery.parts[code, "textbook"].at_cap):
            full.append(code)
    assert {"es", "ar", "hi", "ko"} <= set(full)
    np.testing.assert_allclose([shares[code] for code in full], max(shares.values()), rtol=1e-6)
    assert recovery.parts["en", "curated"].share > recovery.parts["zh", "curated"].share > 0
    # Continued training: textbooks weigh more beside the same language's web text; low-resource languages
    # get more, and English keeps its part.
    assert continued.share(textbooks) > 3 * recovery.share(textbooks)
    assert continued.share(low) > 1.25 * recovery.share(low)
    assert continued.share([key for key in supply if key[0] == "en"]) > 0.1
    assert all(
        part.epochs <= 4 * (1 + 1e-6) for stage in (recovery, continued) for part in stage.parts.values()
    )


def test_without_stages_or_data(prepared, config_file, tmp_path, capsys):
    assert main(["mixture", str(config_file(prepared({("en", "web"): 10})))]) == 2
    assert "stages is empty" in capsys.readouterr().err
    assert main(["mixture", str(config_file(tmp_path / "none", 'name = "one"\nsteps = 1'))]) == 2
    assert "run `babel prepare`" in capsys.readouterr().err
