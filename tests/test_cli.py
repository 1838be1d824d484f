"""The `babel` command as a user meets it: exit status, one line for a mistake, one JSON object."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from babel_jax.cli import main
from babel_jax.config import ExpansionSettings, Init
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.errors import BadInput
from babel_jax.expansion.plan import plan_from_settings
from babel_jax.expansion.verification import logits_difference
from babel_jax.recipe import recipe
from babel_jax.training.metrics import Metrics


@pytest.fixture
def babel(capsys):
    """Runs a command; gives its exit status, standard output and standard error."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def config_file(small_settings, small_model, tmp_path_factory):
    """A config of two steps from random weights, with its own data folder, and its run folder."""
    folder = tmp_path_factory.mktemp("cli")
    sources = "\n".join(
        f'[[data.sources]]\nlanguage = "{source.language}"\npath = "{source.path}"'
        for source in small_settings.sources
    )
    path = folder / "config.toml"
    path.write_text(f"""
out = "{folder / "run"}"
export_dtype = "float32"
[model.shape]
vocab_size = 1280
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
max_position_embeddings = 128
[training]
global_batch_size = 4
compute_dtype = "float32"
[[stages]]
name = "only"
steps = 4
schedule = {{ peak = 1e-3 }}
mixture = {{ max_epochs = 1000.0 }}
[data]
folder = "{folder / "data"}"
tokenizer = "{small_model}"
seq_len = 64
heldout_fraction = 0.1
{sources}
""")
    return path


@pytest.fixture(scope="session")
def trained(config_file):
    """The run folder of the config, trained by the command."""
    assert main(["train", str(config_file), "--json"]) == 0
    return config_file.parent / "run"


def test_without_a_command_it_says_what_there_is(babel):
    status, out, _ = babel()
    assert status == 0
    assert all(
        name in out for name in ("demo", "convert", "expand", "prepare", "train", "evaluate", "generate")
    )


def test_help_imports_no_large_package():
    code = (
        "import sys, babel_jax.cli as c\ntry: c.main(['train', '--help'])\nexcept SystemExit: "
        "pass\nprint('imported:', *{'jax', 'numpy', 'pydantic', 'tqdm', 'absl'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("imported:\n")
    assert "example: babel train" in found.stdout


def test_prepare(babel, config_file):
    status, out, _ = babel(
        "prepare", config_file, "--json", "--set", f"data.folder={config_file.parent / 'other'}"
    )
    found = json.loads(out)
    assert status == 0
    assert found["windows"] > 0
    assert found["tokens"] > 0
    assert set(found["languages"]) == {"en", "zh", "sw", "ha"}
    for name in ("overlaps", "heldout_documents"):
        assert found[name] == sum(entry[name] for entry in found["languages"].values())


def test_train_and_its_result(babel, config_file, trained):
    status, out, _ = babel("train", config_file, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["out"] == str(trained)
    assert found["hf"] == str(trained / "hf")
    assert set(found["bits_per_byte"]["only"]) == {"en", "zh", "sw", "ha"}


def test_progress_and_the_mixture_go_to_standard_error(config_file, trained, tmp_path):
    command = [
        sys.executable,
        "-m",
        "babel_jax.cli",
        "train",
        str(config_file),
        "--set",
        f"out={tmp_path / 'run'}",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "stage only: steps 1 to 4, " in found.stderr
    assert (tmp_path / "run" / "mixture.txt").read_text().startswith("stage only\nlanguage  kind")
    assert "rate" in (tmp_path / "run" / "optimizer.txt").read_text().splitlines()[1]
    assert "bits per byte, only: all" in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stdout.startswith("# Bits per byte on held-out text")


def test_control_c_is_130_and_the_same_command_goes_on(babel, config_file, trained, tmp_path, monkeypatch):
    def press(self, step, *rest, log=Metrics.log):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return log(self, step, *rest)

    command = ("train", config_file, "--set", f"out={tmp_path / 'run'}", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", press)
        status, out, err = babel(*command)
    assert (status, out) == (130, "")
    assert "babel: saved step 2 of 4; the same command resumes" in err
    status, out, _ = babel(*command)
    assert status == 0
    assert (
        json.loads(out)["bits_per_byte"]
        == json.loads((trained / "summary.json").read_text(encoding="utf-8"))["bits_per_byte"]
    )


@pytest.mark.parametrize("where", ["between two steps", "in an evaluation"])
def test_sigterm_is_0_and_the_same_command_goes_on(babel, config_file, trained, tmp_path, monkeypatch, where):
    def warn(*arguments, **names):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **names)

    place = (Metrics, "log") if where == "between two steps" else (recipe, "evaluate_point")
    original = getattr(*place)
    command = ("train", config_file, "--set", f"out={tmp_path / 'run'}", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(*place, warn)
        status, out, _ = babel(*command)
    stopped = json.loads(out)
    assert (status, stopped["preempted"]) == (0, True)
    assert stopped["summary"].startswith("stopped by SIGTERM")
    assert stopped["summary"].endswith("; the same command resumes")
    status, out, _ = babel(*command)
    assert status == 0
    assert (
        json.loads(out)["bits_per_byte"]
        == json.loads((trained / "summary.json").read_text(encoding="utf-8"))["bits_per_byte"]
    )


def test_convert_expand_and_generate(babel, trained, tmp_path):
    status, out, _ = babel("convert", trained / "hf", tmp_path / "orbax", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["layers"] == 2
    assert found["bytes_written"] >= 4 * found["parameters"]
    assert set(found) >= {"seconds", "peak_rss_bytes"}

    plan = tmp_path / "plan.json"
    status, out, _ = babel(
        "expand",
        tmp_path / "orbax",
        tmp_path / "deep",
        "--append",
        2,
        "--init",
        "zero",
        "--save-plan",
        plan,
        "--json",
    )
    assert status == 0
    assert json.loads(out)["layers"] == 4
    status, out, _ = babel("expand", trained / "hf", tmp_path / "deep-hf", "--plan", plan, "--json")
    assert status == 0
    assert json.loads(out)["layers"] == 4

    texts = []
    for folder in (trained / "hf", tmp_path / "orbax", tmp_path / "deep", tmp_path / "deep-hf"):
        status, out, _ = babel("generate", folder, "All human beings", "--max-new-tokens", 8, "--json")
        found = json.loads(out)
        assert status == 0
        assert found["prompt"] == "All human beings"
        assert 1 <= len(found["tokens"]) <= 8
        texts.append((found["text"], found["tokens"]))
    assert texts == texts[:1] * 4


def test_relative_folders_of_both_formats(babel, trained, tmp_path, monkeypatch):
    (tmp_path / "hf").symlink_to(trained / "hf")
    monkeypatch.chdir(tmp_path)
    for command in (
        ("convert", "hf", "orbax", "--verify"),
        ("expand", "orbax", "deeper", "--append", 1, "--init", "noise", "--verify"),
        ("convert", "deeper", "back"),
        ("generate", "deeper", "All human beings", "--max-new-tokens", 2),
    ):
        status, _, err = babel(*command)
        assert status == 0, err


def test_verify_compares_logits_where_the_model_fits(babel, trained, tmp_path):
    command = (
        "expand",
        trained / "hf",
        tmp_path / "same",
        "--append",
        1,
        "--init",
        "noise",
        "--verify",
        "--json",
    )
    status, out, _ = babel(*command)
    assert (status, json.loads(out)["verified"]["logits_difference"]) == (0, 0.0)
    # Found out where the folder that was written is another model.
    other = tmp_path / "other"
    assert (
        babel("expand", trained / "hf", other, "--append", 1, "--init", "noise", "--noise-std", "1.0")[0] == 0
    )
    plan = plan_from_settings(ExpansionSettings(append=1, init=Init.NOISE), 2)
    with pytest.raises(BadInput, match="its logits differ by"):
        logits_difference(str(trained / "hf"), str(other), plan, 2**31)
    assert (
        logits_difference(str(trained / "hf"), str(other), plan, 1000)
        == "not compared: the model exceeds the memory limit"
    )


def test_verify_where_the_layers_differ_in_type(babel, trained, tmp_path):
    shutil.copytree(trained / "hf", tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].astype(
        np.float16
    )
    save_file(tensors, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    for command, found in (
        (("convert", tmp_path / "mixed", tmp_path / "again", "--to", "hf"), 0.0),
        (
            ("expand", tmp_path / "mixed", tmp_path / "deeper", "--append", 1, "--init", "average"),
            "not compared: the layers differ in type",
        ),
    ):
        status, out, _ = babel(*command, "--verify", "--json")
        assert (status, json.loads(out)["verified"]["logits_difference"]) == (0, found)


def test_report(babel, trained, tmp_path):
    status, out, err = babel("report", trained, "--out", tmp_path / "page.html", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["path"] == str(tmp_path / "page.html")
    assert found["gate"] is None
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (trained / "report.html").is_file()


def test_a_prompt_that_is_not_utf8(babel, trained):
    status, _, err = babel("generate", trained / "hf", "caf\udce9")
    assert (status, "the prompt is not UTF-8" in err) == (2, True)


def test_evaluate(babel, trained, small_settings, tmp_path):
    texts = tmp_path / "text"
    texts.mkdir()
    for source in small_settings.sources:
        rows = read_rows(source, "refuse", RowCounts())
        (texts / f"{source.language}.jsonl").write_text(
            "".join(json.dumps({"text": row.text}) + "\n" for row in rows)
        )
    status, out, _ = babel("evaluate", trained / "hf", "--data", texts, "--languages", "sw,en", "--json")
    found = json.loads(out)
    assert status == 0
    scores = found["tasks"]["bits_per_byte"]
    assert set(scores) == {"sw", "en"}
    assert set(scores["sw"]) == {"score", "stderr", "n", "bytes"}
    assert found["means"]["low"] == pytest.approx(scores["sw"]["score"])
    assert found["means"]["high"] == pytest.approx(scores["en"]["score"])

    status, out, _ = babel("evaluate", trained / "hf", "--data", texts, "--languages", "sw", "--json")
    assert json.loads(out)["means"]["high"] is None

    status, out, err = babel("evaluate", trained / "hf", "--data", texts, "--languages", "th")
    assert (status, err) == (2, f"babel: {texts}: no text for th\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "missing.toml"), "missing.toml: no such config file"),
        (
            ("train", "CONFIG", "--set", "trainning.remat=full"),
            "trainning: unknown key; did you mean training",
        ),
        (("train", "CONFIG", "--set", "data.seq_len=4096"), "seq_len = 4096 exceeds"),
        (("convert", "missing", "DST"), "missing: no such model folder"),
        (("expand", "MODEL", "DST", "--preset", "babel-7b"), "babel-9b"),
        (("expand", "MODEL", "DST", "--preset", "babel-9b"), "28"),
        (("expand", "MODEL", "DST"), "give exactly one of preset, new_layers, insert_after"),
        (("convert", "MODEL", "MODEL"), "exists"),
        (("generate", "MODEL", ""), "the prompt is empty"),
        (("generate", "MODEL", "x", "--temperature", "-1"), "temperature"),
        (("evaluate", "MODEL", "--languages", "xx"), "xx"),
        (("generate", "MODEL", "x", "--temperature", "nan"), "temperature"),
        (
            ("expand", "MODEL", "DST", "--append", "1", "--noise-std", "3"),
            "--noise-std has no effect without --init noise",
        ),
        (
            ("expand", "MODEL", "DST", "--append", "1", "--init", "noise", "--noise-mean", "1e39"),
            "noise_mean: Input should be less than",
        ),
        (
            ("expand", "MODEL", "DST", "--append", "1", "--init", "noise", "--noise-mean", "inf"),
            "noise_mean: Input should be a finite",
        ),
        (
            ("expand", "MODEL", "DST", "--append", "1", "--init", "noise", "--noise-std", "2e4"),
            "noise_std: Input should be less than",
        ),
        (("expand", "MODEL", "DST", "--plan", "FILE", "--init", "zero"), "--init has no effect with --plan"),
        (("expand", "MODEL", "DST", "--plan", "FILE", "--seed", "3"), "--seed has no effect with --plan"),
        (("expand", "MODEL", "DST", "--auto", "1", "--append", "1"), "--auto chooses the layers"),
        (("expand", "MODEL", "DST", "--auto", "3"), "--auto 3: the model has 2 layers"),
        (
            ("expand", "MODEL", "DST", "--append", "1", "--data", "EMPTY"),
            "--data has no effect without --auto",
        ),
        (
            ("expand", "MODEL", "DST", "--append", "1", "--languages", "sw"),
            "--languages has no effect without --auto",
        ),
        (
            ("expand", "MODEL", "DST", "--append", "1", "--max-bytes", "9"),
            "--max-bytes has no effect without --auto",
        ),
        (
            ("expand", "MODEL", "DST", "--append", "1", "--save-plan", "FILE/plan.json"),
            "plan.json: there is no folder",
        ),
        (
            ("ablate", "MODEL", "--out", "DST", "--variants", "among:copies"),
            "variant 'among:copies' is not known",
        ),
        (
            ("ablate", "MODEL", "--out", "DST", "--variants", "after:copy:slow"),
            "variant 'after:copy:slow' is not known",
        ),
        (("sensitivity", "MODEL", "--out", "FILE"), "no folder can be made here (File exists)"),
        (("convert", "MODEL", "FILE/x"), "no folder can be made here"),
        (("train", "CONFIG", "--set", "out=FILE"), "no folder can be made here (File exists)"),
        (("train", "CONFIG", "--set", "out=FILE/run"), "no folder can be made here (Not a directory)"),
        (("prepare", "CONFIG", "--set", "data.folder=FILE"), "no folder can be made here (File exists)"),
        (
            ("train", "CONFIG", "--set", "out=DST", "--set", "data.heldout_fraction=0.3"),
            "prepared with another heldout_fraction (then 0.1, now 0.3)",
        ),
        (("evaluate", "MODEL", "--data", "EMPTY"), "no text of two tokens or more in sw"),
        (("evaluate", "MODEL", "--tasks", "xcop"), "unknown task 'xcop': did you mean xcopa"),
        (("evaluate", "MODEL", "--baseline", "missing"), "missing: no such model folder"),
        (
            ("evaluate", "MODEL", "--tasks", "xcopa", "--data", "EMPTY", "--languages", "id"),
            "for id it needs",
        ),
        (("report", "EMPTY"), "not a run folder (it has no config.toml), nor a demo's"),
        (("report", "MODEL/..", "--out", "EMPTY"), "a folder; give the name of a file"),
        (("demo", "--out", "FILE"), "no folder can be made here (File exists)"),
        (("demo", "--out", "DST", "--base", "missing"), "missing: no such model folder"),
        (("demo", "--out", "DST", "--corpus", "missing"), "missing: no such folder of text"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(babel, config_file, trained, tmp_path, arguments, says):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "sw.jsonl").write_text('{"text": "a"}\n')
    places = {
        "CONFIG": config_file,
        "MODEL": trained / "hf",
        "DST": tmp_path / "out",
        "FILE": tmp_path / "file",
        "EMPTY": tmp_path / "empty",
    }
    pattern = re.compile("|".join(places))
    status, out, err = babel(
        *(pattern.sub(lambda found: str(places[found[0]]), argument) for argument in arguments)
    )
    assert (status, out) == (2, "")
    assert err.startswith("babel: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("convert", "a", "b", "--memory-limit", "nan"), "'nan' is not a number of GiB, such as 4"),
        (("expand", "a", "b", "--memory-limit", "1e300"), "'1e300' is not a number of GiB, such as 4"),
        (
            ("expand", "a", "b", "--insert-after", "1,x"),
            "'1,x' is not a list of whole numbers, such as 14,16",
        ),
        (("expand", "a", "b", "--append", "0"), "'0' is not a whole number of 1 or more"),
        (
            ("generate", "a", "b", "--seed", "99999999999"),
            "'99999999999' is not a whole number from 0 to 4294967295",
        ),
        (("generate", "a", "b", "--max-new-tokens", "-3"), "'-3' is not a whole number of 1 or more"),
        (("report", "a", "--tolerance", "-1"), "'-1' is not a percentage of 0 or more, such as 0.5"),
        (
            ("train", "a", "--profile", "13:10"),
            "'13:10' is not a range of steps, such as 10:13 for the steps 10, 11 and 12",
        ),
        (("evaluate", "a", "--few-shot", "-1"), "'-1' is not a whole number of 0 or more"),
        (("evaluate", "a", "--max-bytes", "0"), "'0' is not a whole number of 1 or more"),
    ],
)
def test_an_option_of_the_wrong_kind_is_named(babel, capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        babel(*arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_sensitivity_ablate_and_auto(babel, trained, small_settings, tmp_path):
    texts = tmp_path / "text"
    texts.mkdir()
    for source in small_settings.sources:
        rows = read_rows(source, "refuse", RowCounts())
        (texts / f"{source.language}.jsonl").write_text(
            "".join(json.dumps({"text": row.text}) + "\n" for row in rows)
        )
    data = ("--data", texts)
    status, out, _ = babel("sensitivity", trained / "hf", *data, "--out", tmp_path / "sensitivity", "--json")
    found = json.loads(out)
    assert status == 0
    assert len(found["cosine"]) == len(found["removed"]) == len(found["doubled"]) == found["layers"] == 2
    assert set(found["model"]) == {"en", "zh", "sw", "ha"}
    written = {path.name for path in (tmp_path / "sensitivity").iterdir()}
    names = {f"sensitivity.{kind}" for kind in ("md", "json", "png", "html")}
    assert written == {*names, "layers.json"}

    best = min(range(2), key=lambda layer: sum(found["doubled"][layer].values()))
    status, out, _ = babel(
        "expand",
        trained / "hf",
        tmp_path / "auto",
        "--auto",
        1,
        *data,
        "--save-plan",
        tmp_path / "plan.json",
        "--json",
    )
    assert status == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [layer["source"] for layer in plan["layers"]] == sorted([0, 1, best])

    command = (
        "ablate",
        trained / "hf",
        *data,
        "--out",
        tmp_path / "ablation",
        "--tokens",
        512,
        "--seeds",
        "0,1",
        "--json",
    )
    small = (
        "--set",
        "data.seq_len=32",
        "--set",
        "training.global_batch_size=4",
        "--variants",
        "among:copy,after:zero,auto:scaled,among:copy:new-first,among:copy:new-rate,parent:compute",
    )
    status, out, _ = babel(*command, *small)
    found = json.loads(out)
    assert status == 0
    assert [(result["variant"], result["seed"]) for result in found["results"][:2]] == [
        ("among:copy", 0),
        ("after:zero", 0),
    ]
    by_name = {(result["variant"], result["seed"]): result for result in found["results"]}
    assert len(by_name) == 12
    assert by_name["after:zero", 1]["before"] == pytest.approx(found["base"])
    assert by_name["among:copy", 0]["steps"] == 4 < by_name["parent:compute", 0]["steps"]
    assert by_name["among:copy", 0]["after"] != by_name["among:copy", 1]["after"]
    # Trained otherwise from the same beginning, for as many steps.
    for training in ("new-first", "new-rate"):
        same, other = by_name["among:copy", 0], by_name[f"among:copy:{training}", 0]
        assert (other["before"], other["layers"], len(other["losses"])) == (
            same["before"],
            same["layers"],
            len(same["losses"]),
        )
        assert other["after"] != same["after"]
    assert (tmp_path / "ablation" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "| parent:compute |" in (tmp_path / "ablation" / "ablation.md").read_text()
    again = babel(*command, *small)
    assert json.loads(again[1]) == found
    status, _, err = babel(*command[:-1], *small, "--set", "evaluation.max_bytes=5")
    assert (status, "begun with another set (see" in err) == (2, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    command = [*command[: command.index("--out") + 1], str(tmp_path / "mine")]
    status, _, err = babel(*command, *small)
    assert (status, "not empty and not a folder of a study" in err) == (2, True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("init", "--new-layers", "-1"), "argument --new-layers: .* is not a whole number of 1 or more"),
        (("init", "--tokens", "9" * 5000), "argument --tokens: .*9 \\.\\.\\. 9"),
        (("convert",), "the following arguments are required: SRC, DST"),
        (("trian",), "no command is named 'trian'; near: train"),
        (("tokenizer", "reprot"), "no command is named 'reprot'; near: report"),
        (("xyzzy",), "no command is named 'xyzzy'"),
        (("status", "run", "--loud"), "no option is named --loud"),
        (("plan", "a.toml", "--device", "l4", "--topolgy=v5e:8x8"), "named --topolgy; near: --topology"),
        (("train", "a.toml", "b.toml"), "one argument too many: b.toml"),
        (("train", "a.toml", "--set", "a=1", "b=2"), "has a --set of its own: --set b=2"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(capsys, arguments, line):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert re.fullmatch(rf"babel: .*{line}.*; see `babel.* --help`\n", told), told[:300]
    assert len(told) < 2_200


def test_a_prompt_that_is_not_in_the_vocabulary_of_options(babel):
    with pytest.raises(SystemExit) as stopped:
        babel("convert", "a", "b", "--to", "gguf")
    assert stopped.value.code == 2
