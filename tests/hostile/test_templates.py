"""Chat templates and tokenizers of a stranger: one line, within bounds of time and memory."""

import json

import pytest

from babel_jax.data.tokens.chat_templates import ChatTemplate
from babel_jax.data.tokens.prompts import PromptTokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from tests.data.tokens.test_special_tokens import byte_level

TALK = [{"role": "user", "content": "Habari"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ "
    "n.s }}"
)
TEMPLATES = {
    LOOPS: "it runs for more than 5 seconds",
    "{{ 9 ** (9 ** 9) }}": "it runs for more than 5 seconds",
    "{{ 'a' * 10 ** 11 }}": "needs more than 512 MiB of memory",
    "{{ 'a'.center(10 ** 10) }}": "needs more than 512 MiB of memory",
    "{{ '%1000000000d' % 1 }}": "needs more than 512 MiB of memory",
    "{{ ('a' * 1000000).replace('', 'a' * 1000000) }}": "needs more than 512 MiB of memory",
    DOUBLING: "needs more than 512 MiB of memory",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": "writes more than 16,777,216 characters",
    "{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}": "line 1: .*it calls itself without an end",
    "\n\n{{ 1 / 0 }}": "line 3: .*division by zero",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "not a readable chat template",
    "{{ messages.__class__.__mro__ }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('id') }}": "unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ foo.bar }}": "'foo' is undefined",
    "{{ raise_exception('a\x1b[31m\nb') }}": r"conversation: a\\x1b\[31m b",
    "{% if": "line 1: not a readable chat template",
    "{{ messages[5].content }}": "has no element 5|undefined",
}


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_template_that_does_harm(template):
    with pytest.raises(BadInput, match=TEMPLATES[template]) as refused:
        ChatTemplate(template, "chat_template.jinja", {}).render([TALK], [True])
    assert str(refused.value).startswith("chat_template.jinja")
    assert "\n" not in str(refused.value)


def test_after_a_template_was_ended_it_can_be_asked_again():
    template = ChatTemplate(
        "{% if messages|length > 1 %}" + LOOPS + "{% endif %}{{ messages[0].content }}", "t.jinja", {}
    )
    with pytest.raises(BadInput, match="it runs for more than"):
        template.render([TALK * 2], [True])
    assert template.render([TALK], [True]) == ["Habari"]


@pytest.mark.parametrize("stored", [5, {"default": "x"}, [{"name": "default", "template": 5}]])
def test_templates_of_the_wrong_type(tmp_path, stored):
    with pytest.raises(BadInput, match="a template as a string is needed"):
        PromptTokenizer(byte_level(tmp_path, config={"chat_template": stored})).chat(TALK)


def test_several_templates_without_a_default(tmp_path):
    folder = byte_level(
        tmp_path,
        config={"chat_template": [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]},
    )
    with pytest.raises(BadInput, match='has the templates rag, tool_use, and none with the name "default"'):
        PromptTokenizer(folder)


def test_a_template_that_is_a_link_out_of_the_folder(tmp_path):
    (tmp_path / "secret").write_text("{{ 'private' }}")
    folder = byte_level(tmp_path / "model")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="outside of the folder"):
        PromptTokenizer(folder)


def regex(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def single(*parts: object) -> dict[str, object]:
    special = {"<s>": {"id": "<s>", "ids": [256] * 10, "tokens": ["<s>"] * 10}}
    return {"type": "TemplateProcessing", "single": list(parts), "pair": [], "special_tokens": special}


BEGIN, TEXT = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
GROWING = [{"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 1000}]
TOKENIZERS = {
    "a regex that fails on a text": ({"pre_tokenizer": regex("(a+)+$")}, "the tokenizer fails"),
    "a regex that is none": ({"pre_tokenizer": regex("(")}, "not a readable tokenizer"),
    "an empty pattern": (
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "aa"}},
        "the tokenizer fails",
    ),
    "a text that grows": (
        {"normalizer": {"type": "Sequence", "normalizers": GROWING * 6}},
        "over 1,000 times as long",
    ),
    "a long beginning": (
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}},
        "over 1,000 times as long",
    ),
    "a broken charsmap": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "precompiled_charsmap is damaged",
    ),
    "a charsmap of no trie": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
        "the tokenizer fails",
    ),
    "a charsmap of 4 GiB": (
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "//////8="}],
            }
        },
        "precompiled_charsmap is damaged",
    ),
    "chunks of nothing": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "the tokenizer fails"),
    "an unknown token in the template": (
        {"post_processor": single({"SpecialToken": {"id": "<x>", "type_id": 0}}, TEXT)},
        "the tokenizer fails",
    ),
    "a million begins": (
        {"post_processor": single(*[BEGIN] * 1000, TEXT)},
        "adds 10,000 tokens to a text",
    ),
    "a template without the text": ({"post_processor": single(BEGIN)}, "gives no token for the text"),
    "added tokens that are none": ({"added_tokens": 5}, "a list of added_tokens is needed"),
    "an added token that is none": ({"added_tokens": [{"id": "1"}]}, "has no content and id"),
    "another version": ({"version": "9.9"}, "not a readable tokenizer"),
    "begins in a sequence": (
        {"post_processor": {"type": "Sequence", "processors": [single(*[BEGIN] * 60, TEXT)] * 2}},
        "adds 1,200 tokens to a text",
    ),
    "two tokens of one id": (
        {
            "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 1}, "unk_token": "a"},
        },
        r"the tokens '[bc]' and '[bc]' have the same id 1",
    ),
    "no model": ({"model": None}, "not a readable tokenizer"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_does_harm(tmp_path, capfd, name):
    change, says = TOKENIZERS[name]
    path = byte_level(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=says):
        open_tokenizer(tmp_path).encode("a" * 40 + "b hello")
    capfd.readouterr()
    with pytest.raises(BadInput):
        open_tokenizer(tmp_path).encode("a" * 40 + "b hello") if "on a text" in name else open_tokenizer(
            tmp_path
        )
    # The library reports its panics itself, over many lines; those at opening are kept from the terminal.
    assert "on a text" in name or capfd.readouterr().err == ""


def test_ids_drawn_at_random_are_refused(tmp_path):
    path = byte_level(tmp_path) / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["dropout"] = 0.5
    path.write_text(json.dumps(values))
    with pytest.raises(BadInput, match="model.dropout is 0.5"):
        open_tokenizer(tmp_path)


def test_deep_and_huge_tokenizer_files(tmp_path):
    folder = byte_level(tmp_path)
    (folder / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(BadInput, match="not a readable tokenizer"):
        open_tokenizer(folder)
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(BadInput, match="larger than the .* bytes"):
        open_tokenizer(folder)


def test_an_empty_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BadInput, match="tokenizer.model: not a readable .*: it has no pieces"):
        open_tokenizer(tmp_path)
