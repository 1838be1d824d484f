"""Requests a second of our model in lm-evaluation-harness on a CPU, beside the harness's own Hugging Face
backend.

    python benchmarks/evaluation.py [--items 24] [--rounds 3] [--hidden 512 --layers 8 --vocab 16000]

The two take turns in one process on one folder of random weights, float32, with the same requests: the forms
of the benchmarks, made of the package's own text. Compiling is timed apart, in the first round. Answers are
compared on the way.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from babel_jax.config import ModelConfig
from babel_jax.data.sources.embedded import read_texts
from babel_jax.data.tokens.prompts import PromptTokenizer
from babel_jax.data.tokens.sentencepiece_tokenizer import train_sentencepiece
from babel_jax.evaluation import scoring
from babel_jax.evaluation.benchmarks.harness import DecoderLM
from babel_jax.evaluation.benchmarks.responses import Responses
from babel_jax.inference import generation
from babel_jax.model.decoder import count_parameters, init_params
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import load_params, save_folder
from babel_jax.training.mesh import make_mesh, param_shardings


def model_folder(path: Path, hidden: int, layers: int, vocab: int) -> ModelConfig:
    """A folder of random weights, with a tokenizer of the package's text."""
    texts = [text for own in read_texts(None).values() for text in own]
    tokenizer = train_sentencepiece(texts, vocab, path / "small.model")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=2048,
    )
    params = jax.tree.map(
        np.asarray, init_params(config.model_copy(update={"initializer_range": 0.1}), jax.random.key(0))
    )
    (path / "files").mkdir()
    tokenizer.save(path / "files")
    save_folder(
        path / "hf",
        Format.HF,
        params,
        write_hf_config(config, None, "float32", eos_token_id=tokenizer.eos_id),
        path / "files",
    )
    return config


def forms(items: int) -> dict[str, list[tuple]]:
    """Requests in the form of each benchmark: (context, continuation), or (context, settings) where the model
    writes.
    """
    words = [
        word for text in read_texts(None, ["en", "sw", "id"]).values() for own in text for word in own.split()
    ]
    random = np.random.default_rng(0)

    def some(count: int) -> str:
        start = int(random.integers(0, len(words) - count))
        return " ".join(words[start : start + count])

    def question() -> str:
        return f"{some(40)}\nA. {some(8)}\nB. {some(8)}\nC. {some(8)}\nD. {some(8)}\nAnswer:"

    examples = "".join(f"{question()} {letter}\n\n" for letter in "ABCDA")
    exams = [examples + question() for _ in range(items)]
    # Short ones are many in the benchmarks: 500 of XCOPA and 2,490 of XNLI in each language.
    causes = [some(10) for _ in range(8 * items)]
    premises = [some(20) for _ in range(4 * items)]
    steps = "".join(f"Question: {some(40)}\nStep-by-Step Answer: {some(40)}\n\n" for _ in range(4))
    pairs = "".join(f"English: {some(20)}\nSwahili: {some(20)}\n\n" for _ in range(5))
    return {
        "MMMLU, 5 examples": [(exam, f" {letter}") for exam in exams for letter in "ABCD"],
        "XCOPA": [(cause, f" {some(8)}") for cause in causes for _ in range(2)],
        "XNLI": [
            ("", f"{premise}, right? {word}, {ending}")
            for premise in premises
            for ending in [some(10)]
            for word in ("Yes", "Also", "No")
        ],
        "MGSM, 4 examples": [
            (
                f"{steps}Question: {some(40)}\nStep-by-Step Answer:",
                {"until": ["Question:"], "max_gen_toks": 64},
            )
            for _ in exams
        ],
        "Flores-200, 5 examples": [
            (f"{pairs}English: {some(20)}\nSwahili:", {"until": ["\n"], "max_gen_toks": 64}) for _ in exams
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=16000)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = model_folder(Path(folder), options.hidden, options.layers, options.vocab)
        hf = Path(folder) / "hf"
        theirs = HFLM(pretrained=str(hf), dtype=torch.float32, device="cpu", batch_size=options.batch_size)
        mesh, tokenizer = make_mesh({}), PromptTokenizer(hf)
        params = load_params(open_folder(hf), shardings=param_shardings(config, mesh))
    sizes = f"{count_parameters(config):,} parameters, vocabulary {config.vocab_size}, {options.items} items"
    print(f"{sizes}, float32, {torch.get_num_threads()} threads")
    print(
        f"{'requests':24} {'number':>6} {'compile s':>9} {'ours s':>8} {'theirs s':>8} {'ratio':>6} "
        f"{'largest difference':>19}"
    )
    for name, arguments in forms(options.items).items():
        kind = "generate_until" if isinstance(arguments[0][1], dict) else "loglikelihood"
        requests = [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        answers = {}
        for _ in range(options.rounds + 1):
            ours = DecoderLM(config, params, tokenizer, Responses("benchmark"), mesh, 2048, np.float32)
            for who, model in (("ours", ours), ("theirs", theirs)):
                start = time.perf_counter()
                answers[who] = getattr(model, kind)(requests, disable_tqdm=True)
                seconds[who].append(time.perf_counter() - start)
        pairs = zip(answers["ours"], answers["theirs"], strict=True)
        same = max(
            (abs(one[0] - other[0]) if kind == "loglikelihood" else float(one != other))
            for one, other in pairs
        )
        first, *rest = seconds["ours"]
        ours_s, theirs_s = statistics.median(rest), statistics.median(seconds["theirs"][1:])
        ratio = f"{theirs_s / ours_s:6.2f}"
        print(
            f"{name:24} {len(requests):6} {first - ours_s:9.1f} {ours_s:8.2f} {theirs_s:8.2f} {ratio} "
            f"{same:19.1e}",
            flush=True,
        )
    programs = scoring.compilations() + generation.prefill._cache_size() + generation.extend._cache_size()
    print(f"{programs} programs compiled")


if __name__ == "__main__":
    main()
