"""Requests with images to an engine, their token ids, and those of `generate`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from langchain_core.messages import BaseMessage
from transformers import BatchFeature

from langchain_quantllm import ChatQuantizedHuggingFace
from tests.support.chat_images import TOKENS, chat_of
from tests.support.checkpoints import edit_json
from tests.support.engine import Answer
from tests.support.hearing import make_hearing_checkpoint
from tests.support.vision import make_vision_checkpoint, mistral_pipeline

LOOK_AHEAD = {"gemma3": "everywhere", "gemma4_large": "in windows"}
"""Models in which the tokens of an image see later ones of it, and in which layers."""

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "idefics3", "internvl", "mistral3", "gemma4", *LOOK_AHEAD)

QUICK = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
"""Of these, one of each kind of positions, of features and of attention."""


def make_chat(folder: Path, family: str, **fields: Any) -> ChatQuantizedHuggingFace:
    """Make a tiny model that reads images, with an engine of its own."""
    if family.startswith("gemma4"):
        make_hearing_checkpoint(folder, "gemma4")
        if family in LOOK_AHEAD:
            text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
            edit_json(folder / "config.json", text_config={**text, "use_bidirectional_attention": "vision"})
    else:
        make_vision_checkpoint(folder, family)
    if family == "mistral3":
        return ChatQuantizedHuggingFace(pipeline=mistral_pipeline(folder), **{"max_tokens": TOKENS, **fields})
    return chat_of(folder, **fields)


def engine_of(chat: Any) -> Any:
    """Return the fast engine of a model that has answered already."""
    return next(iter(chat._loaded().engines._fast.values()))


def tower_runs(chat: Any) -> int:
    return engine_of(chat)._parts.images.runs


def ask_all(chat: Any, conversations: Sequence[list[BaseMessage]], **options: Any) -> list[Answer]:
    """Submit conversations at once, and read all of their answers; each sample of a call is one."""
    plans = [chat._plan(messages, None, options) for messages in conversations]
    streams = [plan.engine.submit(plan.requests) for plan in plans]
    answers = []
    for plan, stream in zip(plans, streams, strict=True):
        rows = [Answer() for _ in plan.requests]
        answers += rows
        try:
            for chunk in stream:
                rows[chunk.row].token_ids += chunk.token_ids
                rows[chunk.row].usage = chunk.usage
        except Exception as error:
            for row in rows:
                row.error = error
    return answers


def generated(chat: Any, messages: list[BaseMessage], new_tokens: int = TOKENS) -> list[int]:
    """Return the token ids of `generate` of transformers for the same prompt and tensors, up to an end token."""
    request = chat._plan(messages, None, {}).requests[0]
    model = chat.pipeline.model
    ids = torch.tensor([request.prompt_ids])
    media = BatchFeature(dict(request.media or {})).to(model.device, dtype=model.dtype)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **media
    )
    return output[0, ids.shape[1] :].tolist()


@contextlib.contextmanager
def in_chunks(chat: Any, tokens: int) -> Iterator[None]:
    """Let a step of the engine read at most so many tokens of prompts."""
    scheduler = engine_of(chat)._scheduler
    before = scheduler.step_tokens, scheduler.step_tokens_while_decoding
    scheduler.step_tokens = scheduler.step_tokens_while_decoding = tokens
    yield
    scheduler.step_tokens, scheduler.step_tokens_while_decoding = before
