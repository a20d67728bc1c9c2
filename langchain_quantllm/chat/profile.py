"""The profile of a chat model: its inputs, its outputs and its context, as LangChain asks for them.

Derived from a checkpoint's config and template; loads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.language_models import ModelProfile

from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.loading.checkpoint import hears_sounds, stored_profile
from langchain_quantllm.structured.tool_formats import reasoning_of


def checkpoint_profile(model_id: str, chat_template: str | None) -> ModelProfile | None:
    """Derive the profile of a checkpoint; None where its config is not on this disk."""
    config, template, sees, hears = stored_profile(model_id)
    template = chat_template or template
    images = sees and template is not None and is_installed("PIL")
    sounds = hears and template is not None and is_installed("av")
    tool_images = None if images else False
    return _profile(config, template, images=images, tool_images=tool_images, sounds=sounds) if config else None


def pipeline_profile(pipeline: Any, chat_template: str | None) -> ModelProfile | None:
    """Derive the profile of a transformers pipeline."""
    processor = getattr(pipeline, "processor", None)
    template = chat_template or getattr(processor, "chat_template", None) or pipeline.tokenizer.chat_template
    support = ChatTemplate(pipeline.tokenizer, chat_template, processor).support
    has_pictures = getattr(processor, "image_processor", None) is not None
    images, tool_images = (template is not None and has_pictures and support.images(role) for role in ("user", "tool"))
    hears = template is not None and hears_sounds(pipeline.model.config) and support.sounds()
    config = pipeline.model.config.to_dict()
    return _profile(config, template, images=images, tool_images=tool_images, sounds=hears) if config else None


def _profile(
    config: Mapping[str, Any], template: Any, *, images: bool, tool_images: bool | None, sounds: bool
) -> ModelProfile:
    """Make a profile; `tool_images` is None where only a trial with the processor could tell."""
    profile = ModelProfile(
        text_inputs=True,
        text_outputs=True,
        image_inputs=images,
        image_url_inputs=images,
        audio_inputs=sounds,
        video_inputs=False,
        pdf_inputs=False,
        tool_calling=True,
        tool_choice=is_installed("xgrammar"),
        structured_output=is_installed("xgrammar"),
        reasoning_output=reasoning_of(str(template or "")) is not None,
    )
    if tool_images is not None:
        profile["image_tool_message"] = tool_images
    name = "max_position_embeddings"
    context = config.get(name) or (config.get("text_config") or {}).get(name)
    if isinstance(context, int):
        profile["max_input_tokens"] = context
    return profile
