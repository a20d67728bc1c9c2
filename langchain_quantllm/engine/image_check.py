"""Checks whether the continuous engine reads images as the model does, once before the first prompt with images.

Owns the rules that a config decides, and the comparison of logits after a small image with the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from langchain_quantllm.compat.peft import adapter_modules
from langchain_quantllm.compat.transformers_processors import sample_image_prompt
from langchain_quantllm.compat.transformers_vision import (
    image_token_id,
    moved_inputs,
    text_modules,
    vision_model,
    with_text_tokens,
)
from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.image_reader import ImageReader
from langchain_quantllm.engine.kv_cache import allocate_pools
from langchain_quantllm.engine.model_check import run_greedily
from langchain_quantllm.engine.model_probe import ModelProbe
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.own_logits import check_logits, own_spread, sample_ids
from langchain_quantllm.engine.prompt_images import read_prompt
from langchain_quantllm.engine.routing_trial import RoutingTrial
from langchain_quantllm.engine.scheduler import Scheduler
from langchain_quantllm.engine.sequence import Sequence, bare_sequence
from langchain_quantllm.engine.state_pool import StatePool
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.options import BASE_ADAPTER

_NEW_TOKENS, _TEXT = 3, 5


def no_images_reason(model: Any, processor: Any) -> str | None:
    """Find the reason, as far as model and processor tell, why images cannot be read; None if there is none."""
    if vision_model(model) is None or image_token_id(model) is None:
        return "it has no vision tower that is known here"
    if getattr(processor, "image_processor", None) is None:
        return "it was loaded without the processor for images"
    adapted = {id(module) for module in adapter_modules(model)}
    if adapted - text_modules(model):
        return "its adapters change the part that reads images"
    return None


@without_gradients
def verify_images(
    runner: ModelRunner,
    reader: ImageReader,
    model: Any,
    processor: Any,
    probe: ModelProbe,
    switch: AdapterSwitch | None = None,
    fusion: Fusion | None = None,
) -> None:
    """Run a prompt with a small image beside one of text, in chunks, and compare with the model itself.

    Args:
        runner: Runs the model for other requests; a twin of it, with blocks of its own, is used here.
        reader: Reads the images.
        model: The model.
        processor: Its processor.
        probe: What the model's layers keep.
        switch: Its adapters; None if it runs as it is.
        fusion: Its fused steps; None if there are none.

    Raises:
        UnsupportedError: If the model cannot run this way, or gives other logits.
    """
    try:
        ids, media = sample_image_prompt(processor)
        text = [token for token in sample_ids(model, _TEXT + 1) if token != image_token_id(model)]
        ids += text[:_TEXT]
        images = read_prompt(model, ids, with_text_tokens(media, len(ids)))
        reader.read(images)
        with contextlib.ExitStack() as chosen:
            routing = RoutingTrial(model, texts=2, most_tokens=len(ids) + _NEW_TOKENS)
            chosen.callback(routing.close)
            sequence = bare_sequence(ids, _NEW_TOKENS, images=images)
            ids, logits = _run(runner, reader, probe, sequence, text, routing.keep)
            if switch is not None:
                chosen.enter_context(switch.chosen(BASE_ADAPTER))
            chosen.enter_context(forward_context(ForwardContext()) if fusion is None else fusion.exact())
            with routing.replaying(len(ids)):
                expected = _own_logits(model, ids, media)[-len(logits) :]
            spread = own_spread(model, len(logits), continues=probe.continues)
    except (UnsupportedError, torch.OutOfMemoryError):
        raise
    except InvalidOptionError as error:
        raise UnsupportedError(str(error).rstrip(".")) from error
    except Exception as error:
        msg = f"its own code fails on an image beside a text: {error!r}"
        raise UnsupportedError(msg) from error
    if expected.isfinite().all():  # else the model itself is broken; its requests will fail with that
        check_logits(model, logits, expected, spread)
        routing.check(model.dtype)


def _run(
    runner: ModelRunner,
    reader: ImageReader,
    probe: ModelProbe,
    sequence: Sequence,
    text: list[int],
    on_end: Callable[[Sequence], None],
) -> tuple[list[int], torch.Tensor]:
    """Run a sequence with an image beside a text, so that a chunk ends within the image.

    Returns:
        The tokens that logits follow from, and the logits after the last of them, of shape `(tokens, vocab)`.
    """
    blocks = len(sequence.ids) // BLOCK_TOKENS + 2
    pools = allocate_pools(probe.shapes, blocks + 3)
    states = StatePool(probe.states, 3, continues=probe.continues) if probe.states else None
    twin = runner.twin(pools, states, slots=2, blocks_per_sequence=blocks)
    twin.image_reader = reader
    assert sequence.images is not None
    step_tokens = max(sequence.images.middle, len(text) + 1)
    scheduler = Scheduler(
        BlockManager(blocks + 3), slots=2, step_tokens=step_tokens, step_tokens_while_decoding=step_tokens
    )
    logits = run_greedily(twin, [sequence, bare_sequence(text, _NEW_TOKENS)], scheduler, on_end)
    return sequence.ids[:-1], torch.stack(logits[sequence])


def _own_logits(model: Any, ids: list[int], media: Mapping[str, Any]) -> torch.Tensor:
    """Compute the model's own logits after each token of a prompt with images, of shape `(tokens, vocab)`."""
    device = model.get_input_embeddings().weight.device
    given = torch.tensor([ids], device=device)
    inputs = moved_inputs(model, with_text_tokens(media, len(ids)), device)
    output = model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False, **inputs)
    logits: torch.Tensor = output.logits[0]
    return logits.float()
