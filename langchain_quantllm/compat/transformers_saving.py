"""The tensors that `save_pretrained` of transformers writes, to compare them with what was written."""

from __future__ import annotations

from typing import Any


def saved_tensors(model: Any) -> dict[str, Any]:
    """Return the tensors that saving a model writes, by their names in its files.

    A tensor that the model uses twice is there under each of its names, and is written under one of them.

    Source: `save_pretrained` in transformers/modeling_utils.py.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    state = None
    if getattr(model, "hf_quantizer", None) is not None:
        state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    state = dict(model.state_dict() if state is None else state)
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    state = revert_weight_conversion(model, state)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
