"""The corpora of the catalogue on the stand-in hub: for each language one small file, in the layout of the
real one.
"""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import zstandard

from babel_jax.config import Source
from babel_jax.config.catalogue import catalogue, expand
from babel_jax.hub.datasets import hub_path


def row_of(columns, language, number):
    row = {}
    for column in columns:
        if column.endswith("scores"):
            row[column] = [1.0, 2.0]
        elif column.endswith(("score", "size")):
            row[column] = 0.5 + number
        else:
            row[column] = f"{column} of {language}, row {number}"
    return row


def encoded(path, rows):
    """Rows as the bytes of a file, by the end of its name."""
    if path.endswith(".parquet"):
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file.getvalue()
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.endswith(".gz"):
        return gzip.compress(text, mtime=0)
    return zstandard.compress(text) if path.endswith(".zst") else text


def file_name(glob):
    """A name that a glob matches."""
    return glob.replace("**/", "train/").replace("*", "00000")


def put_corpus(hub, name, shards=1, change=None):
    """Puts a corpus of the catalogue on the hub; `change` changes its files before. Returns the commit."""
    entry = catalogue()[name]
    columns = entry.get("columns", [entry["source"].get("text_key", "text")])
    rows_at, repo, seen = {}, None, {}
    for given in expand({"catalogue": name}, Source.model_fields):
        source = Source(**given)
        if source.huggingface is not None:
            repo = source.huggingface
            path = f"data/{source.huggingface_config}/train-00000.parquet"
            seen[source.huggingface_config] = f"data/{source.huggingface_config}/*"
        else:
            on_hub = hub_path(source.path)
            repo, path = on_hub.repo, file_name(on_hub.path)
        for shard in range(shards):
            rows = [row_of(columns, source.language, 10 * shard + n) for n in range(2)]
            for row in rows:
                row |= source.where
            # A file may have the rows of several languages.
            rows_at.setdefault(path.replace("00000", f"{shard:05}"), []).extend(rows)
    files = {path: encoded(path, rows) for path, rows in rows_at.items()}
    if seen:
        configs = "".join(f"- config_name: {key}\n  data_files: {glob}\n" for key, glob in seen.items())
        files["README.md"] = f"---\nconfigs:\n{configs}---\n".encode()
    if change is not None:
        change(files)
    return hub.put(repo, files, kind="datasets", gated=entry.get("gated", False))
