"""Reading a checkpoint's weights into a transformers pipeline.

Calls `from_pretrained`, checks that its result is the checkpoint's model, and reports each error in one sentence.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.accelerate import has_device_map
from langchain_quantllm.compat.bitsandbytes import filter_cast_warnings, keep_odd_layers_unpacked, shape_of
from langchain_quantllm.compat.library_logging import progress_bars
from langchain_quantllm.compat.transformers_auto import has_applied_adapter, without_adapter
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    NotEnoughMemoryError,
    QuantLLMError,
    first_line,
)
from langchain_quantllm.loading.checkpoint import Checkpoint, explain, reads_images
from langchain_quantllm.loading.devices import devices_named, release_memory
from langchain_quantllm.loading.experts import read_experts
from langchain_quantllm.loading.foreign_errors import as_checkpoint_error
from langchain_quantllm.loading.hub import hub_options
from langchain_quantllm.loading.packed_experts import PackedExperts
from langchain_quantllm.loading.processors import load_processor
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.loading.stored_tensors import INDEX, read_index
from langchain_quantllm.loading.tokenizer_files import check_tokenizer_files
from langchain_quantllm.memory import model_build_lock
from langchain_quantllm.schemes import AWQ, GPTQ, scheme_of_config


def load_pipeline(
    spec: LoadSpec,
    checkpoint: Checkpoint,
    quantization_config: Any,
    device_map: Any,
    experts: PackedExperts | None = None,
) -> Any:
    """Read a checkpoint's weights and tokenizer into a pipeline.

    Its task is automatic-speech-recognition for a spec of that task; image-text-to-text, with a processor, if the
    model reads images and they can be read here; any-to-any, with a processor, if it hears sounds and reads no images;
    else text-generation.

    Args:
        spec: The options of loading.
        checkpoint: The checkpoint.
        quantization_config: For `from_pretrained`; None to use the checkpoint's own.
        device_map: The device map of the model.
        experts: The experts that the checkpoint has packed.

    Raises:
        CheckpointError: If weights, tokenizer or processor are missing, damaged or of another shape.
        InvalidOptionError: If neither transformers nor the model knows a name in `model_kwargs`.
        MissingPackageError: If transformers needs a package that is not installed.
        NotEnoughMemoryError: If the memory runs out while loading.
    """
    from transformers import pipeline

    quantization_config = read_experts(checkpoint, quantization_config)
    options = {
        **hub_options(spec, checkpoint.source if checkpoint.local else None),
        "dtype": _dtype(spec, checkpoint, device_map),
        "device_map": copy.copy(device_map),  # accelerate writes into both
        "max_memory": copy.copy(spec.max_memory),
        "attn_implementation": spec.attn_implementation,
        "quantization_config": quantization_config,
    }
    options = {name: value for name, value in options.items() if value is not None}
    with progress_bars(spec.progress):
        task, auto_class, parts = _load_parts(spec, checkpoint)
        with model_build_lock(), _loading_errors(spec, checkpoint.source):
            model, info = (experts or auto_class).from_pretrained(
                checkpoint.source,
                config=checkpoint.config,
                use_safetensors=spec.use_safetensors or None,
                output_loading_info=True,
                **options,
                **checkpoint.model_kwargs,
                **without_adapter(),
            )
    if has_applied_adapter(model):
        msg = f"an adapter beside the weights of {spec.model_id} was applied to them; move its files elsewhere."
        raise CheckpointError(msg)
    _check_complete(spec, checkpoint, model, info)
    model.eval()
    filter_cast_warnings(model)
    keep_odd_layers_unpacked(model)
    # Without a device, a pipeline moves a model to the first GPU, unless the model has a device map.
    device = None if has_device_map(model) else model.device
    return pipeline(task, model=model, device=device, **parts)


def _load_parts(spec: LoadSpec, checkpoint: Checkpoint) -> tuple[str, Any, dict[str, Any]]:
    """Load what a pipeline has beside the model.

    Returns:
        The task of the pipeline, the auto class of its model, and its other parts by their names.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForSpeechSeq2Seq,
    )

    if spec.task == "speech":
        parts = {"tokenizer": load_tokenizer(spec, checkpoint), "feature_extractor": _load_features(spec, checkpoint)}
        return "automatic-speech-recognition", AutoModelForSpeechSeq2Seq, parts
    try:
        processor = load_processor(spec, checkpoint)
    except CheckpointError:
        load_tokenizer(spec, checkpoint)  # its error says more if the tokenizer is the reason
        raise
    if processor is None:
        return "text-generation", AutoModelForCausalLM, {"tokenizer": load_tokenizer(spec, checkpoint)}
    if reads_images(checkpoint.config):
        return "image-text-to-text", AutoModelForImageTextToText, {"processor": processor}
    return "any-to-any", AutoModelForMultimodalLM, {"processor": processor}


def _load_features(spec: LoadSpec, checkpoint: Checkpoint) -> Any:
    from transformers import AutoFeatureExtractor

    hub = hub_options(spec, checkpoint.source if checkpoint.local else None)
    with as_checkpoint_error(lambda error: explain(spec, error, "feature extractor")):
        return AutoFeatureExtractor.from_pretrained(checkpoint.source, **hub)


def load_tokenizer(spec: LoadSpec, checkpoint: Checkpoint) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        CheckpointError: If it has none that can be read.
    """
    from transformers import AutoTokenizer

    hub = hub_options(spec, checkpoint.source if checkpoint.local else None)
    with as_checkpoint_error(lambda error: explain(spec, error, "tokenizer")):
        if checkpoint.local:
            check_tokenizer_files(Path(checkpoint.source))
        return AutoTokenizer.from_pretrained(checkpoint.source, **hub)


def _dtype(spec: LoadSpec, checkpoint: Checkpoint, device_map: Any) -> Any:
    """Return the dtype to load in.

    On the CPU, GPTQ and AWQ checkpoints are loaded in bfloat16: their own float16 is ten times slower in its kernels.
    """
    import torch

    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)
    stored = checkpoint.quantization and scheme_of_config(checkpoint.quantization)
    if isinstance(stored, GPTQ | AWQ) and devices_named(device_map, spec.max_memory)[:1] == ["cpu"]:
        return torch.bfloat16
    return "auto"


def _check_complete(spec: LoadSpec, checkpoint: Checkpoint, model: Any, info: Any) -> None:
    """Check that every tensor of a model was in the checkpoint's files, in the shape of its config."""
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    for name, module in model.named_modules():  # transformers does not check the shapes of bitsandbytes' weights
        if shape_of(module) not in (None, (getattr(module, "out_features", 0), getattr(module, "in_features", 0))):
            missing.add(f"{name}.weight")
    if missing:
        saved = ", ".join(getattr(checkpoint.config, "architectures", None) or ())
        msg = (
            f"the checkpoint {spec.model_id} lacks matching weights for {len(missing)} tensors (for example "
            f"{min(missing)!r}), which would have been initialized at random; is it complete, and of this "
            f"architecture{saved and f' ({saved})'}?"
        )
        raise CheckpointError(msg)


@contextlib.contextmanager
def _loading_errors(spec: LoadSpec, source: str) -> Iterator[None]:
    """Turn errors of transformers, torch and safetensors into this package's, where their message does not help."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        release_memory()
        msg = (
            f"the device ran out of memory while loading {spec.model_id}; use a scheme of fewer bits, "
            "device_map='auto' to spread it over several devices, or free what other programs hold."
        )
        raise NotEnoughMemoryError(msg) from error
    except SafetensorError as error:
        msg = f"a weight file of {spec.model_id} is damaged ({first_line(error)}); download it again."
        raise CheckpointError(msg) from error
    except ImportError as error:
        msg = f"{spec.model_id} cannot be loaded without a package: {str(error).strip()}"
        raise MissingPackageError(msg) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        name = str(error).rpartition("argument ")[2].strip("'")
        msg = (
            f"model_kwargs has {name!r}, which neither transformers' from_pretrained nor this model takes; leave it "
            "out."
        )
        raise InvalidOptionError(msg) from error
    except (RuntimeError, ValueError, OSError) as error:
        clearer = _clearer_error(spec, source, error)
        if clearer is None:
            raise
        raise clearer from error


def _clearer_error(spec: LoadSpec, source: str, error: Exception) -> QuantLLMError | None:
    """Return this package's error for one of transformers; None if its own message is clear."""
    text = str(error)
    name = spec.model_id
    if "trust_remote_code" in text:
        return CheckpointError(explain(spec, error, "model"))
    if "dispatched on the CPU" in text:
        return NotEnoughMemoryError(
            f"{name} does not fit on the GPUs in this scheme, and modules on the CPU were not allowed; use fewer "
            "bits, or Int8(fp32_cpu_offload=True) with device_map='auto' to keep the rest on the CPU in float32."
        )
    if "ignore_mismatched_sizes" in text:
        return CheckpointError(
            f"the weights of {name} have other shapes than its config says, and would have been random; is it "
            "complete, and of this architecture?"
        )
    if isinstance(error, OSError) and (missing := _missing_shard(source)):
        return CheckpointError(f"{name} lacks {missing}, which its index names; get the checkpoint again.")
    if isinstance(error, OSError) and "safetensors" in text and not any(Path(source).glob("*.safetensors")):
        return CheckpointError(
            f"{name} has no weights in safetensors, and pickle files can run code while they load; convert it, or pass "
            "use_safetensors=False if you trust its maker."
        )
    return None


def _missing_shard(folder: str) -> str | None:
    index = Path(folder) / INDEX
    if not index.is_file():
        return None
    shards = sorted(set(read_index(index)["weight_map"].values()))
    return next((shard for shard in shards if not (index.parent / shard).is_file()), None)
