"""Finding the files of an encoder, and the error if they are those of another kind of model.

Everything here reads names of files and small JSON files, before torch is imported and a weight is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    ModelNotFoundError,
    QuantLLMError,
    UnsupportedError,
    first_line,
)
from langchain_quantllm.loading.config_checks import check_raw_config
from langchain_quantllm.loading.hub import MissingFileError, Repository
from langchain_quantllm.loading.json_files import json_or_empty, read_json
from langchain_quantllm.loading.sources import check_sources, folder_of
from langchain_quantllm.loading.stored_tensors import read_stored_tensors

MODULES = "modules.json"
"""sentence-transformers' file that lists the modules of a model."""

SETTINGS = "config_sentence_transformers.json"
"""sentence-transformers' file with the kind of a model and its prompts."""

MODEL_TYPES = {
    "SentenceTransformer": "embedding",
    "CrossEncoder": "cross_encoder",
    "MultiVectorEncoder": "late_interaction",
    "ColBERT": "late_interaction",
    "SparseEncoder": "sparse",
}
"""Kinds by the `model_type` of sentence-transformers' settings."""

_USES = {
    "embedding": "an embedding model; use QuantizedHuggingFaceEmbeddings for it",
    "cross_encoder": "a cross-encoder, which scores pairs of texts; use QuantizedCrossEncoder or QuantizedReranker",
    "late_interaction": "a late-interaction model, with a vector for each token; use LateInteractionReranker for it",
    "sparse": "a sparse encoder, whose vectors have a number for each word; use sentence-transformers' SparseEncoder",
}
_WHOLE = ("CLIPModel", "SiglipModel", "Siglip2Model")
"""Ends of the names of classes whose output is the vector of a text or an image already, without pooling."""

_ACTIVATIONS = ("activation_function", "activation_fn", "sbert_ce_default_activation_function")
"""Entries of configs that name a class of Python."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_IGNORED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "onnx/*", "openvino/*", "*.gguf"]
"""Files of a repository that are never loaded; pickles are, where they are allowed."""


@dataclass(frozen=True, kw_only=True)
class EncoderSource:
    """The files of an encoder.

    Args:
        folder: The folder.
        transformer: The folder of its transformer.
        modules: The entries of modules.json; None where a checkpoint of transformers has none.
        config: The config.json of the transformer; empty if it has none.
    """

    folder: Path
    transformer: Path
    modules: tuple[Mapping[str, Any], ...] | None
    config: Mapping[str, Any]


def find_source(spec: EncoderSpec) -> EncoderSource:
    """Find the files of an encoder, from the disk where possible, and check what they are.

    Raises:
        ModelNotFoundError: If there is no such folder or repository, or the Hub cannot be reached.
        UnsupportedError: If it is another kind of model.
        CheckpointError: If its weights are in pickle files or it has code of its own, which the spec refuses, or its
            files are damaged.
        InvalidOptionError: If the spec's pooling is missing, or contradicts the model's own.
    """
    check_sources(spec.model_id, wrong=lambda folder: None)
    local = folder_of(spec.model_id)
    folder = Path(local) if local is not None else _snapshot(spec)
    source = _read(spec, folder)
    for find_error in (_wrong_kind, _wrong_pooling, _pickled, _untrusted):
        if (error := find_error(spec, source)) is not None:
            raise error
    stored = read_stored_tensors(source.transformer)
    check_raw_config(
        source.config,
        source.transformer / "config.json",
        use_safetensors=spec.use_safetensors,
        trust_remote_code=spec.trust_remote_code,
        stored=stored,
    )
    return source


def _read(spec: EncoderSpec, folder: Path) -> EncoderSource:
    names = set(os.listdir(folder))
    if MODULES not in names and "config.json" not in names:
        inner = next((name for name in sorted(names) if (folder / name / "config.json").is_file()), None)
        hint = f"; the folder {inner} in it has, write model_id={str(folder / inner)!r}." if inner else "."
        msg = f"{spec.model_id} has neither {MODULES} nor config.json{hint}"
        raise ModelNotFoundError(msg)
    modules = None
    if MODULES in names:
        modules = _read_modules(folder / MODULES)
    first = folder / str(modules[0].get("path", "")) if modules else folder
    config = json_or_empty(first / "config.json")
    return EncoderSource(folder=folder, transformer=first, modules=modules, config=config)


def _read_modules(file: Path) -> tuple[Mapping[str, Any], ...]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{file} cannot be read ({first_line(error)}); get the model's files again."
        raise CheckpointError(msg) from error
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        msg = f"{file} is not sentence-transformers' list of modules; get the model's files again."
        raise CheckpointError(msg)
    for entry in content:
        path = Path(str(entry.get("path", "")))
        if path.is_absolute() or ".." in path.parts:
            msg = f"{file} names the folder {str(path)!r} outside of the model's; get the model's files again."
            raise CheckpointError(msg)
    return tuple(content)


def _wrong_kind(spec: EncoderSpec, source: EncoderSource) -> QuantLLMError | None:
    """Return the error if the files are those of another kind of model."""
    names = [str(name) for name in source.config.get("architectures") or ()]
    name = names[0] if names else ""
    if source.modules is not None:
        settings = json_or_empty(source.folder / SETTINGS)
        found = MODEL_TYPES.get(str(settings.get("model_type", "SentenceTransformer")), "embedding")
        if found == spec.kind:
            return None
        return UnsupportedError(f"{spec.model_id} is {_USES[found]}.")
    if spec.kind == "cross_encoder":
        if name.endswith("ForSequenceClassification"):
            return None
        if name.endswith(("ForCausalLM", "ForConditionalGeneration")):
            return UnsupportedError(f"{spec.model_id} is a language model ({name}), which has no classifier.")
        return UnsupportedError(
            f"{spec.model_id} has no classifier ({name or 'its config.json names no class'}), so its scores would be "
            "random; give a cross-encoder, such as cross-encoder/ms-marco-MiniLM-L6-v2."
        )
    if name.endswith("ForSequenceClassification"):
        return UnsupportedError(f"{spec.model_id} is {_USES['cross_encoder']}.")
    if spec.kind == "late_interaction":
        if name.endswith(("ColBERT", "ForRetrieval")):
            return None
        return UnsupportedError(
            f"{spec.model_id} is no late-interaction model: it has no {MODULES}, so its projection would be random."
        )
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) and spec.pooling is None:
        return UnsupportedError(
            f"{spec.model_id} is a language model ({name}), which writes texts and was not trained to embed them; use "
            "ChatQuantizedHuggingFace or QuantizedHuggingFaceLLM for it, or pass pooling='lasttoken' if you know that "
            "it embeds."
        )
    if name.endswith(("ForSpeechSeq2Seq", "WhisperForConditionalGeneration", "ForCTC", "ForImageClassification")):
        return UnsupportedError(f"{spec.model_id} is a {name}, which does not embed texts; give an embedding model.")
    return None


def _wrong_pooling(spec: EncoderSpec, source: EncoderSource) -> QuantLLMError | None:
    """Return the error if it is not clear how vectors of tokens become the vector of a text."""
    if spec.kind != "embedding":
        if spec.pooling is not None:
            return InvalidOptionError(f"pooling={spec.pooling!r} has no meaning for this kind of model; leave it out.")
        return None
    if source.modules is None:
        name = str(next(iter(source.config.get("architectures") or ()), ""))
        if name.endswith(_WHOLE):
            if spec.pooling is None:
                return None
            return InvalidOptionError(
                f"pooling={spec.pooling!r} has no meaning for {spec.model_id}, a {name} with one vector for each text "
                "and picture; leave it out."
            )
        if spec.pooling is None:
            return InvalidOptionError(
                f"{spec.model_id} does not say how the vectors of its tokens become the vector of a text: it has no "
                f"{MODULES}. Look at its model card, and pass pooling='mean' (which sentence-transformers assumes), "
                "'cls' or 'lasttoken'."
            )
        return None
    own = own_pooling(source)
    if spec.pooling is not None and spec.pooling != own:
        has = f"the model's own is {own!r}" if own else "the model has no pooling of the usual kind"
        return InvalidOptionError(f"pooling={spec.pooling!r} contradicts {spec.model_id}: {has}; leave it out.")
    return None


def own_pooling(source: EncoderSource) -> str | None:
    """Return the pooling that the model's files name; None if they name none."""
    for entry in source.modules or ():
        if str(entry.get("type", "")).endswith(".Pooling"):
            config = json_or_empty(source.folder / str(entry.get("path", "")) / "config.json")
            mode = config.get("pooling_mode")
            if isinstance(mode, str):
                return mode
            set_modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
            names = [key.removeprefix("pooling_mode_").removesuffix("_tokens") for key in set_modes]
            return {"cls_token": "cls"}.get(names[0], names[0]) if len(names) == 1 else None
    return None


def _pickled(spec: EncoderSpec, source: EncoderSource) -> QuantLLMError | None:
    """Return the error if a module's weights are in pickle files alone, and these are refused."""
    if not spec.use_safetensors:
        return None
    folders = [source.folder / str(entry.get("path", "")) for entry in source.modules or ({},)]
    for folder in folders:
        files = sorted(os.listdir(folder)) if folder.is_dir() else []
        if any(file.endswith(".safetensors") for file in files):
            continue
        pickles = [f for f in files if f.endswith(_PICKLES) and not f.startswith(("training_args", "optimizer"))]
        if pickles:
            where = folder.relative_to(source.folder) / pickles[0]
            return CheckpointError(
                f"{spec.model_id} has weights in {where} alone, and pickle files can run code while they load; convert "
                "it to safetensors, or pass use_safetensors=False if you trust its maker."
            )
    return None


def _untrusted(spec: EncoderSpec, source: EncoderSource) -> QuantLLMError | None:
    """Return the error if the files name code that is not sentence-transformers' or torch's, and it is not trusted.

    sentence-transformers refuses such modules, but replaces an activation by another one, with a warning.
    """
    if spec.trust_remote_code:
        return None
    entries = source.modules or ()
    code = [str(entry.get("type", "")) for entry in entries]
    code = [name for name in code if not name.startswith("sentence_transformers.")]
    configs = [json_or_empty(source.folder / str(entry.get("path", "")) / "config.json") for entry in entries]
    inner = source.config.get("sentence_transformers")
    configs += [dict(source.config), json_or_empty(source.folder / SETTINGS), inner if isinstance(inner, dict) else {}]
    for config in configs:
        named = [config[key] for key in _ACTIVATIONS if isinstance(config.get(key), str)]
        # A name without a dot is transformers' own, as in GPT-2's config; nothing can be imported by it.
        code += [name for name in named if "." in name and not name.startswith("torch.nn.")]
    if not code:
        return None
    return CheckpointError(
        f"{spec.model_id} names Python code that is not sentence-transformers' own ({code[0]}); read it, and if you "
        "trust its maker pass trust_remote_code=True."
    )


def _snapshot(spec: EncoderSpec) -> Path:
    """Return the folder of a repository's files in the Hub's cache; download what is missing."""
    repository = Repository.of(spec)  # type: ignore[arg-type]  # it has the fields that are read
    if spec.local_files_only is not False:
        for name in (MODULES, "config.json"):
            cached = repository.cached(name)
            if cached is not None and _is_complete(cached.parent):
                return cached.parent
    try:
        repository.fetch(MODULES, check_connection=True)
    except MissingFileError:
        repository.fetch("config.json", check_connection=True)
    from huggingface_hub import snapshot_download

    ignored = _IGNORED if spec.use_safetensors else [name for name in _IGNORED if not name.startswith("*.bin")]
    try:
        return Path(
            snapshot_download(
                spec.model_id,
                revision=spec.revision,
                token=spec.token,
                cache_dir=spec.cache_dir,
                ignore_patterns=ignored,
            )
        )
    except Exception as error:
        msg = f"the files of {spec.model_id} could not be downloaded ({first_line(error)}); check the connection."
        raise ModelNotFoundError(msg) from error


def _is_complete(folder: Path) -> bool:
    """Say whether a copy of a repository has the weights of its transformer, as far as the names of files tell."""
    modules = json_list(folder / MODULES)
    first = folder / str(modules[0].get("path", "")) if modules else folder
    index = first / "model.safetensors.index.json"
    if index.is_file():
        shards = set(dict(read_json(index).get("weight_map") or {}).values())
        return all((first / shard).is_file() for shard in shards)
    # Modules without settings, such as Normalize, have no file, and so no folder in a copy.
    needed = [m for m in modules if str(m.get("type", "")).endswith((".Dense", ".Pooling"))]
    return any(first.glob("*.safetensors")) and all((folder / str(m.get("path", ""))).is_dir() for m in needed)


def json_list(file: Path) -> list[dict[str, Any]]:
    """Read a JSON file with a list of dicts; empty if there is none."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
