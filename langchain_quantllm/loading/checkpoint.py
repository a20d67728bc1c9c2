"""Finding a checkpoint and deciding how it is loaded, before any weight is read.

The checks here need the config at most. No tensor is read.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.packages import is_installed, label_of
from langchain_quantllm.compat.transformers_auto import has_causal_lm, has_image_text_to_text
from langchain_quantllm.compat.transformers_quantizers import knows_format
from langchain_quantllm.errors import (
    CheckpointError,
    MissingPackageError,
    UnsupportedError,
    first_line,
    pip_install,
)
from langchain_quantllm.loading.gptq import GPTQCheckpoint, read_gptq_checkpoint, read_gptq_folder
from langchain_quantllm.loading.hub import MissingFileError, Repository, hub_options
from langchain_quantllm.loading.sources import check_sources, folder_of, wrong_folder
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.schemes import GPTQ, Prequantized, Scheme, Unquantized, scheme_of_config

_FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_3", "flash-attn-3"),
    "flash_attention_4": ("flash_attn_4", "flash-attn-4"),
}


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files with the settings of a checkpoint's image processor."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found: its config, and where its files are.

    Args:
        source: For `from_pretrained`: a local folder if all files are on this machine, so that the Hub is not asked;
            else the name of a repository.
        config: The transformers config, not shared with others.
        quantization: The quantization config in its dict form; None for an unquantized checkpoint.
        gptq: The settings of a GPTQ checkpoint; None for others.
        local: Whether `source` is a folder.
        model_kwargs: Those of the spec that are no fields of the config.
    """

    source: str
    config: Any
    quantization: Mapping[str, Any] | None
    gptq: GPTQCheckpoint | None
    local: bool
    model_kwargs: Mapping[str, Any]


def stored_profile(model_id: str) -> tuple[dict[str, Any], str | None, bool]:
    """Read the config and the chat template of a local folder, or of a repository in the Hub's cache.

    Returns:
        The config, empty if there is none; the template; and whether the model reads images, as far as the names of
        its config's fields and its files tell.
    """
    folder = folder_of(model_id) or _cached_snapshot(LoadSpec(model_id=model_id))
    if folder is None:
        return {}, None, False
    config, tokenizer = (_read_json(Path(folder) / name) for name in ("config.json", "tokenizer_config.json"))
    template = tokenizer.get("chat_template")
    with contextlib.suppress(OSError):
        template = (Path(folder) / "chat_template.jinja").read_text(encoding="utf-8")
    sees = any(word in name for name in config for word in ("vision", "image")) and has_image_processor(Path(folder))
    return config, None if template is None else str(template), sees


def has_image_processor(folder: Path) -> bool:
    """Say whether a folder holds an image processor: in a file of its own, or in the processor's."""
    return (folder / PROCESSOR_FILES[0]).is_file() or "image_processor" in _read_json(folder / PROCESSOR_FILES[1])


def _read_json(file: Path) -> Any:
    """Read a JSON file; an empty dict if it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def find_source(spec: LoadSpec) -> str:
    """Find where a checkpoint's files are: a folder, or a repository that the Hub has.

    Needs neither torch nor transformers, so that a wrong name is reported before these are imported.

    Raises:
        ModelNotFoundError: If there is no such folder or repository, or the Hub cannot be reached; of the adapters too.
        CheckpointError: If it is in a format that transformers does not load.
        UnsupportedError: If its files are those of a model that writes no text.
    """
    check_sources(spec.model_id, spec.adapters)
    if (folder := folder_of(spec.model_id)) is not None:
        return folder
    if spec.local_files_only is not False and (folder := _cached_snapshot(spec)) is not None:
        if (error := wrong_folder(Path(folder), repository=spec.model_id)) is not None:
            raise error
        return folder
    repository = Repository.of(spec)
    try:
        config = repository.fetch("config.json", check_connection=True)
    except MissingFileError as error:
        raise (repository.wrong_repository(None) or error) from error.__cause__
    if (wrong := repository.wrong_repository(config)) is not None:
        raise wrong
    return spec.model_id


def read_config(spec: LoadSpec, source: str) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint's config.

    Args:
        spec: The options of loading.
        source: A folder, or the name of a repository.

    Returns:
        The transformers config, and those of the spec's `model_kwargs` that are no fields of it.

    Raises:
        CheckpointError: If the config cannot be read, or needs code that is not trusted.
    """
    from transformers import AutoConfig

    options = {**hub_options(spec, folder_of(source)), **copy.deepcopy(dict(spec.model_kwargs))}
    try:
        config, unused = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **options)
    except (ValueError, OSError) as error:
        raise CheckpointError(explain(spec, error, "config")) from error
    # from_pretrained gets the Hub's options anyway.
    return config, {name: value for name, value in unused.items() if name in spec.model_kwargs}


def find_checkpoint(spec: LoadSpec, source: str | None = None) -> Checkpoint:
    """Find a checkpoint and read its config, from the disk where possible.

    Args:
        spec: The options of loading.
        source: Result of `find_source`, if that was called before.

    Raises:
        ModelNotFoundError: If there is no such folder or repository.
        CheckpointError: If the config cannot be read, or needs code that is not trusted.
        UnsupportedError: If the model generates no text from text, or from text with images.
    """
    source = find_source(spec) if source is None else source
    folder = folder_of(source)
    config, model_kwargs = read_config(spec, source)
    _check_task(spec, config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    gptq = None
    if folder is not None:
        gptq = read_gptq_folder(Path(folder))
    elif quantization is None or quantization.get("quant_method") == "gptq":
        repository = Repository.of(spec)
        gptq = read_gptq_checkpoint(repository.list_files(), repository.fetch)
    if gptq is not None:
        quantization = gptq.quantization_config
    _check_format(spec, quantization)
    return Checkpoint(
        source=source,
        config=config,
        quantization=quantization,
        gptq=gptq,
        local=folder is not None,
        model_kwargs=model_kwargs,
    )


def _check_format(spec: LoadSpec, quantization: Mapping[str, Any] | None) -> None:
    """Refuse a format that transformers does not know: it would read the packed weights as plain ones."""
    if not quantization:
        return
    method = quantization.get("quant_method", "bitsandbytes")
    method = str(getattr(method, "value", method))
    if not knows_format(method):
        from transformers import __version__

        msg = (
            f"{spec.model_id} is quantized with {method!r}, which transformers {__version__} does not know; a newer "
            f"one may: {pip_install('--upgrade', 'transformers')}"
        )
        raise CheckpointError(msg)


def _cached_snapshot(spec: LoadSpec) -> str | None:
    """Find a complete copy of a repository in the Hub's cache, weights and all."""
    config = Repository.of(spec).cached("config.json")
    if config is None:
        return None
    folder = config.parent
    names = ["model.safetensors"] if spec.use_safetensors else ["model.safetensors", "pytorch_model.bin"]
    complete = any(_is_complete(folder, name) for name in names)
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return str(folder) if complete and has_tokenizer else None


def _is_complete(folder: Path, weights: str) -> bool:
    """Say whether weights are here, in one file or in all the shards that their index names."""
    index = folder / f"{weights}.index.json"
    if not index.is_file():
        return any(folder.glob(f"*{Path(weights).suffix}"))
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).exists() for shard in shards)


def explain(spec: LoadSpec, error: Exception, part: str) -> str:
    """Say in one sentence why a part of a checkpoint, such as its tokenizer, cannot be read."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"{spec.model_id} comes with Python code of its own; read it, and if you trust it pass "
            "trust_remote_code=True."
        )
    if "does not recognize this architecture" in text:
        from transformers import __version__

        kind = re.search(r"model type `([^`]+)`", text)
        return (
            f"transformers {__version__} does not know the architecture {f'{kind[1]!r} ' if kind else ''}of "
            f"{spec.model_id}; a newer one may: {pip_install('--upgrade', 'transformers')}"
        )
    if part == "tokenizer":
        return (
            f"{spec.model_id} has no tokenizer that can be read ({first_line(error)}); copy the model's tokenizer "
            "files into its folder, or install what it needs: pip install sentencepiece tiktoken"
        )
    return f"the {part} of {spec.model_id} cannot be read: {first_line(error)}"


def reads_text(config: Any) -> bool:
    """Say whether transformers, or the checkpoint's own code, has a causal language model for a config."""
    return has_causal_lm(config.model_type) or _has_code(config, "AutoModelForCausalLM")


def reads_images(config: Any) -> bool:
    """Say whether transformers, or the checkpoint's own code, has a model for a config that reads text and images."""
    return has_image_text_to_text(config.model_type) or _has_code(config, "AutoModelForImageTextToText")


def _has_code(config: Any, auto_class: str) -> bool:
    return auto_class in (getattr(config, "auto_map", None) or {})


def _check_task(spec: LoadSpec, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False) or not (reads_text(config) or reads_images(config)):
        msg = (
            f"{spec.model_id} is a {config.model_type!r} model, which does not continue a text by itself; "
            "use a decoder-only language model, such as Llama, Qwen or Mistral."
        )
        raise UnsupportedError(msg)


def reconcile(spec: LoadSpec, checkpoint: Checkpoint) -> tuple[Scheme, Any]:
    """Combine the scheme asked for with that of the checkpoint.

    Returns:
        The scheme to load in, and the `quantization_config` for `from_pretrained`, or None.

    Raises:
        CheckpointError: If the checkpoint is quantized in another scheme, or not quantized although it has to be.
    """
    given = spec.quantization_config
    asked = spec.scheme
    if given is not None:
        asked = scheme_of_config(given if isinstance(given, Mapping) else given.to_dict())
    if checkpoint.quantization is None:
        if asked is not None and asked.calibrated and isinstance(asked, GPTQ):
            msg = (
                f"{spec.model_id} is not quantized, and GPTQ takes calibration data, so it is not made while loading; "
                "give a GPTQ checkpoint, or use quantization='nf4' or 'int8', which need none."
            )
            raise CheckpointError(msg)
        asked = asked or Unquantized()
        return asked, given if given is not None else asked.transformers_config(_dtype_name(spec, checkpoint.config))
    stored = scheme_of_config(checkpoint.quantization)
    if asked is None:
        return stored, None
    if type(asked) is not type(stored) or (isinstance(asked, Prequantized) and asked.method != stored.method):  # type: ignore[attr-defined]
        msg = (
            f"{spec.model_id} is already quantized ({label_of(stored)}), so it cannot be loaded as {label_of(asked)}; "
            "leave quantization out, or give the unquantized checkpoint."
        )
        raise CheckpointError(msg)
    for option, want in asked.to_dict().items():
        has = getattr(stored, option)
        if option not in ("name", "kernel") and want != (list(has) if isinstance(has, tuple) else has):
            msg = (
                f"{spec.model_id} was quantized with {option}={has!r}, not {want!r}; leave {option} out, or give "
                "another checkpoint."
            )
            raise CheckpointError(msg)
    if isinstance(asked, GPTQ) and isinstance(stored, GPTQ):
        return dataclasses.replace(stored, kernel=asked.kernel), None
    return stored, None


def _dtype_name(spec: LoadSpec, config: Any) -> str:
    """Return the name of the dtype for the unquantized part of the model."""
    if spec.dtype != "auto":
        return spec.dtype
    text_config = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text_config, "dtype", None) or "float32"
    return str(dtype).removeprefix("torch.")


def check_attention(spec: LoadSpec) -> None:
    """Check that the attention asked for can run here.

    Raises:
        MissingPackageError: If its package is not installed.
        UnsupportedError: If it needs a GPU and there is none.
    """
    name = spec.attn_implementation
    if name not in _FLASH_PACKAGES:
        return
    import torch

    module, package = _FLASH_PACKAGES[name]
    if not torch.cuda.is_available():
        msg = (
            f"attn_implementation={name!r} runs on CUDA GPUs only, and there is none here; use 'sdpa', which runs "
            "everywhere."
        )
        raise UnsupportedError(msg)
    if not is_installed(module):
        msg = (
            f"attn_implementation={name!r} needs {package}: {pip_install(package)}; or use 'sdpa', which needs nothing."
        )
        raise MissingPackageError(msg)
