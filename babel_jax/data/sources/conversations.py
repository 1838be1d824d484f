"""Conversations in one form, from the two forms in use: a list of messages with the roles system, user,
assistant.
"""

import json
from typing import Any

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def conversation_text(messages: Any) -> str:
    """A conversation as JSON: [{"role", "content"}, ..] with the roles system, user and assistant.

    Messages may be {"role", "content"}, or ShareGPT's {"from", "value"} with human and gpt. Raises
    ValueError, in one line, for a conversation that cannot be trained on: another role, content that is no
    text, no message of the assistant, an empty one, or the assistant as first speaker.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("a conversation is a list of messages, each an object")
    normalized = [_message(message, number) for number, message in enumerate(messages)]
    # A system message may come before the first speaker.
    spoken = [message["role"] for message in normalized if message["role"] != "system"]
    if "assistant" not in spoken:
        raise ValueError("no message of the assistant")
    if spoken[0] == "assistant":
        raise ValueError("the assistant speaks first")
    return json.dumps(normalized, ensure_ascii=False)


def _message(message: dict[str, Any], number: int) -> dict[str, str]:
    # A Parquet row may have the keys of both forms, with null under those of one form.
    share_gpt = message.get("from") is not None
    role = message.get("from" if share_gpt else "role")
    content = message.get("value" if share_gpt else "content")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"message {number}: role {role!r} is not one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: its content is no text but {type(content).__name__}")
    if _ROLES[role] == "assistant" and not content.strip():
        raise ValueError(f"message {number}: the assistant says nothing")
    return {"role": _ROLES[role], "content": content}
