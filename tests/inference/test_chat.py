"""Conversations against transformers, and `babel chat` on a terminal and behind a pipe."""

import io
import json

import jax
import numpy as np
import pytest

from babel_jax.cli import main
from babel_jax.config import ModelConfig
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from babel_jax.inference.chat import Conversation, talk
from babel_jax.model_folders.folder import Format
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import save_folder
from tests.compiled import init_params

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(small_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    (path / "files").mkdir()
    tokenizer = open_tokenizer(small_model)
    tokenizer.save(path / "files")
    (path / "files" / "chat_template.jinja").write_text(TEMPLATE)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
    )
    params = jax.tree.map(
        np.asarray, init_params(config.model_copy(update={"initializer_range": 0.3}), jax.random.key(0))
    )
    save_folder(
        path / "hf",
        Format.HF,
        params,
        write_hf_config(config, None, "float32", eos_token_id=tokenizer.eos_id),
        path / "files",
    )
    return path / "hf"


def test_two_turns_are_those_of_transformers(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    conversation = Conversation(str(folder), system="Be brief.", max_new_tokens=8)
    for text in ("Watu wote", "haki zao"):
        talk_so_far = [*conversation.messages, {"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(talk_so_far, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[
            0, ids["input_ids"].shape[1] :
        ].tolist()
        found = conversation.answer(text)
        assert found["tokens"] == out
        assert found["text"] == tokenizer.decode(out, skip_special_tokens=True)
    assert [message["role"] for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_the_oldest_turns_go_when_there_is_no_room(folder):
    conversation = Conversation(str(folder), max_new_tokens=8)
    for _ in range(5):
        conversation.answer("Watu wote wamezaliwa huru")
    assert len(conversation.messages) == 10
    with pytest.raises(BadInput, match="exceeds the model's 96 positions"):
        conversation.answer("Watu wote wamezaliwa huru " * 40)
    with pytest.raises(BadInput, match="nothing to answer"):
        conversation.answer(" ")
    assert len(conversation.messages) == 10


def test_on_a_terminal(folder, capsys):
    said = iter(["Watu wote", " ", "haki"])

    def read(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    found = talk(Conversation(str(folder), max_new_tokens=4), read)
    assert found["summary"] == "\n2 turns"
    assert "babel chat: there is nothing to answer" in capsys.readouterr().out


def test_one_turn_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Watu wote\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == "Watu wote"
    assert len(found["tokens"]) <= 4
    assert found["messages"][-1] == {"role": "assistant", "content": found["text"]}


def test_without_a_template_it_says_so(small_model, folder, capsys, tmp_path):
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["chat", str(tmp_path)]) == 2
    assert "no chat template (chat_template.jinja" in capsys.readouterr().err
