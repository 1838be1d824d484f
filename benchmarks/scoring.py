"""Scoring text with the quality classifier, beside transformers' model for sequence classification with the
same weights.

    python benchmarks/scoring.py [--hidden 256] [--layers 6] [--documents 400] [--rounds 3]

Both get the same documents of the package's corpus (all 25 languages, joined to about 1 kB), tokenized by the
same tokenizer in the time that counts, float32. The peer runs batches of 16 documents of like length, padded;
here documents share windows. Rounds alternate.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from babel_jax.config import ComputeType, ModelConfig
from babel_jax.config.quality import ClassifierSettings
from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.data.tokens.sentencepiece_tokenizer import train_sentencepiece
from babel_jax.model.decoder import init_params
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import load_params, save_folder
from babel_jax.quality.regressor import Regressor, with_head

BATCH, SEQ_LEN, DIMENSIONS = 16, 512, 3


def documents(count):
    """Documents of about 1 kB, of one language each, taking turns."""
    found = []
    for rows in embedded_corpus().values():
        text = ""
        for row in rows:
            text += row.text + "\n"
            if len(text.encode()) >= 1000:
                found.append(text)
                text = ""
    order = np.random.default_rng(0).permutation(len(found))
    return [found[place] for place in np.resize(order, count)]


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 256), ("layers", 6), ("documents", 400), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    texts = documents(options.documents)
    with tempfile.TemporaryDirectory() as place:
        tokenizer = train_sentencepiece(texts, 4096, Path(place) / "tokenizer.model")
        config = ModelConfig(
            vocab_size=4096,
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=max(1, options.hidden // 128),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
        params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
        save_folder(Path(place) / "hf", Format.HF, params, write_hf_config(config))
        peer = transformers.Qwen2Model.from_pretrained(Path(place) / "hf", dtype=torch.float32).eval()
        params = with_head(
            load_params(open_folder(Path(place) / "hf"), dtype=jnp.float32), options.hidden, DIMENSIONS
        )
    head = np.random.default_rng(1).normal(size=(DIMENSIONS, options.hidden)).astype(np.float32)
    params["head"] = {"weight": jnp.asarray(head), "bias": jnp.zeros(DIMENSIONS)}
    settings = ClassifierSettings(
        model="none", seq_len=SEQ_LEN, batch_size=BATCH // 4, compute_dtype=ComputeType.FLOAT32
    )
    regressor = Regressor(config, params, tokenizer, settings)

    def ours():
        return np.concatenate([scores for scores, _ in regressor.score(texts)])

    def theirs():
        encoded = [[*ids[: SEQ_LEN - 1], tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
        order = sorted(range(len(encoded)), key=lambda number: len(encoded[number]))
        scores = np.zeros((len(encoded), DIMENSIONS), np.float32)
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            longest = max(len(encoded[number]) for number in chosen)
            ids = torch.zeros((len(chosen), longest), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(chosen):
                ids[row, : len(encoded[number])], mask[row, : len(encoded[number])] = (
                    torch.tensor(encoded[number]),
                    1,
                )
            with torch.inference_mode():
                hidden = peer(ids, attention_mask=mask).last_hidden_state
            ends = torch.tensor([len(encoded[number]) - 1 for number in chosen])
            scores[chosen] = hidden[torch.arange(len(chosen)), ends].numpy() @ head.T
        return scores

    tokens = sum(min(SEQ_LEN, len(ids) + 1) for ids in tokenizer.encode_batch(texts))
    difference = float(np.abs(ours() - theirs()).max())
    seconds = {ours: [], theirs: []}
    for _ in range(options.rounds):
        for run in (ours, theirs):
            start = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - start)
    rates = {run: tokens / statistics.median(own) for run, own in seconds.items()}
    print(
        f"{len(texts)} documents, {tokens:,} tokens, {jax.devices()[0].device_kind}; largest difference of "
        f"a score {difference:.1e}"
    )
    print(f"babel_jax     {rates[ours]:>10,.0f} tokens/s")
    print(f"transformers  {rates[theirs]:>10,.0f} tokens/s")
    print(f"ratio         {rates[ours] / rates[theirs]:>10.2f}")


if __name__ == "__main__":
    main()
