"""Finding a checkpoint and deciding how it is loaded, before any weight is read.

The checks here need the config at most. No tensor is read.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.transformers_auto import has_audio_text_to_text, has_causal_lm, has_image_text_to_text
from langchain_quantllm.compat.transformers_quantizers import knows_format
from langchain_quantllm.errors import (
    CheckpointError,
    UnsupportedError,
    pip_install,
)
from langchain_quantllm.loading.config_checks import check_raw_config
from langchain_quantllm.loading.foreign_errors import as_checkpoint_error, reason_of
from langchain_quantllm.loading.gptq import GPTQCheckpoint, read_gptq_checkpoint, read_gptq_folder
from langchain_quantllm.loading.hub import MissingFileError, Repository, hub_options
from langchain_quantllm.loading.json_files import json_or_empty, read_json
from langchain_quantllm.loading.sources import ADAPTER_CONFIG, WHISPER, check_sources, folder_of, wrong_folder
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.loading.stored_tensors import (
    INDEX,
    StoredTensors,
    check_not_pickled,
    read_index,
    read_stored_tensors,
)
from langchain_quantllm.schemes import FLOAT_DTYPES

_UNTRUSTED, _UNKNOWN = "trust_remote_code", "does not recognize this architecture"
"""Words of transformers' errors."""

logger = logging.getLogger(__name__)

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
        stored: The tensors in its files; None if they are not on this machine, not in safetensors, or damaged.
        has_adapter: Whether files of an adapter lie beside its own; they are not part of it.
    """

    source: str
    config: Any
    quantization: Mapping[str, Any] | None
    gptq: GPTQCheckpoint | None
    local: bool
    model_kwargs: Mapping[str, Any]
    stored: StoredTensors | None = None
    has_adapter: bool = False


class UnknownModelError(CheckpointError):
    """The config is of a model that transformers does not know, or whose own code is not trusted."""


def stored_profile(model_id: str) -> tuple[dict[str, Any], str | None, bool, bool]:
    """Read the config and the chat template of a local folder, or of a repository in the Hub's cache.

    Returns:
        The config, empty if there is none; the template; and whether the model reads images, and whether it hears, as
        far as the names of its config's fields and its files tell.
    """
    folder = folder_of(model_id) or _cached_snapshot(LoadSpec(model_id=model_id))
    if folder is None:
        return {}, None, False, False
    config, tokenizer = (json_or_empty(Path(folder) / name) for name in ("config.json", "tokenizer_config.json"))
    template = tokenizer.get("chat_template")
    file = Path(folder) / "chat_template.jinja"
    with contextlib.suppress(OSError, ValueError):  # loading reports it
        if file.is_file():
            template = file.read_text(encoding="utf-8")
    sees = any(word in name for name in config for word in ("vision", "image")) and has_image_processor(Path(folder))
    hears = config.get("audio_config") is not None and has_feature_extractor(Path(folder))
    return config, None if template is None else str(template), sees, hears


def has_image_processor(folder: Path) -> bool:
    """Say whether a folder holds an image processor: in a file of its own, or in the processor's."""
    return (folder / PROCESSOR_FILES[0]).is_file() or "image_processor" in json_or_empty(folder / PROCESSOR_FILES[1])


def has_feature_extractor(folder: Path) -> bool:
    """Say whether a folder holds a feature extractor: in a file of its own, or in the processor's."""
    return (folder / PROCESSOR_FILES[0]).is_file() or "feature_extractor" in json_or_empty(folder / PROCESSOR_FILES[1])


def find_source(spec: LoadSpec) -> str:
    """Find where a checkpoint's files are: a folder, or a repository that the Hub has.

    Needs neither torch nor transformers, so that a wrong name is reported before these are imported.

    Raises:
        ModelNotFoundError: If there is no such folder or repository, or the Hub cannot be reached; of the adapters too.
        CheckpointError: If it is in a format that transformers does not load.
        UnsupportedError: If its files are those of a model that writes no text.
    """
    check_sources(spec.model_id, spec.adapters, task=spec.task)
    if (folder := folder_of(spec.model_id)) is not None:
        return folder
    if spec.local_files_only is not False and (folder := _cached_snapshot(spec)) is not None:
        if (error := wrong_folder(Path(folder), repository=spec.model_id, task=spec.task)) is not None:
            raise error
        return folder
    repository = Repository.of(spec)
    try:
        config = repository.fetch("config.json", check_connection=True)
    except MissingFileError as error:
        raise (repository.wrong_repository(None, task=spec.task) or error) from error.__cause__
    if (wrong := repository.wrong_repository(config, task=spec.task)) is not None:
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

    folder = folder_of(source)
    file = Repository.of(spec).fetch("config.json") if folder is None else Path(folder) / "config.json"
    try:
        content = read_json(file)
    except CheckpointError as error:
        raise CheckpointError(explain(spec, error, "config")) from error
    weights = content.get("transformers_weights")
    stored = read_stored_tensors(file.parent, weights if isinstance(weights, str) else None)
    check_raw_config(
        content,
        file,
        use_safetensors=spec.use_safetensors,
        trust_remote_code=spec.trust_remote_code,
        stored=stored,
    )
    options = {**hub_options(spec, folder), **copy.deepcopy(dict(spec.model_kwargs))}
    with as_checkpoint_error(lambda error: explain(spec, error, "config")):
        try:
            config, unused = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **options)
        except ValueError as error:
            if any(words in str(error) for words in (_UNTRUSTED, _UNKNOWN)):
                raise UnknownModelError(explain(spec, error, "config")) from error
            raise
    # from_pretrained gets the Hub's options anyway.
    return config, {name: value for name, value in unused.items() if name in spec.model_kwargs}


def stored_in(spec: LoadSpec, config: Any, folder: str, weights_name: str | None = None) -> StoredTensors | None:
    """Read which tensors a folder's files hold; a config that names no dtype gets theirs, as transformers loads them.

    Args:
        spec: The options of loading.
        config: The transformers config.
        folder: The folder.
        weights_name: Name of the weight file or the index, where it is not the usual one.

    Raises:
        CheckpointError: If the index is damaged, or names other files than the checkpoint's, or pickle files where
            these are refused.
    """
    import torch

    files, index = {path.name for path in Path(folder).iterdir()}, Path(folder) / INDEX
    weights_name = weights_name or getattr(config, "transformers_weights", None)
    if spec.use_safetensors and weights_name is None:
        check_not_pickled(files, index if index.name in files else None, spec.model_id)
    stored = read_stored_tensors(Path(folder), weights_name)
    dtype = None if stored is None or spec.dtype != "auto" else stored.dtype
    if getattr(config, "dtype", None) is None and dtype in FLOAT_DTYPES:
        config.dtype = getattr(torch, dtype)
    return stored


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
    config, model_kwargs = read_config(spec, source)
    with as_checkpoint_error(lambda error: explain(spec, error, "config")):
        return _checkpoint_of(spec, source, config, model_kwargs)


def _checkpoint_of(spec: LoadSpec, source: str, config: Any, model_kwargs: Mapping[str, Any]) -> Checkpoint:
    folder = folder_of(source)
    check_task(spec, config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    gptq, stored = None, None
    if folder is not None:
        has_adapter = (Path(folder) / ADAPTER_CONFIG).exists()
        gptq = read_gptq_folder(Path(folder))
        stored = stored_in(spec, config, folder, None if gptq is None else gptq.weights_name)
    else:
        repository = Repository.of(spec)
        files = repository.list_files()
        has_adapter = ADAPTER_CONFIG in files
        if spec.use_safetensors and INDEX in files:
            check_not_pickled(files, repository.fetch(INDEX), spec.model_id)
        elif INDEX in files:
            read_index(repository.fetch(INDEX))
        if quantization is None or quantization.get("quant_method") == "gptq":
            gptq = read_gptq_checkpoint(files, repository.fetch)
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
        stored=stored,
        has_adapter=has_adapter,
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
    try:
        shards = set(read_index(index)["weight_map"].values())
    except CheckpointError:  # loading reports it
        return True
    return all((folder / shard).exists() for shard in shards)


def explain(spec: LoadSpec, error: Exception, part: str) -> str:
    """Say in one sentence why a part of a checkpoint, such as its tokenizer, cannot be read."""
    text = str(error)
    if _UNTRUSTED in text:
        return (
            f"{spec.model_id} comes with Python code of its own; read it, and if you trust it pass "
            "trust_remote_code=True."
        )
    if _UNKNOWN in text:
        from transformers import __version__

        kind = re.search(r"model type `([^`]+)`", text)
        return (
            f"transformers {__version__} does not know the architecture {f'{kind[1]!r} ' if kind else ''}of "
            f"{spec.model_id}; a newer one may: {pip_install('--upgrade', 'transformers')}"
        )
    if part == "tokenizer":
        return (
            f"{spec.model_id} has no tokenizer that can be read ({reason_of(error)}); copy the model's tokenizer "
            "files into its folder, or install what it needs: pip install sentencepiece tiktoken"
        )
    return f"the {part} of {spec.model_id} cannot be read: {reason_of(error)}"


def reads_text(config: Any) -> bool:
    """Say whether transformers, or the checkpoint's own code, has a causal language model for a config."""
    return has_causal_lm(config.model_type) or _has_code(config, "AutoModelForCausalLM")


def reads_images(config: Any) -> bool:
    """Say whether transformers, or the checkpoint's own code, has a model for a config that reads text and images."""
    return has_image_text_to_text(config.model_type) or _has_code(config, "AutoModelForImageTextToText")


def hears_sounds(config: Any) -> bool:
    """Say whether transformers has a model for a config that takes text and sounds.

    Models that read images too hear where their config has a part for it.
    """
    if has_audio_text_to_text(config.model_type):
        return True
    return has_image_text_to_text(config.model_type) and getattr(config, "audio_config", None) is not None


def _has_code(config: Any, auto_class: str) -> bool:
    return auto_class in (getattr(config, "auto_map", None) or {})


def check_task(spec: LoadSpec, config: Any) -> None:
    """Check that the model of a config does what it is to be loaded for.

    Raises:
        UnsupportedError: If it does not.
    """
    if spec.task == "speech":
        if config.model_type != WHISPER:
            msg = (
                f"{spec.model_id} is a {config.model_type!r} model, and this class takes Whisper models, such as "
                "'openai/whisper-small'."
            )
            raise UnsupportedError(msg)
        return
    takes = reads_text(config) or reads_images(config) or hears_sounds(config)
    if getattr(config, "is_encoder_decoder", False) or not takes:
        msg = (
            f"{spec.model_id} is a {config.model_type!r} model, which does not continue a text by itself; "
            "use a decoder-only language model, such as Llama, Qwen or Mistral."
        )
        raise UnsupportedError(msg)


def warn_of_adapter(spec: LoadSpec) -> None:
    """Log that a checkpoint's folder also holds an adapter, which is not applied unless it is asked for."""
    own = folder_of(spec.model_id) or spec.model_id
    if any((folder_of(source) or source) == own for source in spec.adapters.values()):
        return
    logger.warning(
        "%s holds a whole model and, beside it, an adapter (%s), which is not applied; pass adapter=%r to apply it, or "
        "move these files elsewhere.",
        spec.model_id,
        ADAPTER_CONFIG,
        spec.model_id,
    )
