"""Conversations in one form: a list of messages with the roles system, user and assistant, from the two forms
in which data has them.
"""

import json
from typing import Any

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def conversation_text(messages: Any) -> str:
    """A list of messages as JSON in one form: [{"role", "content"}, ..] with roles system, user and
    assistant.

    Messages may be {"role", "content"} or ShareGPT's {"from", "value"} with human and gpt. Raises ValueError,
    in one line, for anything that cannot be trained on: other roles, contents that are no text, no turn of
    the assistant, one that is empty or comes first.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("a conversation is a list of messages, each an object")
    found = [_message(message, number) for number, message in enumerate(messages)]
    spoken = [message["role"] for message in found if message["role"] != "system"]
    if "assistant" not in spoken:
        raise ValueError("no message of the assistant")
    if spoken[0] == "assistant":
        raise ValueError("the assistant speaks first")
    return json.dumps(found, ensure_ascii=False)


def _message(message: dict[str, Any], number: int) -> dict[str, str]:
    # In parquet both forms' keys may be there, with nothing under one of them.
    share_gpt = message.get("from") is not None
    role, content = (
        message.get("from" if share_gpt else "role"),
        message.get("value" if share_gpt else "content"),
    )
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"message {number}: role {role!r} is not one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: its content is no text but {type(content).__name__}")
    if _ROLES[role] == "assistant" and not content.strip():
        raise ValueError(f"message {number}: the assistant says nothing")
    return {"role": _ROLES[role], "content": content}
