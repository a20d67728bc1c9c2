"""`estimate_memory` for every kind of model, and the memory of an encoder.

Encoders are estimated from their small JSON files alone, others by `loading.estimate`: no weights are read or
downloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat.transformers_auto import encoder_maker
from langchain_quantllm.encoders.load import dtype_of, scheme_for
from langchain_quantllm.encoders.source import MODEL_TYPES, MODULES, SETTINGS, json_list
from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, ModelNotFoundError, UnsupportedError
from langchain_quantllm.loading.estimate import estimate_language_model
from langchain_quantllm.loading.hub import MissingFileError, Repository
from langchain_quantllm.loading.json_files import json_or_empty
from langchain_quantllm.loading.sources import folder_of
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import MemoryEstimate, check_head_dtype, estimate_config
from langchain_quantllm.schemes import SCHEMES, Scheme, Unquantized, scheme_from

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_CLASSIFIER = "ForSequenceClassification"
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ENCODERS = ("Model", "ForMaskedLM", "ForPreTraining")
"""Ends of the names of classes; a checkpoint with one of the last without modules.json is embedded with `pooling=`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderFiles:
    """The small files of an encoder.

    Args:
        kind: One of `spec.KINDS`.
        config_file: The config.json of its transformer.
        config: Its content.
        head_parameters: Numbers in the modules behind the transformer, which are held in float32.
        most_tokens: Tokens from which on texts are cut; None if the files do not say it.
    """

    kind: str
    config_file: Path
    config: Mapping[str, Any]
    head_parameters: int
    most_tokens: int | None


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
    kv_cache_dtype: str = "auto",
    lm_head_dtype: str = "auto",
    draft_model: str | None = None,
    draft_quantization: str | Mapping[str, Any] | Scheme | None = None,
) -> MemoryEstimate:
    """Compute the memory that a model will take from its config, without reading any weights.

    Language models, Whisper, embedding models, cross-encoders and late-interaction models.

    Args:
        model_id: Hub id, folder, or the transformers config of a language model. An AutoGPTQ folder that has only a
            `quantize_config.json` must come as a config with `quantization_config` set.
        scheme: Name of a scheme or a scheme. None takes the checkpoint's own `quantization_config`, or else
            leaves the weights unquantized. `"gptq"` for an unquantized language model estimates the result of
            quantizing it in groups of 128.
        dtype: Dtype to load in; None or `"auto"` takes the config's; if it names none, that of the weight files, where
            they are on this machine, else float32. What is not quantized of a float32 encoder is in bfloat16.
        revision: Branch, tag or commit on the Hub.
        token: Access token of the Hub.
        cache_dir: Folder in which files of the Hub are kept.
        trust_remote_code: Run Python code that comes with the checkpoint.
        local_files_only: Do not ask the Hub.
        kv_cache_dtype: Dtype of a language model's KV cache, as the model takes it: `"auto"`, `"fp8"` or `"int8"`.
        lm_head_dtype: Dtype of a language model's output head, as the model takes it: `"auto"` or `"int8"`.
        draft_model: Hub id or folder of a draft model that a language model is loaded with; see the result's `draft`.
        draft_quantization: The scheme of that.

    Returns:
        The bytes by kind, and the bytes that each token adds to the KV cache: none in an encoder.

    Raises:
        ModelNotFoundError: If there is no config under the id.
        InvalidOptionError: If the scheme or a dtype is unknown, or the scheme needs calibration and the model is an
            encoder; or if there is a scheme for a draft model and none of that.
        CheckpointError: If the config is damaged, or already quantized in another scheme than the one asked for.
        UnsupportedError: If the model is of no kind that is known here, cannot be built on the meta device, or its
            format has no known formula; or if its KV cache or its output head cannot be in 8 bits.
    """
    check_head_dtype(lm_head_dtype)
    asked = scheme_from(scheme)  # a wrong one is reported before the Hub is asked
    parts: dict[str, Any] = {"kv_cache_dtype": kv_cache_dtype, "lm_head_dtype": lm_head_dtype}
    draft = None
    if draft_model is not None:
        at: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
        draft_scheme = scheme_from(draft_quantization)
        draft = estimate_language_model(LoadSpec(model_id=draft_model, **at), draft_scheme, dtype=dtype)
    elif draft_quantization is not None:
        msg = f"draft_quantization={draft_quantization!r} has no effect without draft_model=; leave it out."
        raise InvalidOptionError(msg)
    if not isinstance(model_id, str):
        estimate = estimate_config(model_id, asked, dtype=dtype, trust_remote_code=trust_remote_code, **parts)
        check_head_dtype(lm_head_dtype, estimate.no_int8_head_reason)
        return dataclasses.replace(estimate, draft=draft)
    place: dict[str, Any] = {"model_id": model_id, "revision": revision, "token": token, "cache_dir": cache_dir}
    place |= {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only or None}
    try:
        estimate = estimate_language_model(LoadSpec(**place), asked, dtype=dtype, **parts)
        return dataclasses.replace(estimate, draft=draft)
    except UnsupportedError:
        named = "auto" if dtype is None else str(dtype).removeprefix("torch.")
        spec, files = EncoderSpec(**place), None
        with contextlib.suppress(ModelNotFoundError, CheckpointError, UnsupportedError):
            files = find_encoder(spec)
        if files is None or draft is not None:
            raise
    spec = dataclasses.replace(spec, dtype=named, scheme=asked if _is_plain(files) else None)
    return estimate_encoder(spec, files, asked)


def _is_plain(files: EncoderFiles) -> bool:
    """Say whether a checkpoint is not quantized, so that any scheme that needs no calibration can be asked for."""
    return files.config.get("quantization_config") is None


def find_encoder(spec: EncoderSpec) -> EncoderFiles | None:
    """Read the small files of an encoder.

    Args:
        spec: Where it is. The kind is found out.

    Returns:
        What they say; None if they are those of another kind of model.

    Raises:
        ModelNotFoundError: If there is no such folder or repository, or the Hub cannot be reached.
    """
    file = _file_of(spec, MODULES)
    modules = [] if file is None else json_list(file)
    first = str(modules[0].get("path", "")) if modules else ""
    config_file = _file_of(spec, _in(first, "config.json"))
    if config_file is None:
        return None
    config = json_or_empty(config_file)
    names = [str(name) for name in config.get("architectures") or ()]
    kind = _kind_of(names, _json(spec, SETTINGS) if modules else None)
    if kind is None:
        return None
    heads = [_json(spec, _in(str(m.get("path", "")), "config.json")) for m in modules if _is_dense(m)]
    limit = _json(spec, _in(first, "sentence_bert_config.json")).get("max_seq_length") if modules else None
    return EncoderFiles(
        kind=kind,
        config_file=config_file,
        config=config,
        head_parameters=sum(map(_dense_parameters, heads)),
        most_tokens=limit or config.get("max_position_embeddings"),
    )


def estimate_encoder(
    spec: EncoderSpec, files: EncoderFiles, scheme: str | Mapping[str, Any] | Scheme | None = None
) -> MemoryEstimate:
    """Compute the memory that an encoder will take, as `load` loads it.

    Args:
        spec: How it is loaded; its scheme and kind are not read.
        files: What `find_encoder` returned.
        scheme: The scheme; None takes the checkpoint as it is.

    Returns:
        The bytes by kind. There is no KV cache: an encoder keeps nothing between calls.

    Raises:
        InvalidOptionError: If the scheme is unknown.
        CheckpointError: If the checkpoint is quantized already, in another scheme.
        UnsupportedError: If its class cannot be built without weights.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        files.config_file.parent, trust_remote_code=spec.trust_remote_code, local_files_only=True
    )
    asked = scheme_from(scheme)
    found = _estimate(spec, files, config, asked)
    if files.config.get("quantization_config") is not None:
        return found
    schemes = {name: one for name, one in SCHEMES.items() if not one.calibrated}
    by_scheme = {name: _estimate(spec, files, config, one).total_bytes for name, one in schemes.items()}
    return dataclasses.replace(found, bytes_by_scheme=by_scheme)


def _estimate(spec: EncoderSpec, files: EncoderFiles, config: Any, scheme: Scheme | None) -> MemoryEstimate:
    """Compute one scheme, in the dtype that loading chooses for it."""
    dtype = dtype_of(spec, files.config, scheme or Unquantized())
    found = estimate_config(
        config,
        None if scheme is None else scheme_for(files.kind, scheme, files.config),
        dtype=dtype,
        name=spec.model_id,
        trust_remote_code=spec.trust_remote_code,
        make=encoder_maker(config, is_classifier=files.kind == "cross_encoder"),
    )
    weights = dataclasses.replace(
        found.weights, unquantized_bytes=found.weights.unquantized_bytes + 4 * files.head_parameters
    )
    return dataclasses.replace(
        found,
        scheme=scheme or found.scheme,
        weights=weights,
        parameters=found.parameters + files.head_parameters,
        bytes_16bit=found.bytes_16bit + 2 * files.head_parameters,
        context_tokens=files.most_tokens,
        bytes_by_scheme={},
    )


def _kind_of(names: list[str], settings: Mapping[str, Any] | None) -> str | None:
    """Return the kind of an encoder, by its class and sentence-transformers' settings; None for other models.

    Raises:
        UnsupportedError: If it is an encoder of a kind that is not loaded here.
    """
    name = names[0] if names else ""
    if settings is not None:
        kind = MODEL_TYPES.get(str(settings.get("model_type", "SentenceTransformer")), "embedding")
        if kind == "sparse":
            msg = "sparse encoders are not loaded here, so their memory is not estimated."
            raise UnsupportedError(msg)
        return None if kind == "cross_encoder" and name.endswith(_WRITERS) else kind
    if name.endswith(_CLASSIFIER):
        return "cross_encoder"
    return "embedding" if name.endswith(_ENCODERS) else None


def _is_dense(module: Mapping[str, Any]) -> bool:
    return str(module.get("type", "")).endswith(".Dense")


def _dense_parameters(config: Mapping[str, Any]) -> int:
    """Count the numbers of sentence-transformers' Dense by its settings."""
    inputs, outputs = int(config.get("in_features") or 0), int(config.get("out_features") or 0)
    return inputs * outputs + (outputs if config.get("bias", True) else 0)


def _in(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def _json(spec: EncoderSpec, file: str) -> dict[str, Any]:
    path = _file_of(spec, file)
    return {} if path is None else json_or_empty(path)


def _file_of(spec: EncoderSpec, file: str) -> Path | None:
    """Return the path of a small file of a checkpoint, downloaded if need be; None if it has no such file."""
    folder = folder_of(spec.model_id)
    if folder is not None:
        path = Path(folder) / file
        return path if path.is_file() else None
    with contextlib.suppress(MissingFileError):
        return Repository.of(spec).fetch(file)  # type: ignore[arg-type]  # it has the fields that are read
    return None
