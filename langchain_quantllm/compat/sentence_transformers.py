"""sentence-transformers: its classes of models, where their numbers are rounded, their prompts and lengths.

sentence-transformers gives all modules of a model the dtype of the transformer, so 16-bit models pool and normalize in
16 bits: the length of a vector is then 0.998 instead of 1. Here everything behind the transformer is in float32.
Source: sentence_transformers/base/model.py of 6.2.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import MissingPackageError, pip_install

_CLASSES = {
    "embedding": "SentenceTransformer",
    "cross_encoder": "CrossEncoder",
    "late_interaction": "MultiVectorEncoder",
}


def check_installed() -> None:
    """Check that a sentence-transformers with all kinds of models is installed.

    Raises:
        MissingPackageError: If there is none, or an old one.
    """
    if not is_installed("sentence_transformers"):
        msg = f"encoders need sentence-transformers: {pip_install('langchain-quantllm[rag]')}"
        raise MissingPackageError(msg)
    from importlib.metadata import version

    from packaging.version import Version

    if Version(found := version("sentence-transformers")) < Version("6.2"):
        msg = (
            f"sentence-transformers {found} is too old, encoders need 6.2: "
            f"{pip_install('--upgrade', 'langchain-quantllm[rag]')}"
        )
        raise MissingPackageError(msg)


def make_model(kind: str, folder: str, options: Mapping[str, Any], pooling: str | None = None) -> Any:
    """Make a model of a folder's files, without asking the Hub.

    Args:
        kind: `"embedding"`, `"cross_encoder"` or `"late_interaction"`.
        folder: The folder.
        options: Arguments of the model's class.
        pooling: The pooling behind the transformer of a folder that names no modules; None lets its files decide.
    """
    import sentence_transformers

    if pooling is None:
        return getattr(sentence_transformers, _CLASSES[kind])(folder, **options, local_files_only=True)
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    code = {"trust_remote_code": options.get("trust_remote_code", False), "local_files_only": True}
    model_kwargs = dict(options.get("model_kwargs") or {})
    transformer = Transformer(
        folder, model_kwargs={**code, **model_kwargs}, processor_kwargs=dict(code), config_kwargs=dict(code)
    )
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
    device = options.get("device") or (model_kwargs.get("device_map") or {}).get("")
    return sentence_transformers.SentenceTransformer(modules=modules, device=device)


def keep_heads_in_float32(model: Any) -> None:
    """Compute everything behind transformers in float32: pooling, projections, normalization, scores."""
    from sentence_transformers.base.modules import InputModule, Module, Router

    for module in model.modules():
        if isinstance(module, InputModule) and not isinstance(module, Router):
            module.register_forward_hook(_cast_outputs)
        elif isinstance(module, Module) and not isinstance(module, Router):
            module.float()
    # A model with a device map is aligned again, to the dtype of the transformer, by its first `encode` otherwise.
    model._modules_placed = True


def _cast_outputs(module: Any, inputs: Any, outputs: Any) -> Any:
    """Cast the floating results of a transformer to float32; a function of a module, so that models can be pickled."""
    if not isinstance(outputs, MutableMapping):  # a dict, or the BatchEncoding that the tokenizer made
        return outputs
    for name, value in list(outputs.items()):
        if name not in ("pixel_values", "attention_mask") and getattr(value, "is_floating_point", bool)():
            outputs[name] = value.float()
    return outputs


def prompts_of(model: Any) -> dict[str, str]:
    """Return a model's prompts by name; those that are not set are left out."""
    return {name: prompt for name, prompt in (model.prompts or {}).items() if prompt}


def default_prompt(model: Any) -> str | None:
    """Return the prompt that a model puts before texts that are neither queries nor documents."""
    return None if model.default_prompt_name is None else prompts_of(model).get(model.default_prompt_name)


def normalizes(model: Any) -> bool:
    """Say whether the model's last module normalizes its vectors."""
    return any(type(module).__name__ == "Normalize" for module in list(model.children())[-1:])


def modalities_of(model: Any) -> tuple[str, ...]:
    """List what a model reads: `"text"`, `"image"`, ..."""
    return tuple(str(modality) for modality in model.modalities if isinstance(modality, str))


def reads(model: Any, modality: str) -> bool:
    """Say whether a model reads `"text"` or `"image"`, by itself or in messages."""
    return bool(model.supports(modality))


def longest_input(model: Any) -> int | None:
    """Return the number of tokens from which on a model cuts texts; None if it does not say."""
    length = model.get_max_seq_length()
    return None if length is None or length > 10**9 else int(length)


def features_of(
    model: Any, items: Sequence[Any], *, prompt: str | None, task: str | None, max_length: int | None
) -> dict[str, Any]:
    """Turn texts or images into a batch of tensors on the model's device.

    Args:
        model: The model.
        items: Texts, pairs of texts, or Pillow images.
        prompt: Put before each text.
        task: `"query"`, `"document"` or None; models with a Router choose their modules by it.
        max_length: Tokens from which on texts are cut; None is the model's own.
    """
    from sentence_transformers.util import batch_to_device

    options: dict[str, Any] = {"task": task} if task is not None else {}
    if max_length is not None:
        options["processing_kwargs"] = {"text": {"max_length": max_length, "truncation": True}}
    return batch_to_device(model.preprocess(list(items), prompt=prompt, **options), model.device)


def quantize_vectors(vectors: Any, precision: str, ranges: Any = None) -> Any:
    """Quantize vectors of shape `(texts, size)`, as sentence-transformers does.

    Args:
        vectors: float32.
        precision: `"int8"`, `"uint8"`, `"binary"` or `"ubinary"`.
        ranges: The smallest and the largest value of each dimension, of shape `(2, size)`, for the first two.
    """
    from sentence_transformers.util.quantization import quantize_embeddings

    return quantize_embeddings(vectors, precision=precision, ranges=ranges)  # type: ignore[arg-type]


def vector_size(model: Any) -> int:
    """Return the number of numbers in a vector of an embedding model."""
    return int(model.get_embedding_dimension())
