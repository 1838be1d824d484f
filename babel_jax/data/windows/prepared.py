"""The layout of a folder of prepared data, and its reader.

SHA256SUMS                   digests of the files beside it, of languages/ and of heldout/
settings.json                the settings of the folder; `prepare` refuses others on the same folder
languages/xx.json            counts of a language's rows; written after they have been read
heldout/xx.jsonl             held-out text, with keys id, text and kind, and score if the rows have one
windows/xx-KIND/1.0.0/       TFDS dataset `windows/xx-KIND` of packed windows
windows/xx-KIND/counts.json  its tokens, documents, bytes of text and windows
windows/xx-KIND/SHA256SUMS   digests of the windows
cleaned/, duplicates/, dropped/  the cleaned text: see shards.py, cleaned_parts.py, duplicates.py
prepared.json                the report; written last but for SHA256SUMS: a folder with this file is complete
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from babel_jax.data.json_files import read_json
from babel_jax.data.sources.rows import Row
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.digests import SUMS, file_sum
from babel_jax.errors import BadInput
from babel_jax.languages import declare, from_values
from babel_jax.places import place, pull

REPORT, SETTINGS, COUNTS = "prepared.json", "settings.json", "counts.json"


def dataset_folder(folder: Path, language: str, kind: str) -> Path:
    """The folder of the windows of a language and kind."""
    return folder / "windows" / f"{language}-{kind}"


def language_file(folder: Path, language: str) -> Path:
    """The file with the counts of a language's rows."""
    return folder / "languages" / f"{language}.json"


def heldout_file(folder: Path, language: str) -> Path:
    """The file with the held-out text of a language."""
    return folder / "heldout" / f"{language}.jsonl"


@dataclasses.dataclass(frozen=True)
class Supply:
    """The size of a dataset: `tokens` without padding, and the number of windows that hold them."""

    tokens: int
    windows: float

    @property
    def tokens_per_window(self) -> float:
        """The mean; it is below the length of a window if conversations do not fill it."""
        return self.tokens / self.windows


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A finished folder.

    report: the content of prepared.json: seq_len, tokenizer, and by language the counts of rows and of the
    dataset of each kind.
    """

    folder: Path
    report: dict[str, Any]

    @property
    def seq_len(self) -> int:
        """Tokens in a window."""
        result: int = self.report["seq_len"]
        return result

    @property
    def tokenizer_fingerprint(self) -> str:
        """`Tokenizer.fingerprint` of the tokenizer that made the windows."""
        result: str = self.report["tokenizer"]["fingerprint"]
        return result

    @property
    def fingerprint(self) -> str:
        """A digest of the settings, the text and the counts of the windows.

        The same text prepared again, on any machine at any time, has the same fingerprint.
        """
        # Times and locations are left out: another machine has others.
        settings = json.dumps(read_json(self.folder / SETTINGS), sort_keys=True)
        hashed = hashlib.blake2b(settings.encode(), digest_size=16)
        for language in sorted(self.languages):
            entry = dict(self.report["languages"][language])
            sources = [dict(source) for source in entry.pop("sources", [])]

            # Paths differ from machine to machine: the digests of the files take their place.
            for source in sources:
                source.pop("path", None)
                files = source.get("files") or {}
                source["files"] = [file.get("digest") for file in files.values()]
            for name in ("located", "cleaning"):
                entry.pop(name, None)

            hashed.update(json.dumps([language, entry, sources], sort_keys=True).encode())
        return hashed.hexdigest()

    @property
    def begin_ids(self) -> list[int]:
        """The token ids at the start of each document: the bos_token, or none."""
        result: list[int] = self.report["tokenizer"].get("begin_ids", [])
        return result

    @property
    def chat_template(self) -> str | None:
        """`ChatFormat.fingerprint` of the chat template that the conversations were prepared with; None for
        text.
        """
        return read_json(self.folder / SETTINGS).get("chat_template")

    def check_tokenizer(self, tokenizer: Tokenizer, conversations: bool) -> None:
        """Raises BadInput if the windows were made with another tokenizer, or with another start of each
        document.
        """
        if self.tokenizer_fingerprint != tokenizer.fingerprint:
            raise BadInput(
                f"{self.folder}: prepared with another tokenizer than the model's; prepare another folder "
                "with this one"
            )
        if not conversations and self.begin_ids != tokenizer.begin_ids:
            raise BadInput(
                f"{self.folder}: each document begins with the token ids {self.begin_ids}, and the "
                f"tokenizer begins a text with {tokenizer.begin_ids}; prepare another folder, or set "
                "data.add_bos_token as it was then"
            )

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages, in the order of the report."""
        return tuple(self.report["languages"])

    @property
    def available(self) -> dict[tuple[str, str], int]:
        """Tokens of each language and kind; the end token of a document counts, padding does not."""
        tokens = {}
        for language, entry in self.report["languages"].items():
            for kind, counts in entry["kinds"].items():
                tokens[language, kind] = counts["tokens"]
        return tokens

    @property
    def supplies(self) -> dict[tuple[str, str], Supply]:
        """The size of the dataset of each language and kind."""
        supplies = {}
        for language, entry in self.report["languages"].items():
            for kind, counts in entry["kinds"].items():
                tokens = counts["tokens"]
                # Folders of earlier versions have no count of windows; their windows are full.
                windows = counts.get("windows", tokens / self.seq_len)
                supplies[language, kind] = Supply(tokens, windows)
        return supplies

    def heldout(self, language: str) -> list[Row]:
        """The held-out rows of a language.

        Raises BadInput if the file has changed since it was written: its figures would mean nothing.
        """
        # Old folders have no digest, and are read as they are.
        file = heldout_file(self.folder, language)
        digest = self.report["languages"][language].get("heldout_sha256")
        if digest is not None and file_sum(file, stored=False) != digest:
            raise BadInput(
                f"{file}: not as it was written; remove the folder {self.folder} and run `babel prepare` "
                "again"
            )
        with open(file, encoding="utf-8") as lines:
            return [Row(**json.loads(line)) for line in lines]


def open_prepared(folder: Path | str) -> PreparedData:
    """Opens a folder that `prepare` finished. Raises BadInput if it is missing, unfinished or unreadable."""
    folder = place(folder)
    pull(folder, is_beside_text)
    if not (folder / REPORT).is_file():
        state = "is not finished" if (folder / SETTINGS).is_file() else "is no folder of prepared data"
        raise BadInput(f"{folder}: {state} (it has no {REPORT}); run `babel prepare`")

    # A damaged report lacks keys or has values of other types.
    prepared = PreparedData(folder, read_json(folder / REPORT))
    try:
        needed = [dataset_folder(folder, *dataset) for dataset in prepared.available]
        complete = bool(prepared.seq_len and prepared.tokenizer_fingerprint)
        declare(from_values(prepared.report.get("declared", ())))
    except (KeyError, TypeError, AttributeError, ValueError):
        complete = False
    if not complete:
        raise BadInput(
            f"{folder / REPORT}: damaged; remove the folder {folder} and run `babel prepare` again"
        )

    # A folder that lost a file is told now, and not at the step that reads it.
    needed += [heldout_file(folder, language) for language in prepared.languages]
    absent = [path for path in needed if not path.exists()]
    if absent:
        raise BadInput(f"{absent[0]}: missing; remove the folder {folder} and run `babel prepare` again")
    return prepared


def is_prepared(folder: Path | str) -> bool:
    """True if `prepare` finished the folder, which may be in a bucket."""
    path = place(folder)
    pull(path, lambda name: name == REPORT)
    return (path / REPORT).is_file()


def is_no_window(name: str) -> bool:
    """True unless the file belongs to a dataset of windows. `name` is relative to the folder."""
    return not (name.startswith("windows/") and name.count("/") > 2)


def is_beside_text(name: str) -> bool:
    """True for the files that every reader of the folder needs. `name` is relative to the folder.

    Windows are copied later, when they are opened.
    """
    top, _, rest = name.partition("/")
    return top in (REPORT, SETTINGS, SUMS, "languages", "heldout") or (
        top == "windows" and rest.count("/") == 1
    )
