"""The safetensors files of a folder: those that its index names, or a single one."""

from pathlib import Path

from babel_jax.errors import BadInput
from babel_jax.files import read_json
from babel_jax.model_files import INDEX

SINGLE = "model.safetensors"


def read_index(folder: Path) -> dict[str, str]:
    """The index's map from tensor to file name; empty without an index. All its files must exist."""
    path = folder / INDEX
    if not _is_there(path):
        return {}
    index = read_json(path, folder)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadInput(f"{path}: not a safetensors index (a JSON object with a weight_map); fetch it again")
    if not weight_map:
        raise BadInput(f"{path}: names no tensors")
    files = sorted(set(weight_map.values()))
    # An index may come from a stranger, and must not make us read other files.
    outside = [file for file in files if Path(file).name != file or "\0" in file]
    if outside:
        raise BadInput(f"{path}: names files outside of the folder: {', '.join(outside)}")
    if _is_there(folder / SINGLE) and SINGLE not in files:
        # transformers reads the file, and vLLM reads the files of the index.
        raise BadInput(
            f"{folder}: holds {SINGLE} and an index that does not name it; remove the one that does not count"
        )
    missing = [file for file in files if not _is_there(folder / file)]
    if missing:
        raise BadInput(
            f"{path}: names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing; "
            "fetch the folder again"
        )
    return weight_map


def _is_there(file: Path) -> bool:
    try:
        return file.exists() or file.is_symlink()
    except OSError:  # the name is impossible on this file system
        return False


def single_file(folder: Path) -> Path:
    """The only safetensors file of a folder without an index.

    Raises BadInput if there is none, or several.
    """
    files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise BadInput(
            f"{folder}: {len(files)} safetensors files and no {INDEX} that says which of them count; fetch "
            "the index too"
        )
    if not files:
        raise BadInput(
            f"{folder}: no safetensors files; other weight formats must be converted to safetensors first"
        )
    return files[0]
