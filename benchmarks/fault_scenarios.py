"""The commands that disk_faults.py disturbs, each on inputs so small that it takes a second or a few."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from babel_jax.config import ModelConfig
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.layout import tensor_shapes
from tests.data.tokens.test_special_tokens import byte_level

MARKERS = ("<|im_start|>", "<|im_end|>")
WORDS = (
    "habari",
    "nyumba",
    "mtoto",
    "kitabu",
    "shule",
    "maji",
    "chakula",
    "njia",
    "siku",
    "mwaka",
    "rafiki",
    "kazi",
    "mlima",
)
SHAPE = ModelConfig(
    vocab_size=272,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
)
TRAINING = (
    '[training]\nglobal_batch_size = 4\ncompute_dtype = "float32"\ncheckpoint_every = 2\ncompilation_cache '
    "= false\n"
    "[evaluation]\nbatch_size = 4\nmax_bytes = 300\n"
    '[[stages]]\nname = "only"\nresult = "recovered"\nsteps = 4\nschedule = { peak = 1e-3 }\nmixture = { '
    "max_epochs = 1000.0 }\n"
)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command. `{base}` in its arguments is the folder of inputs; its own folder is where it runs.

    `copied` are inputs that it changes: names below the base. `whole` is a folder that appears whole or not
    at all, and is then refused. `then` is run after it, where its own files are of no use to compare: Orbax
    draws names, and notes times.
    """

    arguments: tuple[str, ...]
    copied: tuple[str, ...] = ()
    whole: str | None = None
    then: tuple[str, ...] = ()
    weight: int = 1


BACK = ("convert", "out", "back", "--to", "hf")
SCENARIOS = {
    "convert to orbax": Scenario(
        ("convert", "{base}/source", "out", "--to", "orbax"), whole="out", then=BACK, weight=3
    ),
    "convert to hf": Scenario(("convert", "{base}/orbax", "out", "--to", "hf"), whole="out", weight=3),
    "expand": Scenario(
        ("expand", "{base}/source", "out", "--insert-after", "1", "--init", "noise"), whole="out", weight=3
    ),
    "expand orbax": Scenario(
        ("expand", "{base}/orbax", "out", "--insert-after", "1"), whole="out", then=BACK
    ),
    "prepare": Scenario(("prepare", "{base}/prepare.toml"), weight=6),
    "train": Scenario(("train", "{base}/train.toml"), weight=3),
    "sft": Scenario(("sft", "{base}/sft.toml"), weight=3),
    "evaluate": Scenario(
        ("evaluate", "{base}/source", "--data", "{base}/texts", "--max-bytes", "300", "--out", "out"),
        weight=2,
    ),
    "judge": Scenario(("judge", "{base}/quality.toml"), weight=2),
    "classifier": Scenario(("classifier", "{base}/quality.toml"), ("judged/out",), whole="out/classifier"),
    "score": Scenario(("score", "{base}/quality.toml"), ("classified/out",), weight=2),
    "statistics": Scenario(("statistics", "data"), ("data",), weight=2),
    "mixture": Scenario(("mixture", "{base}/train.toml", "--out", "out")),
    "report": Scenario(("report", "run"), ("trained/run",)),
    "sensitivity": Scenario(
        ("sensitivity", "{base}/source", "--data", "{base}/texts", "--max-bytes", "300", "--out", "out")
    ),
}

Run = Callable[[list[str], Path], object]


def make_inputs(base: Path, run: Run, names: Iterable[str]) -> None:
    """Writes the inputs of some scenarios; `run` runs a command in a folder and raises where it fails."""
    tokenizer = byte_level(base / "tokenizer", MARKERS)
    (tokenizer / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    _write_model(base / "source", tokenizer)
    _write_texts(base)
    _write_configs(base, tokenizer)
    needed = {part for name in names for part in (*SCENARIOS[name].arguments, *SCENARIOS[name].copied)}
    if "{base}/orbax" in needed:
        run(["convert", str(base / "source"), str(base / "orbax"), "--to", "orbax"], base)
    if needed & {"{base}/train.toml", "data", "trained/run"}:
        run(["prepare", str(base / "prepare.toml")], base)
    if "trained/run" in needed:
        (base / "trained").mkdir()
        run(["train", str(base / "train.toml")], base / "trained")
    for name in ("judged", "classified"):
        if f"{name}/out" in needed:
            (base / name).mkdir()
            _write_judged(base / "texts", base / name / "out")
    if "classified/out" in needed:
        run(["classifier", str(base / "quality.toml")], base / "classified")


def _write_configs(base: Path, tokenizer: Path) -> None:
    data = f'tokenizer = "{tokenizer}"\nseq_len = 64\nheldout_fraction = 0.2\nworkers = 1\n'
    texts = [f'language = "{code}"\npath = "{base}/texts/{code}.jsonl"\n' for code in ("en", "sw")]
    sources = "".join(f"[[data.sources]]\n{text}" for text in texts)
    cleaning = (
        'shard_documents = 10\n[data.cleaning]\nmin_characters = 20\noff = ["repetition", "words", '
        '"language"]\n'
    )
    (base / "prepare.toml").write_text(
        'out = "run"\n[model]\nfolder = "none"\n[data]\nfolder = '
        f'"data"\n{data}{cleaning}[data.deduplication]\n{sources}'
    )
    head = f'out = "run"\nexport_dtype = "float32"\n[model]\nfolder = "{base}/source"\n'
    expansion = '[expansion]\ninsert_after = [1]\ninit = "zero"\n'
    (base / "train.toml").write_text(f'{head}{expansion}[data]\nfolder = "{base}/data"\n{data}{TRAINING}')
    talk = (
        'conversations = true\n[[data.sources]]\nlanguage = "sw"\nkind = "chat"\ntext_key = '
        f'"messages"\npath = "{base}/talk.jsonl"\n'
    )
    (base / "sft.toml").write_text(f'{head}[data]\nfolder = "data"\n{data}{talk}{TRAINING}')
    (base / "quality.toml").write_text(
        'out = "out"\n[judge]\ndocuments = 12\ndimensions = { fluency = "a", substance = "b" }\n'
        f'[classifier]\nmodel = "{base}/source"\nseq_len = 64\nbatch_size = 4\nepochs = 1.0\nschedule = {{ '
        "peak = 3e-3 }\n"
        'heldout_fraction = 0.25\ncompute_dtype = "float32"\n'
        + "".join(f"[[sources]]\n{text}" for text in texts)
    )


def _write_model(folder: Path, tokenizer: Path) -> None:
    shutil.copytree(tokenizer, folder)
    draw = np.random.default_rng(0)
    tensors = {
        name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in tensor_shapes(SHAPE).items()
    }
    names, index = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(write_hf_config(SHAPE, dtype="float32", eos_token_id=257)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))


def _write_texts(base: Path) -> None:
    draw = random.Random(0)
    (base / "texts").mkdir()
    for code in ("en", "sw"):
        rows = [
            {"id": f"{code}{number}", "text": f"{code} " + " ".join(draw.choices(WORDS, k=30)) + "."}
            for number in range(24)
        ]
        rows.append({"id": f"{code}again", "text": rows[0]["text"]})
        (base / "texts" / f"{code}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [[" ".join(draw.choices(WORDS, k=5)) for _ in range(2)] for _ in range(20)]
    talk = [
        {
            "id": str(number),
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
        }
        for number, (asked, said) in enumerate(turns)
    ]
    (base / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))


def _write_judged(texts: Path, out: Path) -> None:
    out.mkdir()
    with open(out / "judged.jsonl", "w", encoding="utf-8") as file:
        for code in ("en", "sw"):
            for number, line in enumerate((texts / f"{code}.jsonl").read_text().splitlines()):
                row = json.loads(line)
                scores = {"fluency": number % 5, "substance": (number + 2) % 5}
                score = sum(scores.values()) / 2
                file.write(
                    json.dumps(
                        {
                            "id": row["id"],
                            "language": code,
                            "text": row["text"],
                            "scores": scores,
                            "score": score,
                        }
                    )
                    + "\n"
                )
