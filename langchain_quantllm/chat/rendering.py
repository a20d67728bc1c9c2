"""Rendering messages by a tokenizer's chat template, bounded in time and memory.

Owns what transformers' `apply_chat_template` does beside running the template: its variables, and cutting the prompt
off where an answer is to be continued. Knows no rule for templates that refuse messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_quantllm.compat.jinja_bounds import TemplateBoundError
from langchain_quantllm.compat.jinja_sandbox import render_chat_template
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError

_END = "Kq7ZxEnd "  # with the space, one sees whether the template keeps spaces


class RefusalError(Exception):
    """A template does not take messages; the error's cause is the template's."""


def render_messages(
    tokenizer: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any],
    *,
    continues: bool,
    variables: Mapping[str, Any],
) -> str:
    """Render messages as `apply_chat_template` does.

    Args:
        tokenizer: A tokenizer of transformers, whose special tokens are variables of the template.
        template: The Jinja template.
        messages: The messages, as the template takes them.
        tools: Tools, as the template takes them.
        continues: Whether the last message is an answer to continue.
        variables: Further variables.

    Returns:
        The prompt.

    Raises:
        RefusalError: If the template, or its own code, raises an error.
        TemplateBoundError: If the template needs more time or memory than a conversation does.
    """
    if not messages:
        msg = "there is no message"
        raise RefusalError(msg)
    options = {"add_generation_prompt": not continues, "continue_final_message": continues, **variables}
    try:
        if _has_own_way(tokenizer):
            return str(
                tokenizer.apply_chat_template(
                    list(messages), tools=list(tools) or None, chat_template=template, tokenize=False, **options
                )
            )
        continues = bool(options.pop("continue_final_message"))
        shown = [_named_for_all(message) for message in messages]
        if continues:
            shown[-1] = shown[-1] | {"content": _with_end(shown[-1]["content"])}
        values = {
            **{name: _plain(value) for name, value in tokenizer.special_tokens_map.items()},
            "documents": None,
            **{name: _plain(value) for name, value in options.items()},
            "messages": shown,
            "tools": list(tools) or None,
        }
        text = render_chat_template(template, values)
        return _cut_off(text) if continues else text
    except TemplateBoundError as error:
        msg = f"the model's chat template is stopped, because {error}; give another one by chat_template=."
        raise TemplateBoundError(msg) from error
    except (QuantLLMError, RefusalError):
        raise
    except Exception as error:
        raise RefusalError(str(error)[:500] or type(error).__name__) from error


def _has_own_way(tokenizer: Any) -> bool:
    """Whether a tokenizer's class comes with its own `apply_chat_template`, as that of a checkpoint's code may."""
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def _named_for_all(message: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a message; its reasoning has each name by which templates ask for it."""
    reasoning = message.get("reasoning_content")
    return {**message, **({} if reasoning is None else {"thinking": reasoning})}


def _with_end(content: Any) -> Any:
    """Mark the end of a content."""
    if isinstance(content, str):
        return content + _END
    at = max((i for i, part in enumerate(content) if "text" in part), default=None)
    if at is None:
        msg = "an answer to continue has no text"
        raise RefusalError(msg)
    return [*content[:at], {**content[at], "text": content[at]["text"] + _END}, *content[at + 1 :]]


def _cut_off(text: str) -> str:
    """Cut a prompt off at the end of the answer to continue, without the spaces that the template takes away."""
    before, mark, after = text.rpartition(_END.strip())
    if not mark:
        msg = "it leaves out the answer to continue"
        raise RefusalError(msg)
    return before if after.startswith(" ") else before.rstrip()


def _plain(value: Any) -> Any:
    """Copy a variable of plain data; other objects would give a template their methods.

    Raises:
        InvalidOptionError: If it is of another kind.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    msg = (
        f"chat_template_kwargs holds a {type(value).__name__}, {str(value)[:100]!r}; give text, numbers, booleans, "
        "None, lists and dicts."
    )
    raise InvalidOptionError(msg)
