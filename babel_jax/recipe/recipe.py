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
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from babel_jax.config import Config, ModelConfig, Stage
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.disk_errors import explain_os_errors
from babel_jax.distributed.agreement import agreed, first_says, first_text
from babel_jax.errors import BadInput
from babel_jax.evaluation.points import results_of, score_model
from babel_jax.evaluation.suite import Results
from babel_jax.files import make_folder
from babel_jax.lease import leased
from babel_jax.new_folders import remove_mark
from babel_jax.places import place, pull
from babel_jax.progress import working
from babel_jax.recipe.beginning import beginning_of, check_fit, evaluate_point
from babel_jax.recipe.claim import check_same, claim, with_commit
from babel_jax.recipe.export import export, export_difference
from babel_jax.recipe.summary import summarize
from babel_jax.report.page import PAGE, write_report
from babel_jax.report.samples import write_samples
from babel_jax.run_files import RAW, Summary, is_beside_checkpoints, read_as
from babel_jax.sending import check_access, settle
from babel_jax.training.compilation import compiled_in
from babel_jax.training.hooks import Hook
from babel_jax.training.mesh import make_mesh
from babel_jax.training.run import train_stages
from babel_jax.training.watch import Watch

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
    # Before anything is read or written: processes with different configs would wait for each other for ever.
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
        # At the end of the run, also of one that fails: what the bucket lacks is sent there.
        held.callback(settle, run_folder, RAW)
        return _run(config, run_folder, compare_export, profile, hooks)


def _run(
    config: Config, run_folder: Path, compare_export: bool, profile: range | None, hooks: Sequence[Hook]
) -> dict[str, Any]:
    first = jax.process_index() == 0
    # A model on the hub is fixed to one commit, so that a resumed run begins with the same weights.
    config = with_commit(config, run_folder)
    with agreed():
        if first:
            claim(run_folder, config)
    if (finished := _finished(run_folder)) is not None:
        # A fault after the summary was written left no page.
        with agreed():
            if first and not (run_folder / PAGE).is_file():
                write_report(run_folder, run_folder / PAGE)
        return finished

    beginning = beginning_of(config)
    tokenizer, models = beginning.tokenizer, beginning.models
    with agreed():
        check_fit(config, models[0].config, tokenizer)

    def evaluate_stage(stage: Stage, model_config: ModelConfig, params: PyTree[Array]) -> None:
        evaluate_point(config, stage.result, model_config, params, tokenizer)

    def evaluate_step(step: int, model_config: ModelConfig, params: PyTree[Array]) -> Results:
        return results_of(score_model(config, f"after {step} steps", model_config, params, tokenizer))

    watch = Watch(run_folder, config.evaluation.every, evaluate_step)
    # `train_stages` calls make_params only if there is no checkpoint.
    params = train_stages(
        config, models, beginning.make_params, run_folder, evaluate_stage, watch, profile, hooks
    )

    # After the last stage: the export, samples of its text, the summary and the page.
    last = models[-1].config
    plans = [] if beginning.plan is None else [beginning.plan]
    plans += [model.plan for model in models if model.plan is not None]
    # A fault after the folder was whole left the mark of its export.
    if first:
        remove_mark(run_folder / "hf")
    if first_says(not (run_folder / "hf").is_dir()):
        source, files = beginning.exported_like, beginning.files
        export(run_folder / "hf", config, last, source, plans, params, tokenizer, files)
    # The exported folder is read again from disk, and its logits are compared with those in memory.
    difference = export_difference(run_folder / "hf", params, last) if compare_export else None
    mesh, dtype = make_mesh(config.training.mesh), jnp.dtype(config.training.compute_dtype)
    with working("generating samples"):
        write_samples(run_folder, last, params, tokenizer, open_prepared(config.data.folder), mesh, dtype)
    with agreed(), working("writing the report"):
        if first:
            summarize(config, run_folder, last, difference)
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
    # Process 0 alone reads the file, so that all processes have the same answer.
    text = first_text(text)
    return json.loads(text) if text else None
