"""The output head: the layer that makes logits of a language model's last hidden states, and its dtypes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from langchain_quantllm.errors import InvalidOptionError, UnsupportedError, nearest

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

HEAD_DTYPES = ("auto", "int8")
"""Values of `lm_head_dtype`: the dtype of the rest of the model, or 8 bits with a scale for each row."""


class _SeenError(Exception):
    """Ends a forward before the head."""


def head_of(model: Any) -> torch.nn.Linear | None:
    """Return a model's output head where it is a plain linear layer; None if it has none, or another kind."""
    from torch.nn import Linear

    head = model.get_output_embeddings()
    return head if type(head) is Linear else None


def no_int8_head_reason(model: Any, *, runs: bool = True) -> str | None:
    """Find the reason why a model's output head cannot be in int8; None if it can be, or if nothing is known.

    Args:
        model: The model, on any devices.
        runs: Run a token through it, up to the head. bitsandbytes repacks 4-bit weights on a CPU then.
    """
    if model.get_output_embeddings() is None:
        return "it has no output head"
    if (head := head_of(model)) is None:
        return "its output head is no plain linear layer"
    if runs and _input_dtype(model, head) == "int8":
        return "it casts what goes into its output head to the dtype of the head's weight"
    return None


def _input_dtype(model: Any, head: torch.nn.Linear) -> str | None:
    """Run a token through a model whose head has an int8 weight; return the dtype of what reaches the head."""
    import torch

    found: list[str] = []

    def see(_: Any, args: tuple[Any, ...]) -> None:
        found.append(str(args[0].dtype).removeprefix("torch."))
        raise _SeenError

    probe = torch.nn.Identity()
    probe.weight = torch.nn.Parameter(torch.empty_like(head.weight, dtype=torch.int8, device="meta"), False)
    probe.register_forward_pre_hook(see)
    ids = torch.zeros((1, 1), dtype=torch.long, device=model.get_input_embeddings().weight.device)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model.set_output_embeddings(probe)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, **decoder)
    except _SeenError:
        pass
    except Exception as error:  # whatever a model raises on the meta device
        logger.info("The input of the head of a %s is not known: %s", type(model).__name__, error)
    finally:
        model.set_output_embeddings(head)
    return found[0] if found else None


def check_head_dtype(dtype: Any, reason: str | None = None) -> None:
    """Check `lm_head_dtype`, and refuse 8 bits for a reason, if there is one.

    Raises:
        InvalidOptionError: If it is none of `HEAD_DTYPES`.
        UnsupportedError: If there is a reason.
    """
    if dtype not in HEAD_DTYPES:
        msg = f"lm_head_dtype={dtype!r} is not known{nearest(str(dtype), HEAD_DTYPES)}"
        raise InvalidOptionError(msg)
    if dtype != "auto" and reason is not None:
        msg = f"lm_head_dtype={dtype!r} is not possible for this model, as {reason}; use lm_head_dtype='auto'."
        raise UnsupportedError(msg)


def head_bytes(head: torch.nn.Linear) -> tuple[int, int]:
    """Compute the bytes of a head's weight in int8: the rows, and a float32 scale for each."""
    return head.in_features * head.out_features, 4 * head.out_features
