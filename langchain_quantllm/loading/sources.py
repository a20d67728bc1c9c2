"""Model ids: the folder or file that one names, and the error if that is no checkpoint of a language model.

Other formats, other kinds of models and single files are recognized by names of files and two small JSON files. Imports
the standard library only, so that a wrong path is reported before torch is imported.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from langchain_quantllm.errors import (
    CheckpointError,
    ModelNotFoundError,
    QuantLLMError,
    UnsupportedError,
    closest,
    pip_install,
)
from langchain_quantllm.loading.json_files import json_or_empty

ADAPTER_CONFIG = "adapter_config.json"
"""peft's file with the settings of an adapter."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z")
_HEADS = {
    "ForSequenceClassification": "it classifies texts",
    "ForTokenClassification": "it labels the words of a text",
    "ForQuestionAnswering": "it marks answers in a text",
    "ForMultipleChoice": "it chooses among texts",
    "ForMaskedLM": "it is an encoder, which fills in single masked words",
    "ForPreTraining": "it is an encoder",
    "ForImageClassification": "it classifies images",
    "ForObjectDetection": "it finds objects in images",
    "ForSemanticSegmentation": "it divides images",
    "ForAudioClassification": "it classifies sounds",
    "ForCTC": "it turns speech into text",
    "ForSpeechSeq2Seq": "it turns speech into text",
}
"""Tasks of models that write no text, by the end of their class's name."""

_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of classes that write texts."""

_ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "data2vec-text",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "esm",
        "eurobert",
        "longformer",
        "modernbert",
        "mpnet",
        "new",
        "nomic_bert",
        "rembert",
        "roberta",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Model types of text encoders, which turn a text into vectors."""

WHISPER = "whisper"
"""The model type of the models for speech that are loaded here."""

_SPEECH = frozenset({"whisper", "wav2vec2", "hubert", "wavlm", "moonshine"})

_EMBEDDING = (
    "holds an embedding model, which turns texts into vectors and generates no text; use "
    "QuantizedHuggingFaceEmbeddings for it, and a language model such as Llama, Qwen or Mistral here."
)
_LONGEST_SHOWN = 80
_ADVICE = "use a decoder-only language model, such as Llama, Qwen or Mistral."


def folder_of(model_id: str) -> str | None:
    """Return the absolute folder that a model id means, or None if it names no existing one."""
    try:
        path = _path_of(model_id)
    except ModelNotFoundError:  # check_sources reports it
        return None
    return str(path.resolve()) if path.is_dir() else None


def stored_quantization(model_id: str) -> dict[str, Any] | None:
    """Return the quantization config in a local folder's config.json; None if there is none, or no folder."""
    folder = folder_of(model_id)
    quantization = None if folder is None else json_or_empty(Path(folder) / "config.json").get("quantization_config")
    return quantization if isinstance(quantization, dict) else None


def _path_of(name: str, of: str = "") -> Path:
    """Return a name as a path.

    Raises:
        ModelNotFoundError: If it cannot be one: it is too long, has the home of an unknown user, or is not accessible.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:
        shown = name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}..."
        reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
        msg = f"{shown!r}{of} cannot be a folder ({reason}); check the path, or give a repository on the Hub."
        raise ModelNotFoundError(msg) from error
    return path


def check_sources(
    model_id: str,
    adapters: Mapping[str, str] = MappingProxyType({}),
    *,
    task: str = "text",
    wrong: Callable[[Path], QuantLLMError | None] | None = None,
) -> None:
    """Check a model id and adapters on this disk.

    Args:
        model_id: A folder, or the name of a repository, whose form alone is checked.
        adapters: Folder or repository of each adapter, by its name.
        task: The task of the `LoadSpec`.
        wrong: Returns the error if a folder's files are not those of the model that is wanted; None is `wrong_folder`.

    Raises:
        ModelNotFoundError: If there is no such folder, or no transformers checkpoint in it.
        UnsupportedError: If it holds a model of another task.
        CheckpointError: If it is in a format that transformers does not load.
    """
    for name, source in adapters.items():
        _check_adapter(name, source)
    path = _path_of(model_id)
    if path.is_dir():
        folder = path.resolve()
        if (error := wrong(folder) if wrong is not None else wrong_folder(folder, task=task)) is not None:
            raise error
    elif path.exists():
        raise ModelNotFoundError(_describe_file(path))
    elif "://" in model_id or model_id.startswith(("huggingface.co/", "hf.co/", "www.")):
        parts = model_id.partition("://")[2] or model_id
        name = "/".join(parts.split("/")[1:3])
        msg = f"{model_id} is a URL; give the name of the repository, model_id={name!r}, or a folder."
        raise ModelNotFoundError(msg)
    elif model_id.startswith(("/", "./", "../", "~", ".\\")) or os.path.isabs(model_id) or model_id.count("/") > 1:
        raise ModelNotFoundError(_missing_folder(model_id, path))
    elif re.fullmatch(r"[\w./-]+:[\w.-]+", model_id):
        msg = f"{model_id} is an Ollama model name; give a folder or a repository on the Hub, such as 'Qwen/Qwen3-8B'."
        raise ModelNotFoundError(msg)
    elif Path(model_id).suffix in (".gguf", *_WEIGHTS, *_ARCHIVES):
        msg = f"there is no file {model_id}; check the path, and give a folder or the name of a repository on the Hub."
        raise ModelNotFoundError(msg)


def _check_adapter(name: str, source: str) -> None:
    path = _path_of(source, f" of adapter {name!r}")
    if path.is_dir() and not (path / ADAPTER_CONFIG).is_file():
        msg = f"the folder {source} of adapter {name!r} has no {ADAPTER_CONFIG}; give a folder that peft has saved."
        raise ModelNotFoundError(msg)
    if path.is_file():
        msg = (
            f"adapter {name!r} is the file {source}; give its folder, which has {ADAPTER_CONFIG}: {str(path.parent)!r}."
        )
        raise ModelNotFoundError(msg)
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        msg = f"there is no folder {source} for adapter {name!r}; check the path, or give a repository on the Hub."
        raise ModelNotFoundError(msg)


def _missing_folder(model_id: str, path: Path) -> str:
    msg = f"there is no folder {model_id}"
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        beside = []
    if (meant := closest(path.name, beside)) is not None:
        return f"{msg}; did you mean {path.parent / meant}?"
    return f"{msg}; check the path, or give the name of a repository on the Hub."


def _describe_file(path: Path) -> str:
    """Describe a file that was given instead of a folder, and say what to give."""
    kind = path.suffix.lower()
    if kind == ".gguf":
        return _describe_gguf(path)
    if kind in _ARCHIVES:
        return f"{path} is an archive; unpack it, and give the folder with config.json."
    if kind == ".onnx":
        return f"{path} is a model for ONNX Runtime; give the folder of the checkpoint that it was made of."
    if path.parent.joinpath("config.json").is_file():
        return f"{path} is one file of a checkpoint; give its folder: model_id={str(path.parent)!r}."
    if kind in _WEIGHTS:
        return (
            f"{path} is a file of weights alone; give a folder that has the model's config.json and its tokenizer "
            "beside them."
        )
    return f"{path} is a file; give a folder with config.json, weights and tokenizer."


def _describe_gguf(file: Path) -> str:
    """Describe a GGUF file, with the command that converts it."""
    command = command_line(
        ["langchain-quantllm", "convert", str(file), str(file.with_suffix(""))],
        is_windows=os.name == "nt",
    )
    return (
        f"{file.name} is in llama.cpp's format; convert it once: {command} (it needs "
        f"{pip_install('langchain-quantllm[demo]')}), or give the checkpoint that it was made of."
    )


def command_line(words: Sequence[str], *, is_windows: bool) -> str:
    """Quote a command for the shell of Windows, or those of other systems."""
    return subprocess.list2cmdline(words) if is_windows else shlex.join(words)


def wrong_folder(folder: Path, repository: str | None = None, *, task: str = "text") -> QuantLLMError | None:
    """Return the error if a folder's files are no checkpoint of a task; see `wrong_files`.

    Args:
        folder: The folder.
        repository: Name of the repository that it is a copy of; None for a user's own folder.
        task: The task of the `LoadSpec`.
    """
    files = sorted(os.listdir(folder))
    name, is_local = repository or str(folder), repository is None
    return wrong_files(name, files, lambda file: json_or_empty(folder / file), is_local=is_local, task=task)


def wrong_files(
    name: str,
    files: Collection[str],
    read: Callable[[str], Mapping[str, Any]],
    *,
    is_local: bool = True,
    task: str = "text",
) -> QuantLLMError | None:
    """Return the error if the files of a folder or repository are no checkpoint of a task.

    Args:
        name: The folder or repository.
        files: Names of its files.
        read: Returns the content of one of its JSON files; empty if it cannot be read.
        is_local: Whether it is a folder.
        task: The task of the `LoadSpec`.

    Returns:
        The error, which says what the files are; None if they look like those of a model for the task.
    """
    what = f"the folder {name}" if is_local else name
    if "modules.json" in files and "config_sentence_transformers.json" not in files:
        is_embedding = "sentence_transformers" in json.dumps(read("modules.json"))
    else:
        settings = "config_sentence_transformers.json"
        # A cross-encoder may be made of a model that writes texts; else its config says that it classifies.
        is_embedding = settings in files and read(settings).get("model_type") != "CrossEncoder"
    if is_embedding:
        return UnsupportedError(f"{what} {_EMBEDDING}")
    if "model_index.json" in files:
        return UnsupportedError(f"{what} holds a diffusion model, which makes images; load it with diffusers.")
    weights = [file for file in files if Path(file).suffix in _WEIGHTS]
    ggufs = _ggufs(files)
    is_onnx = any(file.endswith((".onnx", ".onnx_data")) or file.startswith("openvino_model") for file in files)
    if "config.json" not in files:
        return _without_config(name, what, files, read, is_local=is_local)
    if ADAPTER_CONFIG in files and not any(map(_is_model, weights)):  # as trainers save it
        return _adapter_only(name, what, read)
    if not weights and ggufs:
        return _gguf_only(name, ggufs[0], is_local=is_local)
    if not weights and is_onnx:
        return CheckpointError(
            f"{what} holds a model for ONNX or OpenVINO, and no weights for PyTorch; give the checkpoint that it was "
            "made of."
        )
    return _wrong_config(what, read("config.json"), task)


def _without_config(
    name: str, what: str, files: Collection[str], read: Callable[[str], Mapping[str, Any]], *, is_local: bool
) -> QuantLLMError:
    if ADAPTER_CONFIG in files:
        return _adapter_only(name, what, read)
    if ggufs := _ggufs(files):
        return _gguf_only(name, ggufs[0], is_local=is_local)
    if not files:
        return ModelNotFoundError(f"{what} is empty; give a folder with config.json, weights and tokenizer.")
    if is_local and (inner := next((f for f in files if Path(name, f, "config.json").is_file()), None)) is not None:
        return ModelNotFoundError(
            f"{what} has no config.json, but the folder {inner} in it has; write model_id={str(Path(name, inner))!r}."
        )
    if is_local and "snapshots" in files:
        inner = next((str(path.parent) for path in Path(name).glob("snapshots/*/config.json")), None)
        repository = Path(name).name.removeprefix("models--").replace("--", "/")
        hint = f"write model_id={repository!r}" + (f", or model_id={inner!r}." if inner else ".")
        return ModelNotFoundError(f"{what} belongs to the Hub's cache; {hint}")
    if "params.json" in files:
        return CheckpointError(
            f"{what} holds the format of the model's maker; give the one for transformers, or convert it by the "
            "convert_..._to_hf.py of the model in transformers."
        )
    if any(Path(file).suffix in (".onnx", ".mlpackage", ".tflite", ".engine") for file in files):
        return CheckpointError(f"{what} holds a model for another runtime; give the checkpoint that it was made of.")
    if any(Path(file).suffix in _WEIGHTS for file in files):
        return ModelNotFoundError(
            f"{what} has weights but no config.json; copy the model's config.json and tokenizer files into it."
        )
    return ModelNotFoundError(f"{what} has no config.json; is it a transformers checkpoint?")


def _adapter_only(name: str, what: str, read: Callable[[str], Mapping[str, Any]]) -> QuantLLMError:
    base = read(ADAPTER_CONFIG).get("base_model_name_or_path")
    hint = f"write model_id={base!r}, adapter={name!r}." if isinstance(base, str) and base else None
    hint = hint or f"pass the base model as model_id= and adapter={name!r}."
    return ModelNotFoundError(f"{what} holds an adapter, not a model; {hint}")


def _is_model(file: str) -> bool:
    """Say whether a file of weights may be a model's, and is none that trainers save beside an adapter."""
    return Path(file).suffix in (".safetensors", ".bin") and not file.startswith(("adapter_model", "training_args"))


def _ggufs(files: Collection[str]) -> list[str]:
    """List the GGUF files; those that only project images into a model come last."""
    return sorted((f for f in files if f.endswith(".gguf")), key=lambda f: Path(f).name.startswith("mmproj"))


def _gguf_only(name: str, file: str, *, is_local: bool) -> QuantLLMError:
    if is_local:
        return ModelNotFoundError(_describe_gguf(Path(name, file)))
    return ModelNotFoundError(
        f"{name} holds {file}, which is in llama.cpp's format; give the repository that it was made of, or convert the "
        "file once: langchain-quantllm convert FILE FOLDER."
    )


def _wrong_config(what: str, config: Mapping[str, Any], task: str) -> QuantLLMError | None:
    """Return the error if a config.json has another task, or another library's format."""
    if "_class_name" in config:
        return UnsupportedError(
            f"{what} holds a part of a diffusion model, which makes images; load it with diffusers."
        )
    if isinstance(own := config.get("quantization"), Mapping) and {"group_size", "bits"} <= own.keys():
        return CheckpointError(
            f"{what} holds a model for Apple's MLX, which transformers does not load; give the checkpoint that it was "
            "made of, with quantization='nf4' for 4 bits."
        )
    kind = config.get("model_type") if isinstance(config.get("model_type"), str) else None
    if task == "speech":
        if kind == WHISPER:
            return None
        return UnsupportedError(
            f"{what} holds a {kind!r} model, and this class takes Whisper models, such as 'openai/whisper-small'."
        )
    if kind in _SPEECH:
        own = "use QuantizedWhisperParser for it, and here " if kind == WHISPER else "use "
        return UnsupportedError(
            f"{what} holds a {kind!r} model, which turns speech into text; {own}{_ADVICE.removeprefix('use ')}"
        )
    named = config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    code = config.get("auto_map")
    has_code = isinstance(code, dict) and {"AutoModelForCausalLM", "AutoModelForImageTextToText"} & code.keys()
    if has_code or config.get("is_decoder") or any(name.endswith(_WRITERS) for name in names):
        return None
    for name in names:
        for ending, does in _HEADS.items():
            if name.endswith(ending) and not (ending == "ForPreTraining" and kind not in _ENCODERS):
                return UnsupportedError(f"{what} holds a {name}: {does}, and writes no text; {_ADVICE}")
    if kind in _ENCODERS:
        return UnsupportedError(f"{what} {_EMBEDDING}")
    return None
