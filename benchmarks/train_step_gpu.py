"""Tokens a second and model FLOP utilization of the bfloat16 train step on one GPU, beside torch
`transformers` (SDPA, torch.compile).

    python benchmarks/train_step_gpu.py [--windows 6] [--seq-len 4096] [--layers 28] [--steps 16]

The shape is Qwen2.5-1.5B's. Each runs in a process of its own, as neither leaves the other the memory, and
does the same work a step on the same tokens: loss, gradients, clipping at norm 1, AdamW, with parameters and
moments in float32. torch takes the most windows at a time that it has the memory for, and sums gradients over
the rest. Rates are medians over steps, after two that compile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

RATE = 1e-3  # that of train_step.our_step
Step = Callable[[], float]


def ours(arguments: argparse.Namespace, tokens: np.ndarray) -> tuple[Step, str]:
    """The step as `babel train` runs it, on the first device."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import jax
    from train_step import our_step

    from babel_jax.config import ModelConfig, Remat, TrainingSettings

    training = TrainingSettings(
        global_batch_size=len(tokens), gradient_accumulation=len(tokens) // arguments.at_a_time,
        remat=Remat(arguments.remat),
        scan_layers=arguments.scan_layers,
    )  # fmt: skip
    return our_step(ModelConfig(**shape(arguments)), tokens, training), jax.devices()[0].device_kind


def peer(arguments: argparse.Namespace, tokens: np.ndarray) -> tuple[Step, str]:
    """Qwen2ForCausalLM with its own loss, SDPA, compiled, under bfloat16 autocast; fused AdamW."""
    import torch
    import transformers

    names = shape(arguments)
    del names["head_dim"]
    config = transformers.Qwen2Config(**names, use_cache=False)
    config._attn_implementation = "sdpa"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    torch.set_float32_matmul_precision("high")
    compiled = torch.compile(model)
    pieces = torch.from_numpy(tokens).long().to(device).split(arguments.at_a_time)

    def run() -> float:
        total = torch.zeros((), device=device)
        for piece in pieces:
            with torch.autocast(device, torch.bfloat16):
                loss = compiled(input_ids=piece, labels=piece).loss / len(pieces)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return run, torch.cuda.get_device_name() if device == "cuda" else device


def shape(arguments: argparse.Namespace) -> dict[str, int | bool]:
    """Qwen2.5-1.5B's config.json, but for the depth."""
    return {
        "vocab_size": arguments.vocab_size, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128,
        "max_position_embeddings": arguments.seq_len,
        "tie_word_embeddings": True,
    }  # fmt: skip


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """One of the two, in this process."""
    tokens = np.random.default_rng(0).integers(
        0, arguments.vocab_size, (arguments.windows, arguments.seq_len), dtype=np.int32
    )
    start = time.perf_counter()
    run, device = (ours if arguments.only == "babel_jax" else peer)(arguments, tokens)
    first = run()
    compiled, rates = time.perf_counter() - start, []
    run()
    for _ in range(arguments.steps):
        start = time.perf_counter()
        loss = run()
        rates.append(tokens.size / (time.perf_counter() - start))
    return {"device": device, "rates": rates, "first": first, "last": loss, "compile_seconds": compiled}


def at_most(arguments: argparse.Namespace, name: str) -> tuple[dict[str, Any], int] | None:
    """What a process of its own finds, with the most windows at a time that fit."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    at_a_time = arguments.windows
    while at_a_time:
        if arguments.windows % at_a_time == 0:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--at-a-time", str(at_a_time)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode == 0:
                return json.loads(done.stdout.splitlines()[-1]), at_a_time
            if "out of memory" not in done.stderr.lower() and "RESOURCE_EXHAUSTED" not in done.stderr:
                print(f"{name}: {done.stderr[-3000:]}", file=sys.stderr)
                return None
            print(f"{name}: no memory for {at_a_time} windows at a time", file=sys.stderr)
        at_a_time -= 1
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=6, help="of a step")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--remat", default="mlp", help="ours")
    parser.add_argument(
        "--scan-layers", action="store_true", help="ours: one layer in a loop, as is the default of training"
    )
    parser.add_argument("--steps", type=int, default=16, help="counted")
    parser.add_argument("--only", choices=("babel_jax", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--at-a-time", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measured(arguments)))
        return

    from babel_jax.config import ModelConfig
    from babel_jax.hardware import peak_flops
    from babel_jax.model.decoder import count_parameters
    from babel_jax.model.flops import model_flops_per_token

    config = ModelConfig(**shape(arguments))
    flops = model_flops_per_token(config, arguments.seq_len)
    print(
        f"{count_parameters(config):,} parameters, {arguments.windows} windows of {arguments.seq_len} "
        "tokens a step"
    )
    print(
        f"{'':<10} {'at a time':>9} {'tokens/s':>9} {'least':>9} {'most':>9} {'MFU':>6} {'ours / it':>10} "
        f"{'start, s':>9} {'loss':>15}"
    )
    reference = None
    for name in ("babel_jax", "torch"):
        if (result := at_most(arguments, name)) is None:
            continue
        found, at_a_time = result
        rates, device = found["rates"], found["device"]
        median = statistics.median(rates)
        reference = reference or median
        peak = peak_flops(device, 1)
        share = f"{median * flops / peak:.1%}" if peak else "-"
        losses = f"{found['first']:.3f} {found['last']:.3f}"
        print(
            f"{name:<10} {at_a_time:>9} {median:>9,.0f} {min(rates):>9,.0f} {max(rates):>9,.0f} {share:>6} "
            f"{reference / median:>10.3f} "
            f"{found['compile_seconds']:>9.0f} {losses:>15}   {device}"
        )


if __name__ == "__main__":
    main()
