"""Model folders, which every command reads and writes: config.json and tokenizer files beside the parameters
in one of two formats.
"""

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Any

from babel_jax.buckets import is_url
from babel_jax.config import ModelConfig
from babel_jax.digests import is_list
from babel_jax.errors import BadInput
from babel_jax.files import read_bytes, read_json, write_bytes
from babel_jax.hub.models import hub_model
from babel_jax.hub.names import hub_name, hub_origin
from babel_jax.model_files import CONFIG, FOLDERS_BESIDE, MOST_BESIDE_BYTES, PARAMS, WEIGHT_SUFFIXES
from babel_jax.model_folders.hf_config import read_hf_config
from babel_jax.model_folders.object_storage import stand_in
from babel_jax.new_folders import MARK
from babel_jax.places import url_of

MOST_CONFIG_BYTES = 2**22  # with the plans of many expansions it stays below 1 MB


class Format(StrEnum):
    """The format of a model folder: safetensors in Hugging Face's layout, or an Orbax checkpoint under
    params/.
    """

    HF = "hf"
    ORBAX = "orbax"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder whose config.json has been read. `hf_config` is that file unchanged, with keys that
    `config` does not have.
    """

    path: Path
    format: Format
    config: ModelConfig
    hf_config: dict[str, Any]


def open_folder(path: Path | str, weights: bool = True) -> ModelFolder:
    """Reads config.json and finds the format from the files; parameters are not read.

    A folder may be in a bucket, named by its URL (gs://bucket/name); `path` is then a local folder that
    stands in for it. It may be a model on the hub (OWNER/NAME, OWNER/NAME@REVISION); `path` is then its
    folder in the hub's cache. Without `weights` its parameters are not fetched, and a folder may have none,
    such as one for a plan. Raises BadInput for a folder that is no model folder of a supported architecture.
    """
    name = hub_name(path)
    url = str(path) if is_url(path) else url_of(Path(path))
    if name is not None:
        path = hub_model(name, weights)
    elif url is not None:
        path = stand_in(url)
    path = Path(path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError:  # the name is impossible on this file system
        is_folder, exists = False, False
    if not exists:
        raise BadInput(f"{path}: no such model folder")
    if not is_folder:
        raise BadInput(f"{path}: a file; a model folder is needed")
    try:
        hf_config = read_json(path / CONFIG, path, MOST_CONFIG_BYTES)
    except FileNotFoundError:
        # A run folder is a likely mistake: it has a model folder in hf/.
        run = "; it is a run folder: its model is in hf/, and [[deepen]] in its settings deepens it midway"
        raise BadInput(
            f"{path}: no {CONFIG}, so this is not a model "
            f"folder{run if (path / 'config.toml').is_file() else ''}"
        ) from None
    if not isinstance(hf_config, dict):
        raise BadInput(f"{path / CONFIG}: not a JSON object")
    config = read_hf_config(hf_config, str(path / CONFIG))
    return ModelFolder(path, _format(path, weights), config, hf_config)


def model_name(folder: Path) -> str:
    """The name of a model for tables: its folder's, or of the run that exported it (RUN/hf, RUN/run/hf), or
    its name on the hub.
    """
    named = folder.resolve()
    on_hub = hub_origin(named)
    if on_hub is not None:
        return on_hub.repo.split("/")[1]
    # RUN/hf and RUN/run/hf are named by RUN: "hf" says nothing about a model.
    for exported in (Format.HF, "run"):
        if named.name == exported:
            named = named.parent
    return named.name or str(folder)


def source_name(folder: Path) -> str:
    """The name of a model for its descendants: on the hub with its commit, else as `model_name`."""
    on_hub = hub_origin(folder.resolve())
    return model_name(folder) if on_hub is None else str(on_hub)


def copy_other_files(source: Path, destination: Path) -> None:
    """Copies the files beside the parameters and config.json of a model folder: tokenizer, generation
    settings, licence, cards.

    Raises BadInput for a link that leads out of the folder, an irregular file, and a file of more than
    MOST_BESIDE_BYTES.
    """
    for file in sorted(source.iterdir()):
        # Weights, config.json, marks and lists of digests belong to the source alone; the new folder gets its
        # own.
        is_parameters = file.name in (CONFIG, PARAMS, MARK) or file.name.endswith(WEIGHT_SUFFIXES)
        if is_parameters or file.name.startswith(".") or is_list(file):
            continue
        if not file.is_dir():
            write_bytes(destination / file.name, read_bytes(file, source, MOST_BESIDE_BYTES))
        elif file.name in FOLDERS_BESIDE:
            (destination / file.name).mkdir(exist_ok=True)
            for below in sorted(file.iterdir()):
                write_bytes(
                    destination / file.name / below.name, read_bytes(below, source, MOST_BESIDE_BYTES)
                )


def _format(path: Path, weights: bool) -> Format:
    # The files decide, not the name of the folder. Both formats in one folder would be two models.
    orbax = (path / PARAMS).is_dir()
    hf = any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))
    if orbax and hf:
        raise BadInput(
            f"{path}: holds both safetensors files and {PARAMS}/; remove the one that does not count"
        )
    if not orbax and not hf and weights:
        raise BadInput(
            f"{path}: holds neither safetensors files nor an Orbax {PARAMS}/; other weight formats must be "
            "converted first"
        )
    return Format.ORBAX if orbax else Format.HF
