"""The memory that a model will take, computed from its config without reading weights.

Builds the model on the meta device and runs one token for the size of its KV cache. `weights` has the bytes of formats.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat.transformers_auto import (
    has_audio_text_to_text,
    has_image_text_to_text,
    has_speech_seq2seq,
)
from langchain_quantllm.compat.transformers_models import cache_of
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    UnsupportedError,
    first_line,
    nearest,
)
from langchain_quantllm.memory.cache_dtype import SCALE_BYTES, check_8bit, check_cache_dtype, no_8bit_reason
from langchain_quantllm.memory.output_head import no_int8_head_reason
from langchain_quantllm.memory.weights import WeightBytes, weight_bytes
from langchain_quantllm.schemes import (
    FLOAT_DTYPES,
    GPTQ,
    SCHEMES,
    Scheme,
    Unquantized,
    scheme_from,
    scheme_of_config,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


_build_lock = threading.RLock()


def model_build_lock() -> threading.RLock:
    """Return the lock for building a model of transformers, which swaps torch's defaults in the whole process."""
    return _build_lock


def _renew_build_lock() -> None:
    """Make the lock anew in a forked process: another thread of the parent may have held it, for ever."""
    global _build_lock
    _build_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_build_lock)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """The memory of a model under one scheme, before it is loaded.

    Args:
        model_id: Hub id or folder; the model type where a config was given.
        scheme: How the weights are held.
        dtype: Name of the dtype of the rest of the model, and of the KV cache if `kv_cache_dtype` is `"auto"`.
        parameters: Number of parameters, tied ones once, as in the unquantized model.
        weights: Bytes by kind.
        bytes_16bit: Bytes of the same model unquantized in 16 bits.
        kv_cache_dtype: `"auto"`, `"fp8"` or `"int8"`; the bytes of the KV cache are those of this one.
        kv_cache_bytes_per_token: Bytes that one token of one sequence adds to the KV cache; None where the
            model's forward does not run on the meta device. Layers with a state of fixed size add nothing.
        sliding_bytes_per_token: The part of it in layers with a sliding window.
        sliding_window_tokens: Tokens that these layers keep; None without such layers.
        context_tokens: Longest sequence that the config allows; None if it says nothing.
        no_8bit_cache_reason: Why its KV cache cannot be in 8 bits; None if it can, or if nothing is known.
        lm_head_dtype: `"auto"`, or `"int8"` if the output head is counted in 8 bits.
        no_int8_head_reason: Why its output head cannot be in int8, where that is asked for; None if it can.
        bytes_by_scheme: Total bytes under each scheme of `SCHEMES` that needs no calibration; empty for a
            checkpoint that is already quantized.
        draft: The estimate of a draft model beside it; None without one.
    """

    model_id: str
    scheme: Scheme
    dtype: str
    parameters: int
    weights: WeightBytes
    bytes_16bit: int
    kv_cache_bytes_per_token: int | None
    sliding_bytes_per_token: int = 0
    sliding_window_tokens: int | None = None
    context_tokens: int | None = None
    kv_cache_dtype: str = "auto"
    no_8bit_cache_reason: str | None = field(default=None, repr=False)
    lm_head_dtype: str = "auto"
    no_int8_head_reason: str | None = field(default=None, repr=False)
    bytes_by_scheme: Mapping[str, int] = field(default_factory=dict, repr=False, hash=False)
    draft: MemoryEstimate | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of weights, quantization state and buffers."""
        return self.weights.total_bytes

    @property
    def saving(self) -> float:
        """Share of the 16-bit bytes that the scheme saves, 0.6 for 60%; negative if it takes more."""
        return 1 - self.total_bytes / self.bytes_16bit

    def kv_cache_bytes(self, tokens: int, batch: int = 1) -> int:
        """Compute the bytes of the KV cache of `batch` sequences of `tokens` tokens each.

        Raises:
            InvalidOptionError: If a number is negative.
            UnsupportedError: If the size of the cache is not known for this model.
        """
        if tokens < 0 or batch < 0:
            msg = f"tokens={tokens} and batch={batch} must not be negative."
            raise InvalidOptionError(msg)
        if self.kv_cache_bytes_per_token is None:
            msg = f"the KV cache of {self.model_id!r} cannot be computed from its config; load it and measure."
            raise UnsupportedError(msg)
        kept = tokens if self.sliding_window_tokens is None else min(tokens, self.sliding_window_tokens)
        full_bytes_per_token = self.kv_cache_bytes_per_token - self.sliding_bytes_per_token
        return batch * (full_bytes_per_token * tokens + self.sliding_bytes_per_token * kept)

    def total_with_cache_bytes(self, tokens: int, batch: int = 1) -> int:
        """Compute the bytes of the weights and of a KV cache of `batch` sequences of `tokens` tokens each.

        With a draft model, its weights and its own KV cache of the same tokens are among them.
        """
        beside = 0 if self.draft is None else self.draft.total_with_cache_bytes(tokens, batch)
        return self.total_bytes + self.kv_cache_bytes(tokens, batch) + beside

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict of JSON values."""
        return {
            **vars(self),
            "scheme": self.scheme.to_dict(),
            "weights": self.weights.to_dict(),
            "saving": self.saving,
            "bytes_by_scheme": dict(self.bytes_by_scheme),
            "draft": None if self.draft is None else self.draft.to_dict(),
        }


def estimate_config(
    config: PreTrainedConfig,
    scheme: str | Mapping[str, Any] | Scheme | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    name: str | None = None,
    trust_remote_code: bool = False,
    make: Callable[..., PreTrainedModel] | None = None,
    packed_experts: bool = True,
    kv_cache_dtype: str = "auto",
    lm_head_dtype: str = "auto",
) -> MemoryEstimate:
    """Compute the memory of the model that a config describes.

    Args:
        config: The transformers config; not changed.
        scheme: As `estimate_memory` takes it.
        dtype: As `estimate_memory` takes it.
        name: Name of the model in the result and in errors; None is the config's.
        trust_remote_code: Run Python code that comes with the checkpoint.
        make: Makes the model of the config if it is an encoder, which has no KV cache; None makes a language model.
        packed_experts: Whether a checkpoint that is quantized has the experts of a mixture quantized too.
        kv_cache_dtype: As `estimate_memory` takes it.
        lm_head_dtype: As `estimate_memory` takes it; not carried out for a model that cannot have it.

    Raises:
        InvalidOptionError: If the scheme or the dtype is unknown.
        CheckpointError: If the checkpoint is already quantized in another scheme than the one asked for.
        UnsupportedError: If the model type is no language model, cannot be built on the meta device, or its
            format has no known formula; or the scheme is for models of other types.
    """
    asked = scheme_from(scheme)
    check_cache_dtype(kv_cache_dtype)
    name = name or config.name_or_path or config.model_type
    config = copy.deepcopy(config)
    options = _pop_quantization(config)
    types = None if asked is None or options else asked.model_types
    if asked is not None and types is not None and config.model_type not in types:
        found = f"{name!r} is of type {config.model_type!r}"
        msg = f"quantization={asked.name!r} is for models of type {', '.join(types)}, and {found}."
        raise UnsupportedError(msg)
    used = _choose_scheme(asked, options, name)
    torch_dtype = _choose_dtype(dtype, config)
    context_tokens = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    model = build_on_meta(config, torch_dtype, trust_remote_code, name, make)
    others = {} if options else {label: s for label, s in SCHEMES.items() if not s.calibrated}
    unquantized = weight_bytes(model, Unquantized(), torch_dtype)
    head: dict[str, Any] = {"int8_head": lm_head_dtype == "int8"}
    parameters = sum(p.numel() for p in model.parameters())
    cache: dict[str, Any] = {"kv_cache_bytes_per_token": 0}
    if make is None:
        cache = _cache_bytes(model, kv_cache_dtype)
        check_8bit(kv_cache_dtype, cache.get("no_8bit_cache_reason"))
    return MemoryEstimate(
        model_id=name,
        scheme=used,
        dtype=str(torch_dtype).removeprefix("torch."),
        parameters=parameters,
        weights=weight_bytes(model, used, torch_dtype, options, packed_experts=packed_experts, **head),
        bytes_16bit=2 * parameters + unquantized.buffers_bytes,
        context_tokens=context_tokens,
        bytes_by_scheme={label: weight_bytes(model, s, torch_dtype, **head).total_bytes for label, s in others.items()},
        kv_cache_dtype=kv_cache_dtype,
        lm_head_dtype=lm_head_dtype,
        no_int8_head_reason=no_int8_head_reason(model) if lm_head_dtype == "int8" else None,
        **cache,
    )


def _pop_quantization(config: PreTrainedConfig) -> dict[str, Any]:
    """Remove and return a config's quantization, so that its model can be built plain; empty if it has none."""
    found = config.__dict__.pop("quantization_config", None)
    if found is None:
        return {}
    return dict(found if isinstance(found, Mapping) else found.to_dict())


def _choose_scheme(asked: Scheme | None, options: Mapping[str, Any], name: str) -> Scheme:
    if not options:
        return asked or Unquantized()
    own = scheme_of_config(options)
    if asked is not None and asked.name != own.name:
        msg = (
            f"model {name!r} is already quantized with {own.name!r}, so quantization={asked.name!r} cannot be applied;"
            " leave the quantization out, or take the unquantized checkpoint."
        )
        raise CheckpointError(msg)
    if isinstance(asked, GPTQ) and asked.bits not in (None, own.weight_bits):
        msg = f"model {name!r} was quantized to {own.weight_bits} bits, not to bits={asked.bits}; leave the bits out."
        raise CheckpointError(msg)
    return own


def _choose_dtype(dtype: str | torch.dtype | None, config: PreTrainedConfig) -> torch.dtype:
    import torch

    if dtype in (None, "auto"):
        dtype = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    named = str(dtype).removeprefix("torch.")
    if named not in FLOAT_DTYPES:
        msg = f"dtype={named!r} is not a dtype that weights can be loaded in{nearest(named, FLOAT_DTYPES)}"
        raise InvalidOptionError(msg)
    found: torch.dtype = getattr(torch, named)
    return found


def build_on_meta(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool,
    name: str,
    make: Callable[..., PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """Build the model of a config without memory for its weights.

    Args:
        config: The transformers config.
        dtype: Of the weights that it would have.
        trust_remote_code: Run Python code that comes with the checkpoint.
        name: Name of the model in errors.
        make: Makes the model, as `AutoModel.from_config` does; None is that of a language model.

    Raises:
        UnsupportedError: If the model cannot be built on the meta device.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )

    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if config.is_encoder_decoder and has_speech_seq2seq(config.model_type):
        auto_class = AutoModelForSpeechSeq2Seq
    elif not config.is_encoder_decoder and has_image_text_to_text(config.model_type):
        auto_class = AutoModelForImageTextToText
    elif has_audio_text_to_text(config.model_type):
        auto_class = AutoModelForMultimodalLM
    try:
        with model_build_lock(), torch.device("meta"):
            # eager attention: a config that asks for a kernel that is not installed can still be estimated
            return (make or auto_class.from_config)(
                config, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
    except Exception as error:  # whatever a model raises for the values of a stranger's config
        kind = "" if make is not None else " as a language model"
        msg = (
            f"model {name!r} (type {config.model_type!r}) cannot be built on the meta device{kind}, so its memory"
            f" cannot be estimated: {first_line(error)}"
        )
        raise UnsupportedError(msg) from error


def _cache_bytes(model: PreTrainedModel, cache_dtype: str) -> dict[str, Any]:
    """Run one token through the model on the meta device, and measure its KV cache.

    Unlike a formula over the config, this is right for grouped heads, compressed latents, sliding windows and shared
    layers, in any version of transformers.
    """
    import torch

    from langchain_quantllm.compat.transformers_indexers import index_keys_of

    input_ids = torch.zeros((1, 1), dtype=torch.long, device="meta")
    decoder = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
    try:
        with torch.no_grad():
            output = model(input_ids=input_ids, use_cache=True, **decoder)
    except Exception as error:  # as above
        logger.info("The KV cache of a %s cannot be computed on the meta device: %s", type(model).__name__, error)
        return {"kv_cache_bytes_per_token": None}
    cache = cache_of(output)
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if layers is None:
        return {"kv_cache_bytes_per_token": None}
    total_bytes, sliding_bytes, window_tokens = 0, 0, None
    heads, has_latents, has_indexers = [], False, False
    rank = getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None)
    for layer in layers:
        keys, values, of_index = getattr(layer, "keys", None), getattr(layer, "values", None), index_keys_of(layer)
        size_bytes = sum(t.nbytes for t in (keys, values, of_index) if t is not None)
        if keys is not None and values is not None and keys.numel():
            heads.append((keys.shape[-1], values.shape[-1]))
            has_latents |= keys.shape[1] == 1 and keys.shape[-1] == rank
            has_indexers |= of_index is not None
            if cache_dtype != "auto":
                size_bytes = keys.numel() + values.numel() + SCALE_BYTES * keys.shape[1]
        total_bytes += size_bytes
        if size_bytes and getattr(layer, "is_sliding", False):
            sliding_bytes += size_bytes
            window_tokens = max(window_tokens or 0, layer.sliding_window)
    return {
        "kv_cache_bytes_per_token": total_bytes,
        "sliding_bytes_per_token": sliding_bytes,
        "sliding_window_tokens": window_tokens,
        "no_8bit_cache_reason": no_8bit_reason(heads, has_latents=has_latents, has_indexers=has_indexers),
    }
