"""Constructor arguments: every accepted spelling, translated to the names of fields.

Owns the aliases of fields, the fields and options that users put into `model_kwargs`, the numbers of devices, and the
checks of a pipeline of the user's own. Knows no pydantic and no LangChain.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.options import OPTION_NAMES, Place, normalize
from langchain_quantllm.schemes import Scheme, scheme_from, scheme_of_config

SPEC_FIELDS = (
    "dtype",
    "device_map",
    "max_memory",
    "attn_implementation",
    "revision",
    "cache_dir",
    "trust_remote_code",
    "use_safetensors",
    "local_files_only",
)
"""Fields that `LoadSpec` has by the same name."""

LOADING_FIELDS = (
    "quantization",
    "quantization_config",
    *SPEC_FIELDS,
    "lm_head_dtype",
    "token",
    "device",
    "model_kwargs",
)
"""Fields that say how to load; none of them has an effect on a pipeline that is loaded already."""

ENGINE_FIELDS = ("kv_cache_memory", "kv_cache_dtype", "fuse", "prefix_caching", "batch_invariant", "draft_model")
"""Fields that say how the engines of this package run a model."""

_BITSANDBYTES = ("load_in_4bit", "load_in_8bit", "bnb_4bit_", "llm_int8_")
_MODEL_KWARGS_ALIASES = {"torch_dtype": "dtype", "use_auth_token": "token"}
_LIFTED = (*SPEC_FIELDS, "token", "quantization", "quantization_config")
_TASKS = ("text-generation", "image-text-to-text", "any-to-any")


def translate(given: Mapping[str, Any], option_fields: Collection[str], place: Place) -> dict[str, Any]:
    """Translate the arguments of a constructor to fields.

    Args:
        given: The arguments by any accepted name.
        option_fields: The fields that are generation options.
        place: The class, for its names and for the words of errors.

    Returns:
        Values by the names of fields; options that are no field of their own are in `generation_kwargs`.

    Raises:
        InvalidOptionError: If a name is unknown, a value is not allowed, or two arguments contradict each other.
    """
    values = {k: v for k, v in given.items() if v is not None or k not in ("model", "model_name", "pipeline")}
    for name in ("model", "model_name"):
        if name in values:
            alias = values.pop(name)
            if values.setdefault("model_id", alias) != alias:
                msg = f"model_id={values['model_id']!r} and {name}={alias!r} say two things; give one of them."
                raise InvalidOptionError(msg)
    for name in ("model_kwargs", "generation_kwargs", "pipeline_kwargs"):
        if not isinstance(kwargs := values.get(name) or {}, Mapping):
            msg = f"{name}={kwargs!r} is not a dict; give names with values, such as {{'max_new_tokens': 64}}."
            raise InvalidOptionError(msg)
    options = _lift_model_kwargs(values)
    unify_types(values)
    for name in ("generation_kwargs", "pipeline_kwargs"):
        options.update(values.pop(name, None) or {})
    for name in ("batch_size", "adapter"):  # fields that HuggingFacePipeline's users put among the options
        if (value := options.pop(name, None)) is not None and values.get(name) is None:
            values[name] = value
    options.update({n: values.pop(n) for n in list(values) if n not in place.fields or n in option_fields})
    checked = normalize(options, place=place)
    values.update({k: list(v) if isinstance(v, tuple) else v for k, v in checked.items() if k in option_fields})
    values["generation_kwargs"] = {k: v for k, v in checked.items() if k not in option_fields}
    return values


def _lift_model_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    """Move the entries of `model_kwargs` that are fields of ours to these fields.

    Returns:
        The generation options among the entries; many tutorials put them there.
    """
    rest: dict[str, Any] = {}
    options: dict[str, Any] = {}
    model_kwargs = dict(values.get("model_kwargs") or {})
    if (scheme := _bitsandbytes_of(model_kwargs)) is not None:
        if scheme_from(other := model_kwargs.get("quantization")) not in (None, scheme):
            msg = (
                f"model_kwargs asks for quantization={other!r} and, by names of bitsandbytes, for {scheme!r}; give one."
            )
            raise InvalidOptionError(msg)
        if scheme_from(values.get("quantization")) == scheme:
            values["quantization"] = scheme
        model_kwargs["quantization"] = scheme
    for name, value in model_kwargs.items():
        field = _MODEL_KWARGS_ALIASES.get(name, name)
        if field in _LIFTED:
            if value is not None and values.get(field) not in (None, value):
                both = "" if field == "token" else f", as {values[field]!r} and as {value!r}"
                msg = f"{name} is given twice, as a field and in model_kwargs{both}; give it once."
                raise InvalidOptionError(msg)
            if value is not None:
                values[field] = value
        elif name in OPTION_NAMES and name != "use_cache":  # a field of a model's config too
            options[name] = value
        elif name != "low_cpu_mem_usage":  # transformers 5 always does this
            rest[name] = value
    values["model_kwargs"] = rest
    return options


def _bitsandbytes_of(model_kwargs: dict[str, Any]) -> Scheme | None:
    """Take the options of bitsandbytes out of `model_kwargs`, where older transformers took them.

    Returns:
        The scheme that `BitsAndBytesConfig` makes of them; None if there are none, or they ask for none.
    """
    given = {name: model_kwargs.pop(name) for name in list(model_kwargs) if name.startswith(_BITSANDBYTES)}
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        return scheme_of_config(given)
    if name := next((name for name in given if not name.startswith("load_in_")), None):
        normalize({name: given[name]}, place=Place(at_call=False))  # raises, with the advice for the name
    return None


def unify_types(values: dict[str, Any]) -> None:
    """Turn paths and torch dtypes into texts, and the device numbers that JSON made texts back into numbers."""
    if isinstance(limits := values.get("max_memory"), Mapping):
        values["max_memory"] = {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in limits.items()}
    for name in ("dtype", "cache_dir"):
        if (value := values.pop(name, None)) is not None:
            values[name] = os.fspath(value) if isinstance(value, os.PathLike) else str(value).removeprefix("torch.")
    for name in ("model_id", "adapter", "draft_model"):
        if isinstance(values.get(name), os.PathLike):
            values[name] = os.fspath(values[name])
    if isinstance(adapters := values.get("adapters"), Mapping):
        values["adapters"] = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in adapters.items()}
    elif adapters is None:
        values.pop("adapters", None)


def device_name(device: int | str) -> str:
    """Turn HuggingFacePipeline's device numbers into names.

    Raises:
        UnsupportedError: If this machine has no such device.
    """
    if isinstance(device, str):
        return device
    if device < 0:
        return "cpu"
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        msg = f"device={device} asks for an accelerator and this machine has none; use device=-1 or 'cpu'."
        raise UnsupportedError(msg)
    count = torch.accelerator.device_count()
    if device >= count:
        msg = f"device={device} does not exist; this machine has {count}, numbered from 0."
        raise UnsupportedError(msg)
    return f"{accelerator.type}:{device}"


def check_pipeline(pipeline: Any, loading: Mapping[str, Any], *, has_adapters: bool) -> None:
    """Check a pipeline of the user's own, and that no argument asks for a change of it.

    Args:
        pipeline: The value of `pipeline=`.
        loading: The `LOADING_FIELDS` that differ from their defaults.
        has_adapters: Whether adapters are asked for.

    Raises:
        InvalidOptionError: If it is no pipeline that continues texts, or other arguments would have no effect on it.
    """
    if getattr(pipeline, "task", None) not in _TASKS or getattr(pipeline, "tokenizer", None) is None:
        msg = (
            f"pipeline={type(pipeline).__name__} cannot be used; give transformers.pipeline('text-generation', "
            "model=..., tokenizer=...), or pipeline('image-text-to-text', model=..., processor=...)."
        )
        raise InvalidOptionError(msg)
    if loading:
        name, value = next(iter(loading.items()))
        msg = f"{name}={value!r} has no effect on a pipeline that is already loaded; leave it out."
        raise InvalidOptionError(msg)
    if has_adapters:
        msg = (
            "adapters are not loaded onto a pipeline of your own, which stays as it is; load them with peft, "
            "pipeline.model.load_adapter(folder, adapter_name=...), and choose with "
            "peft.functional.set_adapter(pipeline.model, name)."
        )
        raise InvalidOptionError(msg)
