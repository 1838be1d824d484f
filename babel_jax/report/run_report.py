"""Writes the page of a run folder or of a demo again."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from babel_jax.config.file import load_config
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.report.gate import gate_text
from babel_jax.report.page import PAGE, write_report
from babel_jax.report.record import SAMPLES, run_folder_of
from babel_jax.report.samples import write_samples


def report_run(path: Path, out: Path | None = None, tolerance: float = 0.0) -> dict[str, Any]:
    """Writes the page of a run folder, or of a demo's folder; returns {"path", "gate", "summary"}.

    Missing samples are generated first.
    """
    run_folder = run_folder_of(path)
    # A run that was stopped after its export has a model and no samples.
    if (run_folder / "hf").is_dir() and not (run_folder / SAMPLES).is_file():
        folder, data = open_folder(run_folder / "hf"), load_config(run_folder / "config.toml").data.folder
        write_samples(
            run_folder,
            folder.config,
            load_params(folder, dtype=jnp.float32),
            open_tokenizer(folder.path),
            open_prepared(data),
        )
    report = write_report(run_folder, out or path / PAGE, tolerance)
    return {**report, "summary": f"{gate_text(report['gate'])}\nReport: {report['path']}"}
