"""Chats: lists of {role, content}, to tokens and which of them the loss counts on.

A source holds each chat as JSON text in its column; the tokenizer's own chat template renders it. Control tokens of the
template that stand in a message are control tokens, as everywhere in `transformers`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from aifactory_train.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN_CHARS = 60  # of a chat in a message
# The same pattern by which `transformers` knows that a template marks what the assistant says.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_json(value: Any) -> str:
    """One row of a source as JSON text; the row may be such a text itself. Raises ValueError: what is wrong."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("a text, not a list of messages") from None
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{type(value).__name__}, not a list of {{role, content}}")
    for number, message in enumerate(value, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has {type(content).__name__} as content, not text")
    if not any(message["role"] == "assistant" for message in value):
        raise ValueError("a chat without a turn of the assistant")
    # Columns of Arrow give each message all keys that one of them has.
    text = json.dumps([{k: v for k, v in m.items() if v is not None} for m in value], ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair") from None
    return text


def encode_chat(tokenizer: Any, text: str, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (int64) of a chat and whether each is said by the assistant (bool), its end of turn included.

    Args:
        tokenizer: of `transformers`, with a chat template. Where the template has no {% generation %} the turns are
            found by rendering the chat up to each of them.
        text: of `chat_json`.
        place: for messages.

    Raises DataError: the template refuses the chat, or it shows earlier turns differently when later ones follow.
    """
    from jinja2 import TemplateError

    messages = json.loads(text)
    try:
        if _GENERATION.search(tokenizer.get_chat_template()):
            out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return np.asarray(out["input_ids"], np.int64), np.asarray(out["assistant_masks"], bool)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_span(tokenizer, messages, i, rendered) for i in turns]
    except (TemplateError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the chat template cannot render a chat: {reason}",
            where=f"{place}, the chat that begins {text[:SHOWN_CHARS]}",
            do="mend or remove that chat; or correct the template in the folder of data.tokenizer.path",
        ) from None
    out = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = np.asarray(out["input_ids"], np.int64), np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2)
    counts = np.zeros(len(ids), bool)
    for start, end in spans:
        counts |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    return ids, counts


def _span(tokenizer: Any, messages: list[dict[str, Any]], turn: int, rendered: str) -> tuple[int, int]:
    """First character and end of what the assistant says in a turn, in the rendered chat. Raises ValueError."""
    if turn == 0:
        raise ValueError("it begins with the assistant, so where its role ends cannot be seen")
    before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
    after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
    if not after.startswith(before) or not rendered.startswith(after):
        raise ValueError(
            f"message {turn + 1} looks different when more follows, so what the assistant said there cannot be told "
            "from the rest; in chat_template.jinja put {% generation %} and {% endgeneration %} around it"
        )
    return len(before), len(after)
