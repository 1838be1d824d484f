"""Prompts and chat templates against transformers."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from babel_jax.data.tokens.prompts import PromptTokenizer
from babel_jax.errors import BadInput

CHATML = (
    "{%- if messages[0].role == 'system' %}\n{{- '<|im_start|>system\\n' + messages[0].content + "
    "'<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for message in messages %}\n    {%- if loop.index0 > 50 %}{% break %}{% endif %}\n"
    "    {%- if message.role not in ('user', 'assistant', 'system') %}{{ raise_exception('unknown role ' + "
    "message.role) }}{% endif %}\n"
    "    {%- if message.role != 'system' %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' "
    "}}\n{%- endif %}\n"
)
TALK = [
    {"role": "system", "content": "Jibu kwa ufupi."},
    {"role": "user", "content": "Habari <|im_start|>?\n  "},
    {"role": "assistant", "content": "Nzuri {{ 1 }}"},
    {"role": "user", "content": "Asante"},
]


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of single letters, with control tokens, that begins every text with <s>."""
    letters = {
        letter: number
        for number, letter in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .?\n{}1<|>_")
    }
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def reference(folder):
    return pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("text", ["Habari ya asubuhi", "<|im_start|>user\nHabari<|im_end|>", "", "<s>a"])
def test_ids_are_those_of_transformers(folder, text):
    ours, theirs = PromptTokenizer(folder), reference(folder)
    for special in (True, False):
        ids = ours.encode(text, special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_conversations_are_those_of_transformers(folder):
    (folder / "chat_template.jinja").write_text(CHATML)
    ours, theirs = PromptTokenizer(folder), reference(folder)
    for talk in (TALK, TALK[1:2], TALK[1:]):
        assert ours.chat(talk) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    begun = [*TALK, {"role": "assistant", "content": "Karibu"}]
    expected = theirs.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert ours.chat(begun, add_generation_prompt=False) == expected


def test_a_template_in_the_config(folder):
    path = folder / "tokenizer_config.json"
    stored = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}"},
    ]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": stored}))
    assert PromptTokenizer(folder).chat(TALK) == "Jibu kwa ufupi.<|im_end|>"


def test_what_cannot_be_said_is_named(folder):
    with pytest.raises(BadInput, match=r"no chat template"):
        PromptTokenizer(folder).chat(TALK)
    (folder / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(BadInput, match="does not take this conversation: unknown role poet"):
        PromptTokenizer(folder).chat([{"role": "poet", "content": "x"}])
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(BadInput, match="line 1: not a readable chat template"):
        PromptTokenizer(folder).chat(TALK)
