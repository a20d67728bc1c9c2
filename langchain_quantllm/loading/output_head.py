"""The output head in 8 bits: made of a loaded model's own head, whatever the scheme of its other layers is."""

from __future__ import annotations

from typing import Any

from langchain_quantllm.compat.accelerate import move_hook, offloads_weights
from langchain_quantllm.compat.bitsandbytes import int8_layer_of
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.memory.output_head import check_head_dtype, head_of, no_int8_head_reason


def quantize_head(model: Any, *, is_checked: bool = False) -> None:
    """Replace a model's output head by one in int8, on the same device.

    A head that shares its weight with the embedding gets a copy in 8 bits; the embedding stays as it is.

    Args:
        model: The model.
        is_checked: Whether the same model on the meta device was found to take such a head, so that none runs here.

    Raises:
        UnsupportedError: If the head is no linear layer, or its weight is offloaded.
    """
    check_head_dtype("int8", no_int8_head_reason(model, runs=not is_checked))
    head = head_of(model)
    assert head is not None
    if offloads_weights(head) or head.weight.device.type == "meta":
        msg = "lm_head_dtype='int8' is not possible for an output head that is offloaded; use lm_head_dtype='auto'."
        raise UnsupportedError(msg)
    quantized = int8_layer_of(head)
    model.set_output_embeddings(quantized)
    move_hook(head, quantized)
