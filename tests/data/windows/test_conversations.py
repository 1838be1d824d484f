"""Conversations from rows to masked windows."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.config import DataSettings, Source
from babel_jax.config.file import parse_settings
from babel_jax.data.sources.conversations import conversation_text
from babel_jax.data.tokens.chat_format import open_chat_format
from babel_jax.data.windows.conversations import conversation_windows
from babel_jax.data.windows.packing import best_fit
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import dataset_folder, open_prepared
from babel_jax.data.windows.storage import open_windows
from babel_jax.errors import BadInput


def conversation(words, turns=1):
    return [
        message
        for turn in range(turns)
        for message in (("user", f"{words} {turn}?"), ("assistant", f"{words} {words}."))
    ]


def as_messages(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_cuts_nothing_and_wastes_little(lengths):
    windows = best_fit(lengths, 50)
    assert sorted(number for window in windows for number in window) == list(range(len(lengths)))
    assert windows == sorted(sorted(window) for window in windows)
    used = [sum(lengths[number] for number in window) for window in windows]
    assert all(0 < filled <= 50 for filled in used)
    # No two windows could be one; so at most one of them is less than half full (and never more than twice
    # the least number is needed).
    assert sum(filled <= 25 for filled in used) <= 1
    assert len(windows) <= max(1, 2 * -(-sum(lengths) // 50))


def test_both_forms_become_one():
    share_gpt = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
    ]
    messages = as_messages([("system", "s"), ("user", "a"), ("assistant", "b")])
    assert (
        conversation_text(share_gpt)
        == conversation_text([{**message, "weight": 1} for message in messages])
        == json.dumps(messages)
    )


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "a list of messages"),
        (["hello"], "a list of messages"),
        ([{"role": "user", "content": "a"}], "no message of the assistant"),
        ([{"role": "assistant", "content": "a"}], "speaks first"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}],
            "message 1: the assistant says nothing",
        ),
        ([{"role": "tool", "content": "a"}], "message 0: role 'tool' is not one of"),
        ([{"role": ["user"], "content": "a"}], "message 0: role"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0: its content is no text but list"),
        ([{"from": "human"}], "message 0: its content is no text but NoneType"),
        ([{}], "message 0: role None"),
    ],
)
def test_what_cannot_be_trained_on_is_named(messages, says):
    with pytest.raises(ValueError, match=says):
        conversation_text(messages)


def test_windows_hold_whole_conversations_with_their_mask(chat_tokenizer):
    format = open_chat_format(chat_tokenizer)
    texts = [
        conversation_text(as_messages(conversation("mutu " * (1 + number % 5), 1 + number % 3)))
        for number in range(30)
    ]
    expected = {tuple(encoded.ids): encoded.targets for encoded in map(format.encode, map(json.loads, texts))}
    counts = dict.fromkeys(("tokens", "documents", "bytes"), 0)
    windows = list(conversation_windows(texts, format, 256, counts))
    found = []
    for tokens, segment_ids, loss_mask in windows:
        assert tokens.dtype == segment_ids.dtype == loss_mask.dtype == np.uint32
        for segment in range(1, segment_ids.max() + 1):
            own = segment_ids == segment
            found.append(tuple(tokens[own].tolist()))
            assert loss_mask[own].astype(bool).tolist() == expected[found[-1]]
        assert not loss_mask[segment_ids == 0].any()
    assert sorted(found) == sorted(tuple(format.encode(json.loads(text)).ids) for text in texts)
    assert counts["tokens"] == sum(map(len, found))
    assert counts["targets"] == sum(int(mask.sum()) for *_, mask in windows)
    assert (counts["documents"], counts["cut"], counts["left_out"]) == (30, 0, 0)


def test_long_conversations_are_cut_or_left_out(chat_tokenizer):
    format = open_chat_format(chat_tokenizer)
    long_answer = conversation_text(as_messages([("user", "a"), ("assistant", "x y z " * 100)]))
    long_question = conversation_text(as_messages([("user", "x y z " * 100), ("assistant", "a")]))
    counts = dict.fromkeys(("tokens", "documents", "bytes"), 0)
    ((tokens, segment_ids, _),) = conversation_windows([long_question, long_answer], format, 64, counts)
    assert (counts["cut"], counts["left_out"], counts["documents"]) == (1, 1, 1)
    assert tokens.tolist() == format.encode(json.loads(long_answer)).ids[:64]
    assert segment_ids.tolist() == [1] * 64


@pytest.fixture
def settings(chat_tokenizer, write_rows, tmp_path):
    """Settings for conversations in two languages, in both forms; ids count from 0."""
    rows = [
        {"id": str(number), "messages": as_messages(conversation(f"word{number}", 2))} for number in range(20)
    ]
    write_rows(tmp_path / "en.jsonl", [*rows, {"id": "again", "messages": rows[1]["messages"]}])
    share_gpt = [
        [{"from": "human", "value": f"je {number}?"}, {"from": "gpt", "value": "ndiyo"}]
        for number in range(10)
    ]
    write_rows(
        tmp_path / "sw.jsonl",
        [{"id": str(number), "conversations": messages} for number, messages in enumerate(share_gpt)],
    )
    sources = tuple(
        Source(language=language, kind="chat", path=str(tmp_path / f"{language}.jsonl"), text_key=key)
        for language, key in (("en", "messages"), ("sw", "conversations"))
    )
    return DataSettings(
        folder=str(tmp_path / "data"),
        tokenizer=str(chat_tokenizer),
        seq_len=128,
        heldout_fraction=0.2,
        conversations=True,
        sources=sources,
    )


def test_prepared_conversations(settings):
    report = prepare(settings)
    prepared = open_prepared(settings.folder)
    english = report["languages"]["en"]
    assert english["duplicates"] == 1
    assert english["kinds"]["chat"]["documents"] + english["heldout_documents"] == 20
    assert json.loads(prepared.heldout("sw")[0].text)[1] == {"role": "assistant", "content": "ndiyo"}
    windows = open_windows(dataset_folder(prepared.folder, "en", "chat"))
    assert len(windows) == english["kinds"]["chat"]["windows"]
    assert sum(int(window["loss_mask"].sum()) for window in windows) == english["kinds"]["chat"]["targets"]
    assert prepare(settings) == report


def test_what_is_cut_or_left_out_is_told(settings, caplog, tmp_path, write_rows):
    def long(words):
        return as_messages(conversation("a" * words, 1))

    write_rows(tmp_path / "en.jsonl", [{"id": str(words), "messages": long(words)} for words in (1, 2, 300)])
    one = settings.model_copy(update={"sources": settings.sources[:1], "heldout_fraction": 0.0})
    counts = prepare(one)["languages"]["en"]["kinds"]["chat"]
    told = [record.getMessage() for record in caplog.records]
    assert counts["cut"] + counts["left_out"] == 1 == len(told)
    cut, left_out = (
        "longer than data.seq_len = 128 tokens; they are trained on without",
        "are left out, since their first 128",
    )
    assert (cut if counts["cut"] else left_out) in told[0]


def test_conversations_that_are_all_too_long_are_refused(settings, tmp_path):
    short = settings.model_copy(update={"seq_len": 4, "folder": str(tmp_path / "short")})
    with pytest.raises(
        BadInput,
        match=r"en chat: no conversation has an answer within data.seq_len = 4 .*set data.seq_len higher",
    ):
        prepare(short)
    assert not list((tmp_path / "short" / "windows").glob("*"))
    assert prepare(settings)["languages"]["en"]["kinds"]["chat"]["windows"]


def test_another_template_needs_another_folder(settings, tmp_path):
    prepare(settings)
    template = tmp_path / "other.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(BadInput, match="prepared with another chat_template"):
        prepare(settings.model_copy(update={"chat_template": str(template)}))


def test_bad_conversations_are_rows_like_any_other(settings, tmp_path):
    with open(tmp_path / "en.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "x", "messages": [{"role": "user", "content": "alone"}]}) + "\n")
    with pytest.raises(BadInput, match=r"en\.jsonl:22: no message of the assistant"):
        prepare(settings)


def test_text_and_conversations_do_not_mix(settings):
    source = settings.sources[0].model_dump(mode="json", exclude_none=True)
    for conversations, key in ((True, "text"), (False, "messages")):
        values = {"folder": "x", "conversations": conversations, "sources": [{**source, "text_key": key}]}
        with pytest.raises(
            BadInput, match="conversations are read from messages or conversations, text from anything else"
        ):
            parse_settings(DataSettings, values, "test")
