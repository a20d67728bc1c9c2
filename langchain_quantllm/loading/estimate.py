"""The memory of language models and Whisper: finds a model's config, and computes what the model will take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.loading.checkpoint import UnknownModelError, explain, read_config, stored_in, warn_of_adapter
from langchain_quantllm.loading.config_checks import check_parameters
from langchain_quantllm.loading.experts import has_packed_experts
from langchain_quantllm.loading.foreign_errors import as_checkpoint_error
from langchain_quantllm.loading.hub import Repository
from langchain_quantllm.loading.json_files import json_or_empty
from langchain_quantllm.loading.sources import ADAPTER_CONFIG, WHISPER, check_sources, folder_of
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory.estimate import MemoryEstimate, estimate_config
from langchain_quantllm.schemes import Scheme, scheme_from

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def estimate_memory(
    model_id: str | PreTrainedConfig,
    scheme: str | Mapping[str, Any] | Scheme | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> MemoryEstimate:
    """Compute the memory that a model will take from its config, without reading any weights.

    Args:
        model_id: Hub id, folder, or a transformers config. An AutoGPTQ folder that has only a
            `quantize_config.json` must come as a config with `quantization_config` set.
        scheme: Name of a scheme or a scheme. None takes the checkpoint's own `quantization_config`, or else
            leaves the weights unquantized. `"gptq"` for an unquantized checkpoint estimates the result of quantizing
            it in groups of 128.
        dtype: Dtype to load in; None or `"auto"` takes the config's; if it names none, that of the weight files, where
            they are on this machine, else float32.
        revision: Branch, tag or commit on the Hub.
        token: Access token of the Hub.
        cache_dir: Folder in which files of the Hub are kept.
        trust_remote_code: Run Python code that comes with the checkpoint.
        local_files_only: Do not ask the Hub.

    Returns:
        The bytes by kind, and the bytes that each token adds to the KV cache.

    Raises:
        ModelNotFoundError: If there is no config under the id.
        InvalidOptionError: If the scheme or the dtype is unknown.
        CheckpointError: If the config is damaged, or already quantized in another scheme than the one asked for.
        UnsupportedError: If the model type is unknown or no language model, the model cannot be built on the meta
            device, or its format has no known formula.
    """
    scheme = scheme_from(scheme)  # a wrong one is reported before the Hub is asked
    if not isinstance(model_id, str):
        return estimate_config(model_id, scheme, dtype=dtype, trust_remote_code=trust_remote_code)
    spec = LoadSpec(
        model_id=model_id,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        local_files_only=local_files_only or None,
    )
    local = folder_of(model_id)
    kind = None if local is None else json_or_empty(Path(local) / "config.json").get("model_type")
    check_sources(model_id, task="speech" if kind == WHISPER else "text")
    source = model_id
    if folder_of(model_id) is None:
        config_file = Repository.of(spec).fetch("config.json")
        if not trust_remote_code:  # else transformers looks for the code beside it, on the Hub
            source = str(config_file.parent)
    try:
        config, _ = read_config(spec, source)
    except UnknownModelError as error:
        raise UnsupportedError(str(error)) from error.__cause__
    folder = folder_of(source)
    with as_checkpoint_error(lambda error: explain(spec, error, "config")):
        stored = None if folder is None else stored_in(spec, config, folder)
        if folder is not None and (Path(folder) / ADAPTER_CONFIG).exists():
            warn_of_adapter(spec)
        estimate = estimate_config(
            config,
            scheme,
            dtype=dtype,
            name=model_id,
            trust_remote_code=trust_remote_code,
            packed_experts=has_packed_experts(getattr(config, "quantization_config", None), stored),
        )
        if stored is not None:
            check_parameters(estimate, stored, quantized=getattr(config, "quantization_config", None) is not None)
    return estimate
