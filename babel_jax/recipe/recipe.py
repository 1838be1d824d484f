"""The recipe as one function: a model, expanded, trained through the stages, measured at each point, exported.

It alone sees all the parts. What it writes into the run folder:

config.toml        the resolved config; alone it makes the run again
checkpoints/       the train state, by step
metrics.jsonl      a line for each step; the same in tensorboard/
goodput.json       where the wall time went, over all restarts
compiled/          compiled programs, for restarts
lease.json         the job that is at work in the folder
mixture.json       tokens, shares and epochs of each stage
evaluation/X.json  bits per byte and the offline suite at the point X: base, expanded, and the result of each stage
evaluation/        during.jsonl and best.json: the same between steps, and the best of them (training/watch.py)
hf/                the trained model as a Hugging Face folder
samples.json       what the trained model writes in each language
summary.*          table (.md), figures (.json) and plot (.png)
report.html        all of it on one page
"""

import contextlib
import functools
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from babel_jax.config import CHANGEABLE, Config, ModelConfig, Stage
from babel_jax.config.file import load_config, parse_settings, read_toml
from babel_jax.data.tokens.chat_format import open_chat_format, write_chat_files
from babel_jax.data.tokens.tokenizers import Tokenizer, open_tokenizer
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.distributed.agreement import agreed, first_says, first_text, same_on_all
from babel_jax.distributed.lease import NAME as LEASE
from babel_jax.distributed.lease import leased
from babel_jax.errors import BadInput
from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.points import BITS_PER_BYTE, measure, point_file, point_names, read_points, scores_of, write_point
from babel_jax.evaluation.tables import findings, plot_points, points_table, suite_table
from babel_jax.expansion.apply import expand_config, expand_hf_config, expanding, new_layers_of
from babel_jax.expansion.plan import ExpansionPlan, plan_from_settings
from babel_jax.files import PARTIAL, explain_os_errors, make_folder, write_text
from babel_jax.inference.generation import generate
from babel_jax.model.decoder import count_parameters, forward, init_params
from babel_jax.model_folders.folder import Format, ModelFolder, copy_other_files, load_params, open_folder, save_folder
from babel_jax.model_folders.generation_defaults import stored_repetition_penalty
from babel_jax.model_folders.hf_config import stored_eos_token_ids, write_hf_config
from babel_jax.model_folders.tokenizer_files import is_padding
from babel_jax.report.card import run_card
from babel_jax.report.gate import gate_words
from babel_jax.report.page import PAGE, write_report
from babel_jax.report.record import SAMPLES, run_folder_of, versions
from babel_jax.report.samples import write_samples
from babel_jax.run_files import Best, Mixture, StepLine, Summary, read_as, read_lines
from babel_jax.training.compilation import compiled_in
from babel_jax.training.deepening import depths
from babel_jax.training.goodput import goodput_of
from babel_jax.training.mesh import make_mesh, param_shardings
from babel_jax.training.run import train_stages
from babel_jax.training.run_state import newest_step
from babel_jax.training.watch import BEST, Watch

log = logging.getLogger("babel")


def run_recipe(config: Config, compare_export: bool = False, profile: range | None = None) -> dict[str, Any]:
    """Runs or resumes the run folder `config.out`; a finished one is answered from its summary.

    Returns {"out", "hf", "bits_per_byte": {point: {language: value}}, "means", "parameters", "layers", "summary"}, and with
    `compare_export`, for models that one device holds twice, "export_difference": see `export_difference`. `profile` says which steps to
    trace.
    """
    run_folder = Path(config.out)
    _check_same(config)
    # Of several processes of one run, the first speaks for all.
    with contextlib.ExitStack() as held:
        held.enter_context(explain_os_errors(run_folder))
        with agreed():
            make_folder(run_folder)
            if jax.process_index() == 0:
                held.enter_context(leased(run_folder))
        if config.training.compilation_cache:
            held.enter_context(compiled_in(run_folder / "compiled"))
        return _run(config, run_folder, compare_export, profile)


def _run(config: Config, run_folder: Path, compare_export: bool, profile: range | None) -> dict[str, Any]:
    first = jax.process_index() == 0
    with agreed():
        if first:
            _claim(run_folder, config)
    if (finished := _finished(run_folder)) is not None:
        return finished
    with agreed():
        folder = open_folder(config.model.folder) if config.model.folder is not None else None
        if config.data.sources and first:
            # At once where it is done; raises where it was done with other settings.
            prepare(config.data, folder.path if folder is not None else None)
    with agreed():
        tokenizer = _tokenizer(config, folder)
        base_config = folder.config if folder is not None else config.model.shape
        assert base_config is not None
        _check_fit(config, base_config, tokenizer)
    plan = plan_from_settings(config.expansion, base_config.num_hidden_layers) if config.expansion is not None else None
    model_config = expand_config(base_config, plan) if plan is not None else base_config

    def begin() -> PyTree[Array]:
        mesh = make_mesh(config.training.mesh)
        shardings = param_shardings(base_config, mesh)
        if folder is None:
            params = jax.jit(init_params, static_argnums=0, out_shardings=shardings)(base_config, jax.random.key(config.seed))
        else:
            params = load_params(folder, dtype=jnp.float32, shardings=shardings)
            _measure(config, "base", base_config, params, tokenizer)
        if plan is not None:
            params = expanding(param_shardings(model_config, mesh))(params, plan)
        if plan is not None and folder is not None:
            _measure(config, "expanded", model_config, params, tokenizer)
        return params

    def measure_stage(stage: Stage, model_config: ModelConfig, params: PyTree[Array]) -> None:
        _measure(config, stage.result, model_config, params, tokenizer)

    new_layers = plan.new_layers if plan is not None else new_layers_of(folder.hf_config) if folder is not None else ()
    models = depths(model_config, new_layers, config.deepen)
    watch = Watch(
        run_folder,
        config.evaluation.every,
        lambda step, model_config, params: measure(config, f"after {step} steps", model_config, params, tokenizer),
    )
    params = train_stages(config, models, begin, run_folder, measure_stage, watch, profile)
    model_config, plans = models[-1].config, [applied for applied in (plan, *(model.plan for model in models)) if applied is not None]
    if first_says(not (run_folder / "hf").is_dir()):
        _export(run_folder / "hf", config, model_config, folder, plans, params, tokenizer)
    difference = export_difference(run_folder / "hf", params, model_config) if compare_export else None
    write_samples(run_folder, model_config, params, tokenizer, open_prepared(config.data.folder), make_mesh(config.training.mesh))
    with agreed():
        if first:
            _summarize(config, run_folder, model_config, difference)
            write_report(run_folder, run_folder / PAGE)
    finished = _finished(run_folder)
    assert finished is not None
    return finished


def _finished(run_folder: Path) -> dict[str, Any] | None:
    """The summary of a run folder, where its run is over."""
    path, found = run_folder / "summary.json", ""
    if jax.process_index() == 0 and path.is_file():
        try:
            found = json.dumps(read_as(path, Summary))
        except BadInput as problem:
            log.warning("%s; it is made anew from the last checkpoint", problem)
    found = first_text(found)
    return json.loads(found) if found else None


def report_run(path: Path, out: Path | None = None, tolerance: float = 0.0) -> dict[str, Any]:
    """Writes the page of a run folder, or of a demo's; gives {"path", "gate", "summary"}. Samples that are missing are made first."""
    run_folder = run_folder_of(path)
    if (run_folder / "hf").is_dir() and not (run_folder / SAMPLES).is_file():
        folder, data = open_folder(run_folder / "hf"), load_config(run_folder / "config.toml").data.folder
        write_samples(run_folder, folder.config, load_params(folder, dtype=jnp.float32), open_tokenizer(folder.path), open_prepared(data))
    found = write_report(run_folder, out or path / PAGE, tolerance)
    return {**found, "summary": f"{gate_words(found['gate'])}\nReport: {found['path']}"}


def generate_text(model: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    """What a model folder writes after a prompt."""
    folder = open_folder(model)
    tokenizer = open_tokenizer(folder.path)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise BadInput("babel generate: the prompt is not UTF-8; check the terminal's encoding") from None
    ids = tokenizer.encode_prompt(prompt)
    if len(ids) == len(tokenizer.begin_ids):
        raise BadInput("babel generate: the prompt is empty; give some text to go on from")
    params = load_params(folder, dtype=jnp.float32)
    new = generate(
        folder.config,
        params,
        [ids],
        max_new_tokens,
        tokenizer.stop_ids,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        repetition_penalty=stored_repetition_penalty(folder.path),
    )[0]
    text = tokenizer.decode_after(ids, [token for token in new if token not in tokenizer.stop_ids])
    return {"prompt": prompt, "text": text, "tokens": new, "summary": prompt + text}


def export_difference(hf: Path, params: PyTree[Array], config: ModelConfig) -> float:
    """The largest difference between the logits of `params` and those of the exported folder, read again, on fixed tokens."""
    reloaded = load_params(open_folder(hf), dtype=jnp.float32, shardings=jax.tree.map(lambda leaf: leaf.sharding, params))
    tokens = np.arange(64, dtype=np.int32)[None] * 37 % config.vocab_size
    logits = jax.jit(forward, static_argnums=0)
    return float(jnp.max(jnp.abs(logits(config, params, tokens) - logits(config, reloaded, tokens))))


# --- the parts ---------------------------------------------------------------------------------------------------------------


def _check_same(config: Config) -> None:
    """Raises BadInput on all processes where one was started with another config than process 0: they would wait for ever."""
    mine = config.model_dump(mode="json")
    if same_on_all(json.dumps(mine)):
        return
    first = json.loads(first_text(json.dumps(mine)))
    with agreed():
        if changed := _differences(first, mine):
            raise BadInput(
                f"the processes were started with different configs: not as in process 0 is {', '.join(changed)}; give all the same"
            )


def _claim(run_folder: Path, config: Config) -> None:
    """Writes the resolved config into the run folder, or checks it against the one that stands there.

    One from which nothing was computed yet, as after a mistake in it, is replaced, and so is one that deepens the model at other steps
    than those that were taken, or has another mesh.
    """
    path = run_folder / "config.toml"
    if not path.is_file() and any(not file.name.endswith((PARTIAL, LEASE)) for file in run_folder.iterdir()):
        raise BadInput(f"{run_folder}: not empty and not a run folder (it has no config.toml); give another out")
    if not any((run_folder / name).exists() for name in ("evaluation", "metrics.jsonl", "summary.json")):
        config.save(path)
        return
    before = parse_settings(Config, {**read_toml(path), "out": config.out}, str(path))
    finished = (run_folder / "summary.json").is_file()
    steps = sys.maxsize if finished else newest_step(run_folder / "checkpoints")
    if _until(before, steps) == _until(config, steps):
        if before != config and not finished:
            config.save(path)
    else:
        may_change = tuple(f"training.{name}" for name in CHANGEABLE)
        changed = _differences(before.model_dump(mode="json"), config.model_dump(mode="json"))
        changed = [name for name in changed if not name.startswith(may_change)]
        raise BadInput(f"{run_folder}: begun with another {', '.join(changed)}; give another out, or the settings of {path}")


def _until(config: Config, step: int) -> Config:
    """The config without the deepenings that a run of so many steps has not come to, nor what may change from one start to the next."""
    training = config.training.model_copy(update=dict.fromkeys(CHANGEABLE))
    deepen = tuple(deepening for deepening in config.deepen if deepening.step < step)
    return config.model_copy(update={"training": training, "deepen": deepen})


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        return [found for name in names for found in _differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [found for number, (one, other) in pairs for found in _differences(one, other, f"{key}.{number}")]
    return [] if before == now else [key]


def _tokenizer(config: Config, folder: ModelFolder | None) -> Tokenizer:
    path = config.data.tokenizer or (folder.path if folder is not None else None)
    if path is None:
        raise BadInput("data.tokenizer is not set and there is no model folder to take one from")
    return open_tokenizer(path, config.data.add_bos_token)


def _check_fit(config: Config, model_config: ModelConfig, tokenizer: Tokenizer) -> None:
    """What only shows once model, tokenizer and data are all there."""
    prepared = open_prepared(config.data.folder)
    prepared.check_tokenizer(tokenizer, config.data.conversations)
    chat = open_chat_format(tokenizer.path, config.data.chat_template) if config.data.conversations else None
    if prepared.chat_template != (chat.fingerprint if chat is not None else None):
        as_other = "as the other of text and conversations"
        other = f"with another chat template than {chat.where}" if chat and prepared.chat_template else as_other
        raise BadInput(f"{config.data.folder}: prepared {other}; prepare another folder, or set data.conversations as it was then")
    rows = model_config.vocab_size
    # A padding token may have no row (WizardLM): no text has it, and windows are padded with the token that ends a document.
    beyond = {token.id: token.content for token in tokenizer.added_tokens if token.id >= rows}
    is_only_padding = len(beyond) == tokenizer.vocab_size - rows and all(map(is_padding, beyond.values()))
    if tokenizer.vocab_size > rows and not is_only_padding:
        raise BadInput(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} entries, and the model's embedding {rows:,} rows (vocab_size); "
            "set data.tokenizer to the model's own"
        )
    if config.data.seq_len > model_config.max_position_embeddings:
        raise BadInput(
            f"data.seq_len = {config.data.seq_len} exceeds the model's max_position_embeddings = {model_config.max_position_embeddings}"
        )


def _measure(config: Config, point: str, model_config: ModelConfig, params: PyTree[Array], tokenizer: Tokenizer) -> None:
    """Measures on the held-out text and writes the point's file; one that is there already stays."""
    if first_says(point_file(Path(config.out), point).is_file()):
        return
    results = measure(config, point, model_config, params, tokenizer)
    with agreed():
        if jax.process_index() == 0:
            write_point(Path(config.out), point, results)


def _export(
    path: Path,
    config: Config,
    model_config: ModelConfig,
    folder: ModelFolder | None,
    plans: Sequence[ExpansionPlan],
    params: PyTree[Array],
    tokenizer: Tokenizer,
) -> None:
    base = None
    if folder is not None:
        base = functools.reduce(lambda hf, plan: expand_hf_config(hf, plan, folder.path.name), plans, folder.hf_config)
    stored = stored_eos_token_ids(base or {})
    chat = open_chat_format(tokenizer.path, config.data.chat_template) if config.data.conversations else None
    # What ends an assistant's turn comes first: some readers take one id alone.
    chat_eos = list(dict.fromkeys([chat.end_id, *stored, tokenizer.eos_id])) if chat is not None else []
    eos = chat_eos or (None if stored else tokenizer.eos_id)
    hf_config = write_hf_config(model_config, base, str(config.export_dtype), eos_token_id=eos, pad_token_id=tokenizer.pad_id)
    exported = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.export_dtype)), params)
    mixture = Path(config.out) / "mixture.json"
    mixtures = read_as(mixture, dict[str, Mixture]) if mixture.is_file() else {}
    card = run_card(config, hf_config, folder.path if folder is not None else None, mixtures)
    with tempfile.TemporaryDirectory() as files:
        if folder is not None:
            copy_other_files(folder.path, Path(files))
        else:
            tokenizer.save(Path(files))
        if chat is not None:
            write_chat_files(Path(files), chat, chat_eos)
        save_folder(path, Format.HF, exported, hf_config, Path(files), texts=card)


def _summarize(config: Config, run_folder: Path, model_config: ModelConfig, export_difference: float | None) -> None:
    results, best = read_points(run_folder, point_names(config)), run_folder / "evaluation" / BEST
    points = {name: scores_of(tasks, BITS_PER_BYTE) for name, tasks in results.items()}
    losses = {
        stage.name: [
            (line["step"], line["loss"])
            for line in read_lines(run_folder / "metrics.jsonl", StepLine)
            if line["stage"] == stage.name and line["loss"] is not None
        ]
        for stage in config.stages
    }
    goodput = goodput_of(run_folder / "goodput.json")
    text = "\n".join(
        [
            "# Bits per byte on held-out text, by language (lower is better)",
            "",
            points_table(points),
            "",
            *findings(points),
            "",
            *suite_table(results),
            f"{count_parameters(model_config):,} parameters in {model_config.num_hidden_layers} layers. Model: {run_folder / 'hf'}",
            f"Plot: {run_folder / 'summary.png'}. Report: {run_folder / PAGE}",
            *_goodput_line(goodput),
        ]
    )
    if export_difference is not None:
        text += f"\nThe exported model ({config.export_dtype}), read again, gives logits that differ by at most {export_difference:.1e}."
    plot_points(run_folder / "summary.png", points, losses)
    write_text(run_folder / "summary.md", text + "\n")
    result = {
        "out": str(run_folder),
        "hf": str(run_folder / "hf"),
        "layers": model_config.num_hidden_layers,
        "parameters": count_parameters(model_config),
        "bits_per_byte": points,
        "means": {name: class_means(values) for name, values in points.items()},
        "tasks": results,
        **({"best": read_as(best, Best)} if best.is_file() else {}),
        "report": str(run_folder / PAGE),
        "versions": versions(),
        **({} if goodput is None else {"goodput": goodput}),
        **({} if export_difference is None else {"export_difference": export_difference}),
        "summary": text,
    }
    write_text(run_folder / "summary.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _goodput_line(parts: dict[str, float] | None) -> list[str]:
    if parts is None:
        return []
    rest = ", ".join(
        f"{name} {part:.1%}" for name, part in sorted(parts.items(), key=lambda item: -item[1]) if name != "step" and part >= 0.001
    )
    return [f"Goodput {parts['step']:.1%} of the wall time of training; the rest: {rest}."]
