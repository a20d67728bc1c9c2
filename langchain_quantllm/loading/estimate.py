"""The memory of language models and Whisper: finds a model's config, and computes what the model will take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
from langchain_quantllm.memory.output_head import check_head_dtype
from langchain_quantllm.schemes import Scheme

if TYPE_CHECKING:
    import torch


def estimate_language_model(
    spec: LoadSpec,
    scheme: Scheme | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    kv_cache_dtype: str = "auto",
    lm_head_dtype: str = "auto",
) -> MemoryEstimate:
    """Compute the memory that a language model or Whisper will take from its config, without reading any weights.

    Args:
        spec: Where it is; its scheme and dtype are not read.
        scheme: The scheme, as `estimate_memory` takes it.
        dtype: The dtype, as `estimate_memory` takes it.
        kv_cache_dtype: The dtype of the KV cache, as `estimate_memory` takes it.
        lm_head_dtype: The dtype of the output head, as `estimate_memory` takes it.

    Raises:
        ModelNotFoundError: If there is no config under the id.
        InvalidOptionError: If the dtype is unknown.
        CheckpointError: If the config is damaged, or already quantized in another scheme than the one asked for.
        UnsupportedError: If the model type is unknown or no language model, the model cannot be built on the meta
            device, or its format has no known formula; or if its KV cache or its output head cannot be in 8 bits.
    """
    model_id = spec.model_id
    local = folder_of(model_id)
    kind = None if local is None else json_or_empty(Path(local) / "config.json").get("model_type")
    check_sources(model_id, task="speech" if kind == WHISPER else "text")
    source = model_id
    if folder_of(model_id) is None:
        config_file = Repository.of(spec).fetch("config.json")
        if not spec.trust_remote_code:  # else transformers looks for the code beside it, on the Hub
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
            trust_remote_code=spec.trust_remote_code,
            packed_experts=has_packed_experts(getattr(config, "quantization_config", None), stored),
            kv_cache_dtype=kv_cache_dtype,
            lm_head_dtype=lm_head_dtype,
        )
        check_head_dtype(lm_head_dtype, estimate.no_int8_head_reason)
        if stored is not None:
            check_parameters(estimate, stored, quantized=getattr(config, "quantization_config", None) is not None)
    return estimate
