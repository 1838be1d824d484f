"""The small model: its scores against torch, what it learns of planted quality, and the
rows that it scores.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from babel_jax.cli import main
from babel_jax.config import ComputeType, ModelConfig
from babel_jax.config.quality import ClassifierSettings
from babel_jax.config.training import Schedule
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.draws import Purpose, unit_draw
from babel_jax.model_folders.folder import Format
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import save_folder
from babel_jax.quality.regressor import Regressor, pack_documents, with_head
from babel_jax.training.mesh import make_mesh
from tests.compiled import init_params
from tests.evaluation import test_scoring
from tests.evaluation.test_scoring import CONFIGS
from tests.forced_devices import forced_devices

SHAPE = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def base(chat_tokenizer, tmp_path_factory):
    """A model folder with random weights and an output projection of its own."""
    config = ModelConfig(**SHAPE, max_position_embeddings=256)
    params = init_params(config, jax.random.key(0))
    folder = tmp_path_factory.mktemp("base") / "hf"
    save_folder(folder, Format.HF, params, write_hf_config(config, eos_token_id=0), chat_tokenizer)
    return folder


def test_scores_are_those_of_torch_whatever_shares_the_window(
    chat_tokenizer, reference_model, stacked_tree, texts, base
):
    torch = pytest.importorskip("torch")
    config = ModelConfig(**SHAPE, max_position_embeddings=256, tie_word_embeddings=True)
    model = reference_model(config)
    tokenizer = open_tokenizer(chat_tokenizer)
    params = with_head(stacked_tree(dict(model.named_parameters())), 32, 2)
    head = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    params["head"] = {"weight": jnp.asarray(head), "bias": jnp.asarray([0.25, -1.0])}
    settings = ClassifierSettings(
        model=str(base), seq_len=64, batch_size=4, compute_dtype=ComputeType.FLOAT32
    )
    documents = [text[:length] for text in texts.values() for length in (10, 30, 400)]
    ((scores, speed),) = Regressor(config, params, tokenizer, settings).score(documents)
    for document, score in zip(documents, scores, strict=True):
        ids = torch.tensor([[*tokenizer.encode(document)[:63], 0]])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0, -1].numpy()
        np.testing.assert_allclose(score, head @ hidden + [0.25, -1.0], atol=1e-4)
    assert speed.documents == len(documents)
    assert speed.tokens == sum(min(64, len(tokenizer.encode(document)) + 1) for document in documents)


# Every axis is over 1 in one of them.
MESHES = {"qwen2": test_scoring.MESHES["qwen2"][:2], "gemma2": test_scoring.MESHES["gemma2"][:1]}


class Letters:
    """A tokenizer as far as the regressor needs one."""

    begin_ids, eos_id = (1,), 2

    def encode_batch(self, texts):
        return [[3 + byte % 58 for byte in text.encode()] for text in texts]


def measured_regressor(config, mesh):
    """Scores of 21 documents, the losses of six steps with batches of five rows, and the largest share of the
    parameters that one device holds."""
    tied = config.model_copy(update={"tie_word_embeddings": True, "initializer_range": 0.3})
    params = with_head(init_params(tied, jax.random.key(0)), tied.hidden_size, 2)
    head = np.random.default_rng(0).normal(size=(2, tied.hidden_size))
    params["head"]["weight"] = jnp.asarray(head, jnp.float32)
    settings = ClassifierSettings(
        model="none",
        seq_len=24,
        batch_size=5,
        epochs=3.0,
        schedule=Schedule(peak=1e-3),
        compute_dtype=ComputeType.FLOAT32,
    )
    texts = ["abcdefghijklmnop"[: 1 + number % 16] * (1 + number % 3) for number in range(21)]
    regressor = Regressor(tied, params, Letters(), settings, mesh)
    ((scores, _),) = regressor.score(texts)
    targets = np.linspace(0, 1, 2 * len(texts), dtype=np.float32).reshape(-1, 2)
    losses = regressor.train(texts, targets, seed=0)
    leaves = jax.tree.leaves(regressor.params)
    own = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    return scores.tolist(), losses[:6], own / sum(leaf.size for leaf in leaves)


@pytest.mark.slow
def test_scores_and_losses_are_the_same_on_every_mesh_of_eight_devices():
    command = [sys.executable, "-m", "tests.quality.on_meshes"]
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        command, env=forced_devices(8), cwd=root, capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [line for line in ended.stdout.splitlines() if line.startswith("SEEN ")]
    seen = [json.loads(line.removeprefix("SEEN ")) for line in lines]
    assert len(seen) == sum(map(len, MESHES.values()))
    # One device is compared with torch above.
    expected = {family: measured_regressor(config, make_mesh({})) for family, config in CONFIGS.items()}
    for family, sizes, scores, losses, share in seen:
        expected_scores, expected_losses, whole = expected[family]
        np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-5, err_msg=str(sizes))
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, err_msg=str(sizes))
        copies = sizes.get("data", 1)
        assert copies / 8 <= share < copies / 8 + 0.05, sizes
        assert whole == 1


def test_packing_documents(chat_tokenizer, texts):
    tokenizer = open_tokenizer(chat_tokenizer)
    windows = pack_documents([*texts.values(), ""], tokenizer, 64)
    assert len(windows.tokens) < len(texts)
    for document, (window, end) in zip(
        [*texts.values(), ""], zip(windows.window, windows.end, strict=True), strict=True
    ):
        own = windows.segment_ids[window] == windows.segment_ids[window, end]
        assert windows.tokens[window][own].tolist() == [*tokenizer.encode(document)[:63], 0]
        assert np.flatnonzero(own)[-1] == end


@pytest.fixture(scope="module")
def config_file(base, texts, tmp_path_factory):
    """Planted quality: of each text some copies have a part of their letters replaced by signs, and are
    judged by how many.
    """
    folder = tmp_path_factory.mktemp("quality")
    draw = random.Random(0)
    rows, judged = {"en": [], "ha": []}, []
    for language in rows:
        for number in range(120):
            spoiled = draw.choice([0, 1, 2, 3, 4, 5]) / 5 * (1.0 if language == "en" else 0.6)
            words = texts[language].split()
            draw.shuffle(words)
            text = "".join(
                "#" if letter.isalpha() and draw.random() < spoiled else letter for letter in " ".join(words)
            )
            rows[language].append({"id": f"{language}{number}", "text": text})
            scores = {"fluency": 5 - 5 * spoiled, "substance": 5 - 4 * spoiled}
            judged.append(
                {
                    "id": f"{language}{number}",
                    "language": language,
                    "text": text,
                    "scores": scores,
                    "score": 5 - 4.5 * spoiled,
                }
            )
        (folder / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[language]))
    (folder / "out").mkdir()
    (folder / "out" / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    path = folder / "quality.toml"
    sources = "\n".join(f'[[sources]]\nlanguage = "{code}"\npath = "{folder / code}.jsonl"' for code in rows)
    path.write_text(f"""
out = "{folder / "out"}"
[judge]
dimensions = {{ fluency = "a", substance = "b" }}
[classifier]
model = "{base}"
seq_len = 64
batch_size = 8
epochs = 12.0
schedule = {{ peak = 3e-3, warmup_fraction = 0.1 }}
heldout_fraction = 0.25
compute_dtype = "float32"
{sources}
""")
    return path


@pytest.fixture(scope="module")
def trained(config_file):
    assert main(["classifier", str(config_file), "--json"]) == 0
    return config_file.parent / "out"


def test_it_learns_the_judges_scores(trained):
    quality = json.loads((trained / "classifier" / "quality.json").read_text())
    assert list(quality["agreement"]) == ["en", "ha", "all"]
    assert (
        quality["agreement"]["all"]["n"] == sum(quality["agreement"][code]["n"] for code in ("en", "ha")) > 30
    )
    assert quality["agreement"]["all"]["spearman"] > 0.8
    assert quality["agreement"]["all"]["roc_auc"] > 0.9
    assert quality["agreement"]["all"]["error"] < 0.03
    assert "| Hausa (ha) |" in (trained / "classifier" / "agreement.md").read_text()


def test_rows_get_scores_that_compare_within_their_language(config_file, trained, capsys):
    assert main(["score", str(config_file), "--languages", "ha,th"]) == 2
    assert "no source is of th; there are sources of en ha" in capsys.readouterr().err
    assert main(["score", str(config_file), "--languages", "ha", "--json"]) == 0
    capsys.readouterr()
    assert not (trained / "scored" / "en.jsonl").exists()
    assert main(["score", str(config_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["languages"]) == ["en", "ha"]
    assert found["tokens_per_second"] > 0
    before = {path.name: path.stat().st_mtime_ns for path in (trained / "scored").iterdir()}
    assert main(["score", str(config_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert {path.name: path.stat().st_mtime_ns for path in (trained / "scored").iterdir()} == before
    # Scored before by something else, it is scored anew.
    other = json.loads((trained / "scored" / "ha.json").read_text()) | {"made": "something else"}
    (trained / "scored" / "ha.json").write_text(json.dumps(other))
    assert main(["score", str(config_file), "--json"]) == 0
    capsys.readouterr()
    assert json.loads((trained / "scored" / "ha.json").read_text())["made"] != "something else"
    for language in ("en", "ha"):
        rows = [
            json.loads(line) for line in (trained / "scored" / f"{language}.jsonl").read_text().splitlines()
        ]
        given = [
            json.loads(line) for line in (config_file.parent / f"{language}.jsonl").read_text().splitlines()
        ]
        assert [(row["id"], row["text"]) for row in rows] == [(row["id"], row["text"]) for row in given]
        assert np.mean([row["score"] >= 0.3 for row in rows]) == pytest.approx(0.7, abs=0.05)
        clean = [row["raw_score"] for row in rows if "#" not in row["text"]]
        assert np.mean(clean) > np.mean([row["raw_score"] for row in rows]) + 0.1
        # Raw scores are written rounded, so some that differ look the same.
        pairs = sorted((row["raw_score"], row["score"]) for row in rows)
        scores = [score for _, score in pairs]
        assert (np.diff(scores) >= 0).all()


def test_a_threshold_keeps_the_same_share_of_each_language(config_file, trained, capsys):
    def kept(*changes):
        assert (
            main(
                [
                    "score",
                    str(config_file),
                    "--json",
                    *(part for change in changes for part in ("--set", change)),
                ]
            )
            == 0
        )
        languages = json.loads(capsys.readouterr().out)["languages"]
        for code, entry in languages.items():
            assert len((trained / "scored" / f"{code}.jsonl").read_text().splitlines()) == entry["kept"]
        return {code: entry["kept"] / entry["documents"] for code, entry in languages.items()}

    assert kept("classifier.threshold=0.4") == {
        "en": pytest.approx(0.6, abs=0.05),
        "ha": pytest.approx(0.6, abs=0.05),
    }
    assert kept("classifier.threshold=0.4", "classifier.thresholds={ha=0.0}") == {
        "en": pytest.approx(0.6, abs=0.05),
        "ha": 1.0,
    }
    # On the judge's own scale English, of which more is spoiled, loses more.
    shares = kept("classifier.threshold=0.6", 'classifier.calibration="none"')
    assert shares["en"] < shares["ha"] - 0.1


def test_what_is_missing_is_said(config_file, trained, tmp_path, capsys):
    for command, out, says in (
        ("classifier", trained, "exists already"),
        ("classifier", tmp_path / "new", "run `babel judge` first"),
        ("score", tmp_path / "new", "run `babel classifier` first"),
    ):
        assert main([command, str(config_file), "--set", f"out={out}"]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    other = ("--set", 'judge.dimensions={tone = "x"}', "--set", f"out={tmp_path / 'old'}")
    # The first call makes the folder.
    assert main(["classifier", str(config_file), *other]) == 2
    capsys.readouterr()
    (tmp_path / "old" / "judged.jsonl").write_bytes((trained / "judged.jsonl").read_bytes())
    assert main(["classifier", str(config_file), *other]) == 2
    assert "judged on fluency, substance, not on judge.dimensions" in capsys.readouterr().err


def with_judged(config_file, tmp_path, documents):
    """A folder of judged documents, and the arguments that name it."""
    (tmp_path / "out").mkdir()
    rows = [
        {
            "id": f"{code}{number}",
            "language": code,
            "text": "a b c",
            "scores": {"fluency": 1.0, "substance": 1.0},
            "score": 1.0,
        }
        for code, count in documents.items()
        for number in range(count)
    ]
    (tmp_path / "out" / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "classifier",
        str(config_file),
        "--set",
        f"out={tmp_path / 'out'}",
        "--set",
        "classifier.epochs=0.1",
    ]


@pytest.mark.parametrize(
    ("documents", "says"), [({"en": 5}, "ha (0 judged)"), ({"en": 5, "ha": 1}, "ha (1 judged, all held out)")]
)
def test_a_language_without_a_document_to_train_on_is_refused(config_file, tmp_path, capsys, documents, says):
    command = with_judged(config_file, tmp_path, documents)
    fraction = unit_draw(Purpose.CLASSIFIER_HELDOUT, "ha0") + 1e-9 if "ha" in documents else 0.0
    assert main([*command, "--set", f"classifier.heldout_fraction={fraction}"]) == 2
    error = capsys.readouterr().err
    assert f"no document to train on in {says}" in error
    assert not (tmp_path / "out" / "classifier").exists()


def test_documents_are_counted_by_language(config_file, tmp_path, capsys):
    command = with_judged(config_file, tmp_path, {"en": 30, "ha": 20})
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr()
    counts = json.loads(said.out)["languages"]
    assert {code: own["trained"] + own["heldout"] for code, own in counts.items()} == {"en": 30, "ha": 20}
    for code, own in counts.items():
        assert own["heldout"] == sum(
            unit_draw(Purpose.CLASSIFIER_HELDOUT, f"{code}{n}") < 0.25
            for n in range(30 if code == "en" else 20)
        )
        assert f"{code}: {own['trained']} documents to train on, {own['heldout']} held out" in said.err
