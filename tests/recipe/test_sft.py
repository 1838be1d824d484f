"""Chat fine-tuning end to end, on a tiny model: the loss against torch, the run by the command, and the
exported folder.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from babel_jax.cli import main
from babel_jax.config import ModelConfig
from babel_jax.config.file import configs_folder, load_config
from babel_jax.data.sources.conversations import conversation_text
from babel_jax.data.tokens.chat_format import open_chat_format
from babel_jax.data.windows.conversations import conversation_windows
from babel_jax.evaluation.bits_per_byte import conversations_to_score, scored_bits
from babel_jax.evaluation.scoring import score
from babel_jax.inference.generate import generate_text
from babel_jax.inference.generation import generate
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.training.loss import summed_loss
from babel_jax.training.mesh import make_mesh

SHAPE = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def conversation(number):
    question = f"Is {number} even?"
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "yes" if number % 2 == 0 else "no"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Su dai 'yan-adam."},
    ]


def test_loss_and_gradient_are_those_of_torch(chat_tokenizer, reference_model, stacked_tree):
    """Each conversation alone through transformers, labels -100 but for the assistant's tokens; ours has them
    packed in one window.
    """
    torch = pytest.importorskip("torch")
    config = ModelConfig(**SHAPE, num_key_value_heads=2, max_position_embeddings=256)
    model = reference_model(config)
    format = open_chat_format(chat_tokenizer)
    conversations = [conversation(number) for number in (1, 2, 30)]
    counts = dict.fromkeys(("tokens", "documents", "bytes"), 0)
    texts = [conversation_text(one) for one in conversations]
    windows = list(conversation_windows(texts, format, 192, counts))
    fields = [np.stack(column).view(np.int32) for column in zip(*windows, strict=True)]
    assert fields[1].max() > 1
    batch = {"tokens": fields[0], "segment_ids": fields[1], "loss_mask": fields[2]}
    batch = jax.tree.map(jnp.asarray, batch)
    params = jax.tree.map(jnp.asarray, stacked_tree(dict(model.named_parameters())))
    (total, losses), gradients = jax.value_and_grad(
        lambda tree: summed_loss(config, tree, batch), has_aux=True
    )(params)

    nats, targets = 0.0, 0
    for one in conversations:
        encoded = format.encode(one)
        ids, mask = torch.tensor([encoded.ids]), torch.tensor([encoded.targets])
        labels = torch.where(mask, ids, -100)
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], reduction="sum")
        loss.backward()
        nats, targets = nats + float(loss.detach()), targets + int((labels[0, 1:] >= 0).sum())
    assert float(total) == pytest.approx(nats, rel=1e-5)
    assert int(losses.targets.sum()) == targets == counts["targets"]
    expected = stacked_tree({name: parameter.grad for name, parameter in model.named_parameters()})
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-3),
        gradients,
        expected,
    )

    # Held out, the same nats are counted for the bytes that the assistant said.
    to_score = conversations_to_score(format, {"ha": texts}, config.max_position_embeddings)
    (measured,) = scored_bits(
        to_score, lambda sequences: score(config, params, sequences, make_mesh({}), 384)
    ).values()
    documents, counted = measured.columns[:, 0], measured.columns[:, 1]
    said = sum(
        len(message["content"].encode())
        for one in conversations
        for message in one
        if message["role"] == "assistant"
    )
    assert (counted.sum(), len(documents)) == (said, 3)
    assert measured.score == pytest.approx(nats / np.log(2) / said, rel=1e-5)


@pytest.fixture(scope="module")
def config_file(chat_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    rows = [{"id": str(number), "messages": conversation(number)} for number in range(40)]
    (folder / "ha.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "config.toml"
    path.write_text(f"""
out = "{folder / "run"}"
export_dtype = "float32"
[model.shape]
{chr(10).join(f"{key} = {value}" for key, value in SHAPE.items())}
max_position_embeddings = 128
[training]
global_batch_size = 8
compute_dtype = "float32"
[[stages]]
name = "chat"
steps = 100
schedule = {{ kind = "cosine", peak = 1e-2, warmup_fraction = 0.1 }}
mixture = {{ max_epochs = 1000.0 }}
[data]
folder = "{folder / "data"}"
tokenizer = "{chat_tokenizer}"
seq_len = 128
heldout_fraction = 0.1
conversations = true
[[data.sources]]
language = "ha"
kind = "chat"
text_key = "messages"
path = "{folder / "ha.jsonl"}"
""")
    return path


@pytest.fixture(scope="module")
def tuned(config_file):
    assert main(["sft", str(config_file), "--json"]) == 0
    return config_file.parent / "run"


def test_it_answers_and_stops(tuned):
    folder = open_folder(tuned / "hf")
    format = open_chat_format(tuned / "hf")
    params = load_params(folder, dtype=jnp.float32)
    said = conversation(4)[:3]
    prompt = format._tokenizer.encode(
        format.render(said, add_generation_prompt=True), add_special_tokens=False
    ).ids
    (new,) = generate(folder.config, params, [prompt], 40, folder.hf_config["eos_token_id"])
    assert new[-1] == format.end_id
    assert format.decode(new) == "Su dai 'yan-adam."
    summary = json.loads((tuned / "summary.json").read_text())
    assert summary["bits_per_byte"]["chat"]["ha"] < 0.5
    # Of the question nothing was learned but what it shares with answers.
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.1 < lines[0]["loss"]


def test_the_exported_folder_is_a_chat_model_for_transformers(tuned, chat_tokenizer):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned / "hf")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert (
        model.config.eos_token_id
        == model.generation_config.eos_token_id
        == [end, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    )
    ours = open_chat_format(chat_tokenizer).encode(conversation(7))
    assert tokenizer.apply_chat_template(conversation(7), return_dict=True)["input_ids"] == ours.ids
    inputs = tokenizer.apply_chat_template(
        conversation(7)[:3], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    new = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert new[-1] == end
    assert tokenizer.decode(new, skip_special_tokens=True) == "Su dai 'yan-adam."
    assert generate_text(str(tuned / "hf"), "Is", 4, 0.0, 1.0, 0)["tokens"]


def test_from_a_model_folder_whose_files_stay(tuned, config_file, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in (tuned / "hf").iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((base / name).read_text())
        values |= {"eos_token": "<|endoftext|>"} if name.startswith("tokenizer") else {"eos_token_id": 0}
        (base / name).write_text(json.dumps(values))
    (base / "LICENSE").write_text("free")
    config = tmp_path / "config.toml"
    text = config_file.read_text()
    shape, rest = text.index("[model.shape]"), text.index("[training]")
    config.write_text(text[:shape] + f'[model]\nfolder = "{base}"\n' + text[rest:])
    changes = {
        "out": tmp_path / "run",
        "data.folder": tmp_path / "data",
        "data.tokenizer": base,
        "stages.0.steps": 1,
    }
    assert (
        main(
            [
                "sft",
                str(config),
                *(part for key, value in changes.items() for part in ("--set", f"{key}={value}")),
            ]
        )
        == 0
    )
    hf = tmp_path / "run" / "hf"
    assert json.loads((hf / "config.json").read_text())["eos_token_id"] == [2, 0]
    assert json.loads((hf / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert (hf / "chat_template.jinja").is_file()
    assert (hf / "LICENSE").read_text() == "free"
    points = json.loads((tmp_path / "run" / "summary.json").read_text())["bits_per_byte"]
    assert list(points) == ["base", "chat"]


def test_prepared_data_of_another_kind(tuned, config_file, tmp_path, capsys):
    """Without sources what lies in data.folder is taken, if it is what the settings say."""
    template = tmp_path / "other.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    )
    common = [str(config_file), "--set", f"out={tmp_path / 'run'}", "--set", "data.sources=[]"]
    assert main(["sft", *common, "--set", f"data.chat_template={template}"]) == 2
    assert f"prepared with another chat template than {template}" in capsys.readouterr().err
    assert main(["train", *common, "--set", "data.conversations=false"]) == 2
    assert "prepared as the other of text and conversations" in capsys.readouterr().err


def test_text_is_refused_and_the_shipped_configs_are_chat(tmp_path, capsys, config_file):
    assert (
        main(["sft", str(config_file), "--set", "data.conversations=false", "--set", "data.sources=[]"]) == 2
    )
    assert "data.conversations is not true" in capsys.readouterr().err
    for name in ("babel-9b-chat.toml", "babel-83b-chat.toml", "tiny-chat.toml"):
        config = load_config(configs_folder() / name)
        assert config.data.conversations
    for name in ("babel-9b-chat.toml", "babel-83b-chat.toml"):
        config = load_config(configs_folder() / name)
        (stage,) = config.stages
        assert (stage.schedule.peak, stage.schedule.warmup_fraction, config.data.seq_len) == (4e-6, 0.1, 4096)
