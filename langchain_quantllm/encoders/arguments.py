"""Arguments of langchain-huggingface's `HuggingFaceEmbeddings`, translated to fields or refused in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_quantllm.errors import InvalidOptionError

_MODEL_KWARGS = {
    "device": "device",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "token": "token",
    "use_auth_token": "token",
    "local_files_only": "local_files_only",
    "cache_folder": "cache_dir",
    "truncate_dim": "truncate_dim",
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "quantization": "quantization",
}
"""Fields by their names in `model_kwargs`, which are arguments of SentenceTransformer there."""

_ENCODE_KWARGS = {
    "normalize_embeddings": "normalize",
    "batch_size": "batch_size",
    "precision": "output_precision",
    "truncate_dim": "truncate_dim",
    "show_progress_bar": "show_progress",
    "device": "device",
}
"""Fields by their names in `encode_kwargs`, which are arguments of SentenceTransformer.encode there."""

_IGNORED = {"convert_to_numpy", "convert_to_tensor", "similarity_fn_name", "model_card_data"}
"""Names without an effect on the lists of numbers that LangChain gets."""

_REFUSED = {
    "processor_kwargs": "the length is max_length=",
    "tokenizer_kwargs": "the length is max_length=",
    "config_kwargs": "what the model is comes from its own files",
    "modules": "give model_id=, a folder that SentenceTransformer.save has written",
    "chunk_size": "the sizes of batches are max_batch_tokens=",
    "pool": "several devices are device=['cuda:0', 'cuda:1']",
    "multi_process_devices": "several devices are device=['cuda:0', 'cuda:1']",
}


def translate_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the arguments that only HuggingFaceEmbeddings has.

    Args:
        given: The arguments of the constructor.

    Returns:
        The arguments with our own names; `model_kwargs` holds what is for transformers alone.

    Raises:
        InvalidOptionError: If an argument has no counterpart here, or two contradict each other.
    """
    values = dict(given)
    rest: dict[str, Any] = {}
    for name, value in _mapping(values, "model_kwargs").items():
        if name == "model_kwargs":
            for inner, setting in _mapping({name: value}, name).items():
                _sort(values, rest, inner, setting)
        elif name == "prompts":
            _set_prompts(values, _mapping({name: value}, name))
        elif name == "default_prompt_name":
            _set_both(values, "prompt_name", value)
        elif name == "backend":
            _check_backend(value)
        else:
            _sort(values, rest, name, value)
    if "model_kwargs" in values or rest:
        values["model_kwargs"] = rest
    encode = _mapping(values, "encode_kwargs")
    query = _mapping(values, "query_encode_kwargs")
    values.pop("encode_kwargs", None)
    values.pop("query_encode_kwargs", None)
    _translate_encode(values, encode, "encode_kwargs", ("query", "document") if not query else ("document",))
    _translate_encode(values, query, "query_encode_kwargs", ("query",))
    if values.pop("multi_process", False) and values.get("device") is None:
        values["device"] = _all_devices()
    return values


def _sort(values: dict[str, Any], rest: dict[str, Any], name: str, value: Any) -> None:
    """Put an entry of `model_kwargs` where it belongs: a field, or transformers' arguments."""
    if name in _MODEL_KWARGS:
        _set(values, _MODEL_KWARGS[name], value, f"model_kwargs[{name!r}]")
    elif name in _REFUSED:
        if value:
            _refuse("model_kwargs", name, value)
    elif name not in _IGNORED and name != "low_cpu_mem_usage":
        rest[name] = value


def _translate_encode(values: dict[str, Any], encode: Mapping[str, Any], of: str, sides: tuple[str, ...]) -> None:
    for name, value in encode.items():
        if name in ("prompt", "prompt_name"):
            for side in sides:
                _set(values, f"{side}_{name}", value, f"{of}[{name!r}]")
        elif name in _ENCODE_KWARGS:
            _set(values, _ENCODE_KWARGS[name], value, f"{of}[{name!r}]")
        elif name == "output_value" and value != "sentence_embedding":
            msg = f"{of}[{name!r}]={value!r} is not possible: each text has one vector; leave it out."
            raise InvalidOptionError(msg)
        elif name in _REFUSED:
            _refuse(of, name, value)
        elif name not in _IGNORED and name != "output_value":
            msg = f"{of} has {name!r}, which has no counterpart here; leave it out."
            raise InvalidOptionError(msg)


def _set(values: dict[str, Any], field: str, value: Any, what: str) -> None:
    if value is None:
        return
    if values.get(field) not in (None, value):
        shown = "" if field == "token" else f": {values[field]!r} and {value!r}"
        msg = f"{what} and {field} say two things{shown}; give one of them."
        raise InvalidOptionError(msg)
    values[field] = value


def _set_prompts(values: dict[str, Any], prompts: Mapping[str, Any]) -> None:
    for name, prompt in prompts.items():
        side = {"query": "query", "document": "document", "passage": "document", "corpus": "document"}.get(name)
        if side is None:
            msg = f"prompts has {name!r}; give query_prompt= and document_prompt=, the texts before each of them."
            raise InvalidOptionError(msg)
        _set(values, f"{side}_prompt", prompt, f"model_kwargs['prompts'][{name!r}]")


def _set_both(values: dict[str, Any], name: str, value: Any) -> None:
    for side in ("query", "document"):
        if values.get(f"{side}_prompt") is None and values.get(f"{side}_{name}") is None:
            values[f"{side}_{name}"] = value


def _check_backend(value: Any) -> None:
    if value not in ("torch", "ipex", None):
        msg = (
            f"model_kwargs['backend']={value!r} is not possible: bitsandbytes quantizes models of PyTorch; leave it "
            "out, or use HuggingFaceEmbeddings of langchain-huggingface for ONNX and OpenVINO."
        )
        raise InvalidOptionError(msg)


def _refuse(of: str, name: str, value: Any) -> None:
    msg = f"{of}[{name!r}]={str(value)[:60]} is not possible here: {_REFUSED[name]}."
    raise InvalidOptionError(msg)


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        msg = f"{name}={value!r} is not a dict."
        raise InvalidOptionError(msg)
    return value


def _all_devices() -> list[str] | None:
    """List all GPUs; None where there are not several."""
    import torch

    count = torch.cuda.device_count()
    return [f"cuda:{number}" for number in range(count)] if count > 1 else None
