"""The parameters of a model folder as jax arrays: loaded from a folder, and saved as a new one."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from flax import traverse_util
from jaxtyping import Array, PyTree

from babel_jax.distributed.agreement import agreed, new_folder_of_all, write_sums_of_all
from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.model.shapes import leaf_shapes
from babel_jax.model_files import CONFIG
from babel_jax.model_folders.folder import Format, ModelFolder, copy_other_files
from babel_jax.model_folders.hf_config import in_both_spellings, read_hf_config
from babel_jax.model_folders.hf_params import load_hf_params, save_hf_params
from babel_jax.model_folders.layout import check_shapes
from babel_jax.model_folders.safetensors_files import SHARD_BYTES
from babel_jax.places import place, url_of


def load_params(
    folder: ModelFolder,
    dtype: Any = None,
    shardings: PyTree[jax.sharding.Sharding] | jax.sharding.Sharding | None = None,
) -> PyTree[Array]:
    """The parameter tree (layers stacked) as jax arrays.

    dtype: None keeps each tensor's dtype. shardings: one for all leaves, a tree of them like the parameters,
    or None for the default device. Of several processes, each reads its share of an HF folder, so that
    together they read it once. Raises BadInput, on all processes, for damaged, missing, unexpected or
    misshapen tensors.
    """
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        by_place = dict.fromkeys(leaf_shapes(folder.config), shardings)
    else:
        by_place = traverse_util.flatten_dict(shardings)
    if folder.format is Format.HF:
        return load_hf_params(folder.path, folder.config, dtype, by_place)
    # Orbax and TensorStore are an eighth of the time to start; most folders do not need them.
    from babel_jax.model_folders.orbax_params import load_orbax_params

    return load_orbax_params(folder.path, folder.config, dtype, by_place)


def save_folder(
    path: Path | str,
    format: Format,
    params: PyTree[Array],
    hf_config: dict[str, Any],
    copy_files_from: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> ModelFolder:
    """Writes a model folder; a failure leaves no half-written folder. It has the parameters in their dtypes,
    `hf_config` as config.json (in the forms of transformers 4 and 5), and further files.

    copy_files_from: a folder whose other files (tokenizer, generation settings, licence, ...) are copied.
    texts: further files by name, which replace copied ones. The `dtype` in `hf_config` is written unchanged:
    `write_hf_config` sets it. Several processes must all call this, with the same arguments and a path on a
    disk that they share; each writes its own files. Raises BadInput, on all of them, if the folder exists,
    the disk is full, or `params` is not the model of `hf_config`.
    """
    path = place(path)
    config = read_hf_config(hf_config, str(path / CONFIG))
    leaves = traverse_util.flatten_dict(params)
    # Before anything is written: the parameters must be the model of the config.
    shapes = {"/".join(place): tuple(leaf.shape) for place, leaf in leaves.items()}
    expected = {"/".join(place): shape for place, shape in leaf_shapes(config).items()}
    check_shapes(shapes, expected, path, lambda _: path)
    hf_config = in_both_spellings(hf_config, str(path / CONFIG))
    if format is Format.ORBAX and jax.process_count() > 1 and url_of(path) is not None:
        raise BadInput(
            f"{path}: several processes cannot write an Orbax folder into a bucket; write an HF folder, and "
            "convert it"
        )

    # Config and other files come from process 0; every process writes its part of the parameters.
    with new_folder_of_all(path) as partial:
        with agreed():
            if jax.process_index() == 0:
                if copy_files_from is not None:
                    copy_other_files(copy_files_from, partial)
                for name, text in {**texts, CONFIG: json.dumps(hf_config, indent=2) + "\n"}.items():
                    write_text(partial / name, text)
        if format is Format.HF:
            save_hf_params(partial, config, params, shard_bytes)
        else:
            from babel_jax.model_folders.orbax_params import save_orbax_params

            save_orbax_params(partial, params)
        write_sums_of_all(partial)
    return ModelFolder(path, format, config, hf_config)
