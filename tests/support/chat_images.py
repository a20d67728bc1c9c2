"""Messages with images, and transformers' own way to answer them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage

from langchain_quantllm import ChatQuantizedHuggingFace
from tests.support.vision import picture, png

TOKENS = 12


def chat_of(folder: Path, **fields: Any) -> ChatQuantizedHuggingFace:
    return ChatQuantizedHuggingFace(
        **{"model": str(folder), "device": "cpu", "max_tokens": TOKENS, "progress": False, **fields}
    )


def block(seed: int = 0, **options: Any) -> dict[str, Any]:
    return {"type": "image", "base64": png(picture(seed, **options)), "mime_type": "image/png"}


def ask(*seeds: int, text: str = "What is this?") -> HumanMessage:
    return HumanMessage([*map(block, seeds), {"type": "text", "text": text}])


def plain(role: str, *parts: Any) -> dict[str, Any]:
    """Make a message in transformers' words: pictures by their seeds, and texts."""
    names = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": picture(p)} for p in parts
    ]
    return {"role": role, "content": names}


def transformers_answer(chat: Any, messages: list[dict[str, Any]], new_tokens: int = TOKENS) -> tuple[str, int]:
    """Answer with the processor and `generate`, as transformers' documentation does; and count the prompt's tokens."""
    processor, model = chat.pipeline.processor, chat.pipeline.model
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    prompt_tokens = inputs["input_ids"].shape[1]
    return processor.tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True), prompt_tokens
