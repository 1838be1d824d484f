"""The card of a folder, read by the hub's own library."""

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id

from babel_jax.errors import BadInput
from babel_jax.model_folders.model_card import BASE_CARD, CARD, card_files

BASE = """---
license: other
license_name: qwen
license_link: LICENSE
language:
- sw
- en
pipeline_tag: text-generation
tags:
- chat
---
# The base
"""
CONFIG = {"num_hidden_layers": 6, "model_type": "qwen2"}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "Qwen2.5-Tiny"
    folder.mkdir()
    (folder / CARD).write_text(BASE, encoding="utf-8")
    return folder


def written(folder, files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_the_front_matter_is_what_the_hub_reads(base, tmp_path):
    results = [
        EvalResult("text-generation", "held-out", "held-out text", "bits_per_byte", 1.25, dataset_config="sw")
    ]
    files = card_files(
        CONFIG,
        base,
        ["## More\n\nwords"],
        name="my-run",
        languages=["fil", "th", "en"],
        tags=["depth-expansion"],
        results=results,
    )
    data = metadata_load(written(tmp_path / "new", files) / CARD)
    assert {key: value for key, value in data.items() if key != "model-index"} == {
        "made_from": "Qwen2.5-Tiny",
        "language": ["en", "sw", "th", "fil"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "qwen",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["babel-jax", "depth-expansion"],
    }
    card = ModelCard(files[CARD])
    assert isinstance(card.data, ModelCardData)
    assert card.data.eval_results == results
    assert data["model-index"] == eval_results_to_model_index("my-run", results)
    assert card.text.strip().startswith("# my-run\n\nA model of 6 layers (qwen2), made by babel-jax ")
    assert "from `Qwen2.5-Tiny`" in card.text
    assert card.text.endswith("## More\n\nwords\n")
    assert files[BASE_CARD] == BASE


def test_the_hubs_id_of_the_base_is_taken_where_it_is_kept(base):
    data = ModelCard(card_files(CONFIG | {"_name_or_path": "Qwen/Qwen2.5-7B"}, base, [])[CARD]).data
    assert data.base_model == "Qwen/Qwen2.5-7B"
    validate_repo_id(data.base_model)
    assert "made_from" not in data


@pytest.mark.parametrize(
    "path",
    [
        "/home/me/model",
        "./model",
        "../model",
        "~/model",
        ".cache/model",
        "runs/base",
        "base",
        "",
        f"me/{'x' * 300}",
    ],
)
def test_the_path_of_a_folder_is_no_id_of_the_hub(base, monkeypatch, path):
    monkeypatch.chdir(base)
    (base / "runs" / "base").mkdir(parents=True)
    data = ModelCard(card_files(CONFIG | {"_name_or_path": path}, base, [])[CARD]).data
    # The hub would refuse a base without an owner; the name of the folder is kept beside.
    assert (data.base_model, data["made_from"]) == (None, "Qwen2.5-Tiny")


def test_licence_base_and_its_card_go_through_several_steps(base, tmp_path):
    first = written(tmp_path / "first", card_files(CONFIG, base, ["first"]))
    second = card_files(CONFIG, first, ["second"], languages=["th"])
    data = ModelCard(second[CARD]).data
    assert (data.base_model, data["made_from"]) == (None, "Qwen2.5-Tiny")
    assert (data.license_name, data.language) == ("qwen", ["en", "sw", "th"])
    assert "from `Qwen2.5-Tiny`" in second[CARD]
    assert second[BASE_CARD] == BASE
    assert "first" not in second[CARD]


def test_without_a_base_nothing_is_claimed(tmp_path):
    files = card_files(CONFIG, None, [], languages=["sw"])
    assert set(files) == {CARD}
    assert "from random weights" in files[CARD]
    data = ModelCard(files[CARD]).data
    assert (data.base_model, data.license) == (None, None)
    again = card_files(CONFIG, written(tmp_path / "made", files), [])
    assert ModelCard(again[CARD]).data.base_model is None
    assert "a model that babel-jax trained" in again[CARD]


@pytest.mark.parametrize("text", ["no front matter", "---\n- a list\n---\n", "---\n{: broken\n---\n", "\xff"])
def test_a_card_that_cannot_be_read_is_kept_and_nothing_is_taken_from_it(base, text):
    (base / CARD).write_bytes(text.encode("latin-1"))
    files = card_files(CONFIG, base, [])
    assert ModelCard(files[CARD]).data.license is None
    assert "names no licence" in files[CARD]
    assert files[BASE_CARD] == text.encode("latin-1").decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("written_so", "read"), [("no", ["no"]), ("[en, no]", ["en", "no"]), ("3", None), ("{en: yes}", None)]
)
def test_norwegian_and_what_is_no_language(base, written_so, read):
    (base / CARD).write_text(f"---\nlicense: mit\ntags: 5\nlanguage: {written_so}\n---\n")
    data = ModelCard(card_files(CONFIG, base, [])[CARD]).data
    assert (data.license, data.language) == ("mit", read)


BILLIONS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(20)
)


@pytest.mark.parametrize(
    "front",
    [
        BILLIONS + "license: *u\n",
        "license: " + "[" * 3000,
        "license: !!python/object/apply:os.system ['true']\n",
        "license: {a: [b]}\nlanguage: {a: 3}\npipeline_tag: [1, 2]\ntags: 3\n",
        "license: 2024-99-99\n",
        "? [a]\n: b\n",
        "- a\n",
        "license: \x00\n",
        "license: " + "x" * 10**6,
    ],
)
def test_front_matter_of_strangers_is_bounded_and_told_as_text(base, tmp_path, front):
    (base / CARD).write_text(f"---\n{front}\n---\n# The base\n", encoding="utf-8")
    files = card_files(CONFIG, base, [])
    data = metadata_load(written(tmp_path / "new", files) / CARD)
    assert data["made_from"] == "Qwen2.5-Tiny"
    assert len(files[CARD]) < 5000


def test_names_and_licences_do_not_become_markup(tmp_path):
    name = "a`b``c <script>alert(1)<script> |x| [y](z)"
    folder = tmp_path / name
    folder.mkdir()
    licence = "free <img src=x onerror=alert(1)> [here](javascript:x) `x` **b** & | ~\x1b[31m"
    (folder / CARD).write_text(
        "---\n" + ModelCardData(license=licence).to_yaml() + "\n---\n", encoding="utf-8"
    )
    text = card_files(CONFIG, folder, [])[CARD]
    assert f"from ``` {name} ```" in text
    assert "<img" not in text.split("---")[2].replace("\\<img", "")
    assert "\\[here\\]\\(javascript:x\\)" in text
    data = metadata_load(written(tmp_path / "new", {CARD: text}) / CARD)
    assert data["made_from"] == name
    # A licence that the hub does not know is "other", with its name.
    assert data["license"] == "other"
    assert data["license_name"] == "free-img-src-x-onerror-alert-1-here-javascript-x-x-b-x1b-31m"


@pytest.mark.parametrize(
    ("front", "licence", "name"),
    [
        ("license: apache-2.0", "apache-2.0", None),
        ("license: Qwen Research", "other", "qwen-research"),
        ("license: other\nlicense_name: qwen", "other", "qwen"),
        ("license: mine\nlicense_name: qwen", "other", "qwen"),
        ("tags: [x]", None, None),
    ],
)
def test_the_licence_is_one_that_the_hub_takes(base, front, licence, name):
    (base / CARD).write_text(f"---\n{front}\n---\n")
    data = ModelCard(card_files(CONFIG, base, [])[CARD]).data
    assert (data.license, data.license_name) == (licence, name)


def test_the_code_of_a_folder_in_orbax_format_is_no_transformers(base):
    text = card_files(CONFIG, base, [], in_hf_format=False)[CARD]
    assert "AutoModelForCausalLM" not in text
    assert 'babel generate FOLDER "The"' in text
    code = card_files(CONFIG, base, [], prompt='a "b"\n``` c')[CARD].split("```python\n")[1]
    assert 'tokenizer("a \\"b\\"\\n``` c", return_tensors="pt")' in code


def test_a_card_that_is_no_text_or_leads_elsewhere(base, tmp_path):
    (base / CARD).write_bytes(b"\xff\xfe---\n")
    assert card_files(CONFIG, base, [])[BASE_CARD].endswith("---\n")
    (base / CARD).unlink()
    (base / CARD).symlink_to("/proc/self/environ")
    with pytest.raises(BadInput, match="outside of the folder"):
        card_files(CONFIG, base, [])
