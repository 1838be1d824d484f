"""A run that extends its vocabulary, by several real processes: killed while it does so, and resumed."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.training.test_processes import losses, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(settings_of, tmp_path_factory):
    """The path of the config of such a run, on a mesh of four devices."""
    folder = tmp_path_factory.mktemp("several")
    path = folder / "run.toml"
    settings_of(
        out=str(folder / "run"),
        data={"folder": str(folder / "data")},
        training={"mesh": {"fsdp": 2, "tensor": 2}},
    ).save(path)
    return path


def tensors_of(folder):
    """All tensors of a folder's safetensors files."""
    found = {}
    for file in (folder / "hf").glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_killed_while_the_vocabulary_grows_two_processes_give_what_one_does(config):
    alone = config.with_name("alone")
    folders = [f"out={alone}", f"data.folder={alone}-data"]
    ((status, output, errors),) = train(config, 1, overrides=folders)
    assert status == 0, errors[-3000:]
    expected = json.loads(output)

    # The first process is killed while it writes the extension, then the second after the tables have grown.
    out, data = config.with_name("run"), config.with_name("data")
    for orders, killed in (("KILL:0:extension", 0), ("KILL:1:growth", 1)):
        ended = train(config, 2, orders=orders)
        assert ended[killed][0] == -9, ended[killed][2][-3000:]
        assert ended[1 - killed][0] not in (0, None)
        assert "Traceback" not in ended[1 - killed][2]
        assert not (out / "metrics.jsonl").exists()
        # Half an extension is never taken for a whole one.
        assert (data.with_name("data-vocabulary") / "made_from.json").is_file() == (killed == 1)

    ended = train(config, 2)
    assert [status for status, *_ in ended] == [0, 0], "\n".join(errors[-3000:] for *_, errors in ended)
    found = json.loads(ended[0][1])
    assert list(found["bits_per_byte"]) == ["base", "extended", "expanded", "rows", "all"]
    for point, values in expected["bits_per_byte"].items():
        assert found["bits_per_byte"][point] == pytest.approx(values, rel=1e-5)
    np.testing.assert_allclose(list(losses(out).values()), list(losses(alone).values()), rtol=1e-5)
    ours, theirs = tensors_of(out), tensors_of(alone)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, atol=1e-5, err_msg=name)
    for file in ("tokenizer.json", "made_from.json", "config.json"):
        made = [data.with_name(f"{name}-vocabulary") / file for name in ("data", "alone-data")]
        assert made[0].read_bytes() == made[1].read_bytes()


def test_a_resume_with_another_tokenizer_is_refused(config, qwen_files, make_model, tmp_path):
    """The model's tokenizer gets one more token after the run began."""
    model = tmp_path / "model"
    shutil.copytree(make_model(qwen_files, 640), model)
    settings = [f"out={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}", f"model.folder={model}"]
    stopped = train(config, 2, orders="TERM:1:1", overrides=settings)
    assert [status for status, *_ in stopped] == [0, 0], "\n".join(errors[-3000:] for *_, errors in stopped)
    assert json.loads(stopped[0][1])["preempted"]

    content = json.loads((model / "tokenizer.json").read_text())
    token = {
        **content["added_tokens"][-1],
        "content": "<|late|>",
        "id": content["added_tokens"][-1]["id"] + 1,
    }
    content["added_tokens"].append(token)
    (model / "tokenizer.json").write_text(json.dumps(content))
    ended = train(config, 2, overrides=settings)
    assert [status for status, *_ in ended] == [2, 2]
    for *_, errors in ended:
        (line,) = [line for line in errors.splitlines() if line.startswith("babel: ")]
        assert "data-vocabulary: made with another [vocabulary], text or model; give another" in line
        assert "Traceback" not in errors
