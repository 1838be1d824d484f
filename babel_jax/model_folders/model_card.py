"""The card of a model folder, README.md: front matter for the hub, then the known facts about the model.

A card is about one model, so a folder with new parameters gets a new card. The card of a foreign base stays
beside it as README.base.md, also through further steps. A card that this project wrote is not kept: the next
card has all its facts.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from babel_jax import __version__
from babel_jax.errors import one_line
from babel_jax.files import read_bytes
from babel_jax.hub.names import hub_origin
from babel_jax.languages import position
from babel_jax.model_files import MOST_BESIDE_BYTES
from babel_jax.model_folders.folder import model_name
from babel_jax.model_folders.hub_licences import HUB_LICENCES

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD, BASE_CARD = "README.md", "README.base.md"
TAG = "babel-jax"
_MOST_FRONT_MATTER = 2**16  # characters
_LONGEST_VALUE = 300  # characters of a licence, a name, a link
_MOST_LANGUAGES = 1_000
_MADE_FROM = "made_from"  # key of the front matter: the name of a base that is not on the hub
_COMMIT = "base_model_commit"  # key of the front matter: the commit of a base that was fetched from the hub
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>()#+!|&~]")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def card_files(
    hf_config: Mapping[str, Any],
    source: Path | None,
    sections: Sequence[str],
    *,
    name: str = "",
    languages: Sequence[str] = (),
    tags: Sequence[str] = (),
    results: Sequence["EvalResult"] = (),
    prompt: str = "",
    in_hf_format: bool = True,
) -> dict[str, str]:
    """The text of README.md, and of README.base.md if there is a foreign card, for a model of `hf_config`
    made from the folder `source` (None: from random weights).

    name: the title; default: the number of layers. Licence, base model and languages are those of the source;
    `languages` are added. `sections` are Markdown. prompt: a text for the model to continue, in the code that
    loads a folder `in_hf_format`. The front matter is valid for the hub: a base whose name is no OWNER/NAME
    is in the text alone, and a licence that the hub does not know is "other" with its name.
    """
    # The source's card has its licence and languages. A card of ours also names the base of the source.
    before = front_matter(source) if source is not None else {}
    ours = TAG in _several(before.get("tags"))
    origin = _origin(source, before, hf_config, ours)
    kind = f"{hf_config['num_hidden_layers']} layers ({hf_config.get('model_type', 'decoder')})"
    title = one_line(name, _LONGEST_VALUE) if name else f"A model of {kind}"
    data = _metadata(before, origin, title, languages, tags, results)
    foreign = _foreign_card(source, ours)
    loads = "It loads in `transformers` as it is." if in_hf_format else "It is a folder in Orbax's format."
    body = [
        f"# {markdown_text(title)}",
        f"A model of {kind}, made by babel-jax {__version__} from {origin.text}. {loads}"
        + (f" The card of the base is kept in `{BASE_CARD}`." if foreign is not None else ""),
        _licence_line(_text(before.get("license_name")) or _text(before.get("license")), source),
        _snippet(prompt or "The", in_hf_format),
        *sections,
    ]
    card = (
        f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()}\n---\n\n"
        + "\n\n".join(part for part in body if part)
        + "\n"
    )
    if foreign is None:
        return {CARD: card}
    return {
        CARD: card,
        BASE_CARD: read_bytes(foreign, foreign.parent, MOST_BESIDE_BYTES).decode("utf-8", "replace"),
    }


class _Origin(NamedTuple):
    """What a model was made from: the name of the base and its commit on the hub, each if it is known, and a
    phrase in Markdown.
    """

    base: str | None
    commit: str | None
    text: str


def _origin(
    source: Path | None, before: Mapping[str, Any], hf_config: Mapping[str, Any], ours: bool
) -> _Origin:
    """The origin of a model made from the folder `source`. before, ours: the metadata of the folder's card,
    and True if this project wrote that card.
    """
    base: str | None
    commit: str | None = None
    fetched = None if source is None else hub_origin(source.resolve())
    if fetched is not None:
        base, commit = fetched.repo, fetched.revision
    elif ours:
        # The base of the base: a folder between two steps of our own is nothing that others can get.
        base = _text(before.get(_MADE_FROM)) or _text(before.get("base_model"))
        commit = _text(before.get(_COMMIT))
    else:
        base = None if source is None else _name(source, hf_config)
    if base:
        text = markdown_code(base) + (f" at commit {markdown_code(commit)}" if commit else "")
    else:
        text = "a model that babel-jax trained from random weights" if ours else "random weights"
    return _Origin(base, commit, text)


def _metadata(
    before: Mapping[str, Any],
    origin: _Origin,
    title: str,
    languages: Sequence[str],
    tags: Sequence[str],
    results: Sequence["EvalResult"],
) -> dict[str, Any]:
    """The front matter, in the order of the hub's own cards. before: that of the source's card."""
    # Our languages come first, in the registry's order, then all others.
    known = [one_line(code, _LONGEST_VALUE) for code in _several(before.get("language"))]
    codes = sorted({*known, *languages}, key=position)
    is_hub_id = origin.base is not None and _HUB_ID.fullmatch(origin.base) is not None
    licence, licence_name = _licence(before)
    data: dict[str, Any] = {
        "base_model": origin.base if is_hub_id else None,
        "language": codes,
        "library_name": "transformers",
        "license": licence,
        "license_name": licence_name,
        "license_link": _text(before.get("license_link")),
        "pipeline_tag": _text(before.get("pipeline_tag")) or "text-generation",
        "tags": [*dict.fromkeys([TAG, *tags])],
        # The hub ignores these two keys; the next card reads them.
        _MADE_FROM: None if is_hub_id else origin.base,
        _COMMIT: origin.commit,
    }
    if results:
        # Imported here: most cards have no results, and a short command would wait for it.
        from huggingface_hub.repocard_data import eval_results_to_model_index

        data["model-index"] = eval_results_to_model_index(title, [*results])
    return {key: value for key, value in data.items() if value}


def _licence(before: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """`license` and `license_name`, as the hub takes them."""
    licence, name = _text(before.get("license")), _text(before.get("license_name"))
    if licence is not None and licence not in HUB_LICENCES:
        # In the form of the hub's own identifiers.
        licence, name = "other", name or re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")
    return licence, name


def _snippet(prompt: str, in_hf_format: bool) -> str:
    """The code that loads the model and lets it continue a text."""
    if not in_hf_format:
        return "\n".join(["```bash", f'babel generate FOLDER "{prompt}"', "```"])
    # json.dumps gives a Python literal of any text.
    return "\n".join(
        [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'name = "."  # this folder, or the model\'s name on the hub: OWNER/NAME',
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            "model = AutoModelForCausalLM.from_pretrained(name)",
            f'inputs = tokenizer({json.dumps(prompt, ensure_ascii=False)}, return_tensors="pt")',
            'written = model.generate(inputs["input_ids"], max_new_tokens=40)',
            "print(tokenizer.decode(written[0], skip_special_tokens=True))",
            "```",
        ]
    )


def _licence_line(licence: str | None, source: Path | None) -> str:
    if licence:
        return f"Licence of the base: {markdown_text(licence)}."
    return "The model that it was made from names no licence." if source is not None else ""


def markdown_code(text: object) -> str:
    """A name as code in a line of Markdown, for any characters."""
    line = one_line(text, _LONGEST_VALUE)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def markdown_text(text: object) -> str:
    """A stranger's text in a line of Markdown; all characters with a meaning in Markdown and HTML are
    escaped.
    """
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text, _LONGEST_VALUE))


def _foreign_card(source: Path | None, ours: bool) -> Path | None:
    if source is None:
        return None
    card = source / (BASE_CARD if ours else CARD)
    return card if card.is_file() else None


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader without aliases: with aliases, a few lines can mean billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def front_matter(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's card; empty if there is none, or it cannot be read."""
    try:
        text = read_bytes(folder / CARD, folder, MOST_BESIDE_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return {}
    match = _FRONT_MATTER.match(text[:_MOST_FRONT_MATTER])
    if match is None:
        return {}
    try:
        values = yaml.load(match[1], _PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
    return values if isinstance(values, dict) else {}


def _text(value: Any) -> str | None:
    """A text value of the front matter, as one line of bounded length; None if there is none."""
    values = _several(value)
    return one_line(", ".join(values), _LONGEST_VALUE) if values else None


def _name(source: Path, hf_config: Mapping[str, Any]) -> str:
    """The hub's ID of the source if its config.json has one (and not the path of a folder), else the folder's
    name.
    """
    kept = hf_config.get("_name_or_path")
    if isinstance(kept, str) and _HUB_ID.fullmatch(kept) and not Path(kept).exists():
        return kept
    return model_name(source.resolve())


def _several(value: Any) -> list[str]:
    """The values of a key that the hub allows to be one string or a list.

    Norwegian, `no` without quotes, is false in YAML 1.1.
    """
    values = value if isinstance(value, list) else [value]
    texts = []
    for element in values[:_MOST_LANGUAGES]:
        if element is False:
            texts.append("no")
        elif isinstance(element, str):
            texts.append(element)
    return texts
