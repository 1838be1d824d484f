"""The recipe as one function: a model is expanded, trained through the stages, evaluated at each point, and
exported.

Only this module knows all the parts. Files in the run folder:

    config.toml        the resolved config; it is enough to repeat the run
    checkpoints/       the train state, by step
    metrics.jsonl      a line for each step; the same in tensorboard/
    goodput.json       the uses of wall time, over all restarts
    compiled/          compiled programs, for restarts
    lease.json         the job that works in the folder
    mixture.json       tokens, shares and epochs of each stage; as a table in mixture.txt
    optimizer.txt      the learning rate and weight decay of each parameter
    evaluation/X.json  bits per byte and the offline suite at the point X: base, extended, expanded, and the
                       result of each stage; items/X.json: the scored items
    evaluation/        during.jsonl and best.json: evaluations between steps, and the best (training/watch.py)
    hf/                the trained model as a Hugging Face folder
    samples.json       text that the trained model generates in each language; samples-parent.json: its parent
    summary.*          table (.md), figures (.json) and plot (.png)
    report.html        all of it on one page
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from babel_jax.config import Config, ModelConfig, Stage
from babel_jax.data.tokens.chat_format import open_chat_format
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.disk_errors import explain_os_errors
from babel_jax.distributed.agreement import agreed, first_says, first_text
from babel_jax.errors import BadInput
from babel_jax.evaluation.points import point_file, results_of, score_model, write_point
from babel_jax.evaluation.suite import Results
from babel_jax.expansion.apply import expand_config, expanding, new_layers_of
from babel_jax.expansion.plan import plan_from_settings
from babel_jax.files import make_folder
from babel_jax.lease import leased
from babel_jax.model.decoder import initializing
from babel_jax.model_folders.folder import load_params, open_folder
from babel_jax.model_folders.tokenizer_files import is_padding
from babel_jax.new_folders import remove_mark
from babel_jax.places import place, pull
from babel_jax.progress import working
from babel_jax.recipe.claim import check_same, claim, with_commit
from babel_jax.recipe.export import export, export_difference
from babel_jax.recipe.summary import summarize
from babel_jax.recipe.vocabulary import larger_model
from babel_jax.report.page import PAGE, write_report
from babel_jax.report.record import PARENT_SAMPLES
from babel_jax.report.samples import write_samples
from babel_jax.run_files import RAW, Summary, is_beside_checkpoints, read_as
from babel_jax.sending import check_access, settle
from babel_jax.training.compilation import compiled_in
from babel_jax.training.deepening import depths
from babel_jax.training.hooks import Hook
from babel_jax.training.mesh import make_mesh, param_shardings
from babel_jax.training.run import train_stages
from babel_jax.training.watch import Watch
from babel_jax.vocabulary.card import new_rows_of
from babel_jax.vocabulary.growth import grow_config, growing

log = logging.getLogger("babel")


def run_recipe(
    config: Config,
    compare_export: bool = False,
    profile: range | None = None,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Runs or resumes the run folder `config.out`; for a finished run, returns its summary.

    Returns {"out", "hf", "bits_per_byte": {point: {language: value}}, "means", "parameters", "layers",
    "summary"}, and with `compare_export`, for models that one device can hold twice, "export_difference" (see
    `export_difference`). profile: the steps to trace. hooks: called around each step.
    """
    run_folder = place(config.out)
    check_same(config)
    # Of several processes of one run, the first one holds the lease for all.
    with contextlib.ExitStack() as held:
        held.enter_context(explain_os_errors(run_folder))
        with agreed():
            make_folder(run_folder)
            check_access(run_folder)
            if jax.process_index() == 0:
                held.enter_context(leased(run_folder))
        with agreed():
            pull(run_folder, is_beside_checkpoints, fresh=True)
        if config.training.compilation_cache:
            held.enter_context(compiled_in(run_folder / "compiled"))
        held.callback(settle, run_folder, RAW)
        return _run(config, run_folder, compare_export, profile, hooks)


def _run(
    config: Config, run_folder: Path, compare_export: bool, profile: range | None, hooks: Sequence[Hook]
) -> dict[str, Any]:
    first = jax.process_index() == 0
    config = with_commit(config, run_folder)
    with agreed():
        if first:
            config = claim(run_folder, config)
    # All processes count languages in the same order.
    config = config.in_order(json.loads(first_text(json.dumps(config.order))))
    if (finished := _finished(run_folder)) is not None:
        # A fault after the summary was written left no page.
        with agreed():
            if first and not (run_folder / PAGE).is_file():
                write_report(run_folder, run_folder / PAGE)
        return finished
    with agreed():
        folder = open_folder(config.model.folder) if config.model.folder is not None else None
    larger = larger_model(config, folder)
    files = larger.path if larger is not None else folder.path if folder is not None else None
    with agreed():
        if config.data.sources and first:
            # Returns at once if the data is prepared; raises if it was prepared with other settings.
            prepare(config.data, files)
    with agreed():
        tokenizer = _tokenizer(config, files)
        base_tokenizer = tokenizer
        base_config = folder.config if folder is not None else config.model.shape
        assert base_config is not None
        model_config = base_config
        if larger is not None and folder is not None:
            base_tokenizer = open_tokenizer(folder.path, config.data.add_bos_token)
            model_config = grow_config(base_config, larger.growth)
        _check_fit(config, model_config, tokenizer)

    plan, larger_config = None, model_config
    if config.expansion is not None:
        plan = plan_from_settings(config.expansion, base_config.num_hidden_layers)
        model_config = expand_config(larger_config, plan)

    def begin() -> PyTree[Array]:
        """The parameters before the first step; evaluates the points `base`, `extended` and
        `expanded`.
        """
        mesh = make_mesh(config.training.mesh)
        shardings = param_shardings(base_config, mesh)
        if folder is None:
            params = initializing(shardings)(base_config, jax.random.key(config.seed))
        else:
            params = load_params(folder, dtype=jnp.float32, shardings=shardings)
            _evaluate_point(config, "base", base_config, params, base_tokenizer)
            write_samples(
                run_folder,
                base_config,
                params,
                base_tokenizer,
                open_prepared(config.data.folder),
                mesh,
                jnp.dtype(config.training.compute_dtype),
                PARENT_SAMPLES,
            )
        if larger is not None:
            with working("adding the rows of new tokens"):
                params = growing(param_shardings(larger_config, mesh))(params, larger.growth)
            _evaluate_point(config, "extended", larger_config, params, tokenizer)
        if plan is not None:
            with working("adding the layers"):
                params = expanding(param_shardings(model_config, mesh))(params, plan)
        if plan is not None and folder is not None:
            _evaluate_point(config, "expanded", model_config, params, tokenizer)
        return params

    def evaluate_stage(stage: Stage, model_config: ModelConfig, params: PyTree[Array]) -> None:
        _evaluate_point(config, stage.result, model_config, params, tokenizer)

    def evaluate_step(step: int, model_config: ModelConfig, params: PyTree[Array]) -> Results:
        return results_of(score_model(config, f"after {step} steps", model_config, params, tokenizer))

    # The new layers, for stages that train them alone: of this expansion, or of the folder's last one.
    if plan is not None:
        new_layers = plan.new_layers
    else:
        new_layers = new_layers_of(folder.hf_config) if folder is not None else ()
    hf_config = larger.hf_config if larger is not None else folder.hf_config if folder is not None else {}
    models = depths(model_config, new_layers, config.deepen, new_rows_of(hf_config))
    watch = Watch(run_folder, config.evaluation.every, evaluate_step)
    params = train_stages(config, models, begin, run_folder, evaluate_stage, watch, profile, hooks)

    model_config = models[-1].config
    # All expansions: the one before the first stage, and those between stages.
    plans = [] if plan is None else [plan]
    plans += [model.plan for model in models if model.plan is not None]
    # A fault after the folder was whole left the mark of its export.
    if first:
        remove_mark(run_folder / "hf")
    if first_says(not (run_folder / "hf").is_dir()):
        source = folder
        if folder is not None and larger is not None:
            source = dataclasses.replace(folder, hf_config=larger.hf_config)
        export(run_folder / "hf", config, model_config, source, plans, params, tokenizer, files)
    difference = export_difference(run_folder / "hf", params, model_config) if compare_export else None
    mesh, dtype = make_mesh(config.training.mesh), jnp.dtype(config.training.compute_dtype)
    with working("generating samples"):
        write_samples(
            run_folder, model_config, params, tokenizer, open_prepared(config.data.folder), mesh, dtype
        )
    with agreed(), working("writing the report"):
        if first:
            summarize(config, run_folder, model_config, difference)
            write_report(run_folder, run_folder / PAGE)
    finished = _finished(run_folder)
    assert finished is not None
    return finished


def _finished(run_folder: Path) -> dict[str, Any] | None:
    """The summary of a run folder whose run is finished; None for other folders."""
    path, text = run_folder / "summary.json", ""
    if jax.process_index() == 0 and path.is_file():
        try:
            text = json.dumps(read_as(path, Summary))
        except BadInput as problem:
            log.warning("%s; it is made anew from the last checkpoint", problem)
    text = first_text(text)
    return json.loads(text) if text else None


def _tokenizer(config: Config, files: Path | None) -> Tokenizer:
    path = config.data.tokenizer or files
    if path is None:
        raise BadInput("data.tokenizer is not set and there is no model folder to take one from")
    return open_tokenizer(path, config.data.add_bos_token)


def _check_fit(config: Config, model_config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises BadInput if model, tokenizer and data do not fit each other; this can be checked only when all
    are there.
    """
    prepared = open_prepared(config.data.folder)
    prepared.check_tokenizer(tokenizer, config.data.conversations)
    chat = open_chat_format(tokenizer.path, config.data.chat_template) if config.data.conversations else None
    if prepared.chat_template != (chat.fingerprint if chat is not None else None):
        if chat and prepared.chat_template:
            other = f"with another chat template than {chat.location}"
        else:
            other = "as the other of text and conversations"
        raise BadInput(
            f"{config.data.folder}: prepared {other}; prepare another folder, or set data.conversations as "
            "it was then"
        )

    # A padding token may have no row (WizardLM): no text has it, and windows are padded with the token that
    # ends a document.
    rows = model_config.vocab_size
    beyond = {token.id: token.content for token in tokenizer.added_tokens if token.id >= rows}
    is_only_padding = len(beyond) == tokenizer.vocab_size - rows and all(map(is_padding, beyond.values()))
    if tokenizer.vocab_size > rows and not is_only_padding:
        raise BadInput(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} entries, and the model's "
            f"embedding {rows:,} rows (vocab_size); set data.tokenizer to the model's own"
        )
    if config.data.seq_len > model_config.max_position_embeddings:
        raise BadInput(
            f"data.seq_len = {config.data.seq_len} exceeds the model's max_position_embeddings = "
            f"{model_config.max_position_embeddings}"
        )


def _evaluate_point(
    config: Config, point: str, model_config: ModelConfig, params: PyTree[Array], tokenizer: Tokenizer
) -> None:
    """Evaluates on the held-out text and writes the point's file; an existing file is kept."""
    if first_says(point_file(place(config.out), point).is_file()):
        return
    measured = score_model(config, point, model_config, params, tokenizer)
    with agreed():
        if jax.process_index() == 0:
            write_point(place(config.out), point, measured)
