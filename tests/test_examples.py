"""The examples of `babel COMMAND --help`: each is parsed, and each runs, in the order of a first session.

The names in the examples are tiny files here: SmolLM2-135M has 4 layers, Qwen2.5-7B has 28.
"""

import io
import json
import shlex
import sys
from pathlib import Path

import jax
import pytest

from babel_jax.cli import main
from babel_jax.commands.parser import BabelParser
from babel_jax.config import ModelConfig
from babel_jax.model_folders.folder import Format
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import save_folder
from tests.compiled import init_params
from tests.hub.corpora import put_corpus

EXAMPLES = {name: parser.examples for name, parser in BabelParser().commands.items()}
# These take minutes at any size, and have slow tests of their own.
ELSEWHERE = {
    "demo": "tests/recipe/test_demo_languages.py",
    "plan": "tests/tpu/test_plan.py",
    "rehearse": "tests/recipe/test_rehearsal.py",
}
# Options at the end make an example small; of an option that is given twice, the last one counts.
SMALL = {
    "init": ["--tokens", "6000"],
    "tune": ["--rounds", "1", "--steps", "1", "--try", "training.remat=full"],
    "ablate": ["--tokens", "256", "--new-layers", "1", "--set", "training.global_batch_size=4"],
    "sft": ["--set", "stages.0.steps=2"],
    "chat": ["--max-new-tokens", "4"],
}
ORDER = (
    "catalogue", "init", "prepare", "mixture", "statistics", "train", "watch", "status", "report", "verify",
    "evaluate", "generate", "push", "tune", "convert", "expand",
    "tokenizer report", "tokenizer extend", "sensitivity", "ablate", "sft", "chat", "judge", "classifier",
    "score", "completion",
)  # fmt: skip


def words_of(example: str) -> tuple[list[str], str]:
    """The arguments after `babel`, and the text that is piped into it."""
    words = shlex.split(example)
    piped = ""
    if "|" in words:
        piped, words = words[1], words[words.index("|") + 1 :]
    assert words[0] == "babel"
    if ">" in words:
        words = words[: words.index(">")]
    return words[1:], piped


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_command_has_examples_that_are_parsed(name):
    assert EXAMPLES[name]
    for example in EXAMPLES[name]:
        arguments, _ = words_of(example)
        assert BabelParser().parse_args(arguments).run is not None
        assert arguments[: len(name.split())] == name.split()


def test_every_command_is_run_by_a_test():
    assert sorted((*ORDER, *ELSEWHERE)) == sorted(EXAMPLES)
    for file in ELSEWHERE.values():
        assert (Path(__file__).parents[1] / file).is_file()


def write_model(folder, layers, tokenizer):
    shape = ModelConfig(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    params = init_params(shape, jax.random.key(0))
    save_folder(folder, Format.HF, params, write_hf_config(shape, eos_token_id=0), tokenizer)


CHAT = """
out = "runs/my-chat"
model.folder = "SmolLM2-135M"
stages = [{ name = "chat", steps = 2, schedule = { peak = 1e-3 }, mixture = { max_epochs = 1000.0 } }]
training = { global_batch_size = 4, compute_dtype = "float32" }
[data]
folder = "runs/my-chat-data"
seq_len = 128
heldout_fraction = 0.1
conversations = true
sources = [{ language = "ha", text_key = "messages", path = "chat.jsonl" }]
"""
QUALITY = """
out = "runs/quality"
sources = [{ language = "ha", path = "text/ha.jsonl" }, { language = "sw", path = "text/sw.jsonl" }]
[judge]
documents = 30
dimensions = { fluency = "Is it?" }
[classifier]
model = "SmolLM2-135M"
seq_len = 64
batch_size = 4
epochs = 0.3
heldout_fraction = 0.3
compute_dtype = "float32"
"""


@pytest.fixture
def workspace(small_settings, chat_tokenizer, write_rows, hub, tmp_path, monkeypatch):
    """A folder with all that the examples name and that no example makes, and an account on the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(hub.users, "hf_me", "me")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    put_corpus(hub, "fineweb-2")
    write_model(tmp_path / "SmolLM2-135M", 4, chat_tokenizer)
    write_model(tmp_path / "Qwen2.5-7B", 28, chat_tokenizer)
    Path("text").mkdir()
    for source in small_settings.sources:
        Path("text", f"{source.language}.jsonl").symlink_to(source.path)
    item = {"premise": "Mvua ilinyesha.", "choice1": "Ilikuwa kavu.", "choice2": "Ilikuwa maji."}
    for split in ("test", "validation"):
        write_rows(Path(f"items/xcopa/sw.{split}.jsonl"), [item | {"question": "effect", "label": 1}] * 2)
    conversations = []
    for number in range(20):
        turns = [("user", f"Habari {number}?"), ("assistant", f"Nzuri {number}.")]
        messages = [{"role": role, "content": content} for role, content in turns]
        conversations.append({"id": str(number), "messages": messages})
    write_rows(Path("chat.jsonl"), conversations)
    Path("my-chat.toml").write_text(CHAT)
    Path("quality.toml").write_text(QUALITY)
    return tmp_path


def answer_as_the_judge(prompts, replies):
    """Replies of a judge that likes long texts, in the form of OpenAI's batches."""
    lines = []
    for line in prompts.read_text(encoding="utf-8").splitlines():
        name = json.loads(line)["custom_id"]
        choice = {"message": {"content": json.dumps({"fluency": len(line) % 5})}}
        lines.append(json.dumps({"custom_id": name, "response": {"body": {"choices": [choice]}}}))
    replies.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_the_examples_run(workspace, monkeypatch, capsys):
    for name in ORDER:
        for example in EXAMPLES[name]:
            arguments, piped = words_of(example)
            monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
            status = main([*arguments, *SMALL.get(name, [])])
            said = capsys.readouterr()
            assert status == 0, f"{example}\n{said.err}"
            assert said.out, example
        if name == "judge":
            # The first call writes the prompts; after the replies came back, the same call reads them.
            answer_as_the_judge(Path("runs/quality/prompts.jsonl"), Path("runs/quality/replies.jsonl"))
            assert main(words_of(EXAMPLES[name][0])[0]) == 0
    assert Path("runs/my-run/run/report.html").is_file()
    assert json.loads(Path("babel-9b/config.json").read_text())["num_hidden_layers"] == 34
