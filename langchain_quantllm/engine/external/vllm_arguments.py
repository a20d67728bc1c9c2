"""The translation into vLLM's terms: a model's fields into arguments of its engine, a request into sampling parameters.

Knows no process and no event loop, and imports nothing of vLLM.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

from langchain_quantllm.compat.versions import installed_version
from langchain_quantllm.compat.vllm import LORA_RANKS, vllm_version
from langchain_quantllm.engine.external.spec import EngineSource
from langchain_quantllm.engine.external.vllm_options import VLLMOptions
from langchain_quantllm.engine.request import Request
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, MissingPackageError, UnsupportedError
from langchain_quantllm.options import BASE_ADAPTER
from langchain_quantllm.schemes import GPTQ, Int8, Scheme, Unquantized, scheme_of_config

BITSANDBYTES_PLUGIN = "vllm-bnb-plugin"
"""The package that reads bitsandbytes' weights; vLLM itself does so before `_WITHOUT_BITSANDBYTES`."""

_WITHOUT_BITSANDBYTES = "0.28"
_GPTQ_BITS = (4, 8)
_QUANTIZE = "quantize it to GPTQ once, langchain-quantllm quantize MODEL -o FOLDER, and give that folder"

_GIVEN = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "distributed_executor_backend",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_seqs",
    "enforce_eager",
)
_NODES = ("nnodes", "master_addr", "master_port")

FITTED_LENGTH = -1
"""`max_model_len` that is the model's, or what the KV cache holds if that is less."""


def engine_arguments(options: VLLMOptions, source: EngineSource) -> dict[str, Any]:
    """Write the arguments of vLLM's engine.

    Args:
        options: The options of the engine.
        source: The model.

    Raises:
        CheckpointError: If vLLM cannot read the weights in the scheme that is asked for.
        MissingPackageError: If it needs a package for that.
        UnsupportedError: If an adapter is larger than it takes.
    """
    given = {name: value for name in _GIVEN if (value := getattr(options, name)) is not None}
    if options.nnodes > 1:
        given |= {name: value for name in _NODES if (value := getattr(options, name)) is not None}
        given |= {"node_rank": 0, "distributed_executor_backend": "mp"}
    if options.engine_args.get("max_logprobs") is None:
        given["max_logprobs"] = -1  # as many as a call asks for
    return {
        "model": _model(source),
        "dtype": source.dtype,
        "revision": source.revision,
        "tokenizer_revision": source.revision,
        "hf_token": source.token,
        "download_dir": source.cache_dir,
        "trust_remote_code": source.trust_remote_code,
        "max_model_len": FITTED_LENGTH if options.max_model_len is None else options.max_model_len,
        "scheduling_policy": "priority",
        "disable_log_stats": True,
        **given,
        **_quantization(options, source),
        **_adapters(source),
        **options.engine_args,
    }


def _model(source: EngineSource) -> str:
    """Return the folder with the weights; the repository if only some of its files are here, for vLLM to load."""
    folder = Path(source.checkpoint)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return source.model_id
    return source.checkpoint


def _quantization(options: VLLMOptions, source: EngineSource) -> dict[str, Any]:
    """Check that vLLM reads the weights in the scheme that is asked for; it finds a stored one by itself."""
    scheme, stored = source.scheme, source.stored_quantization
    if stored is not None:
        _check_stored(options, source, scheme_of_config(stored))
        return {}
    if scheme is None or scheme == Unquantized():
        return {}
    if "bitsandbytes" not in scheme.packages:
        what = "is calibrated" if scheme.calibrated else "is not vLLM's"
        msg = f"{source.model_id} is not quantized, and quantization={scheme.name!r} {what}: {_QUANTIZE}."
        raise CheckpointError(msg)
    if isinstance(scheme, Int8) or scheme.name != "nf4" or scheme != type(scheme)():
        msg = f"vLLM quantizes to plain nf4 alone while it loads, not to {scheme.to_dict()!r}: {_QUANTIZE}."
        raise CheckpointError(msg)
    _check_bitsandbytes(source, stored=False)
    return {"quantization": "bitsandbytes"}


def _check_stored(options: VLLMOptions, source: EngineSource, stored: Scheme) -> None:
    scheme = source.scheme
    if scheme is not None and scheme.name != stored.name:
        msg = (
            f"{source.model_id} is quantized already, by {stored.name}, so quantization={scheme.name!r} is not "
            "possible; leave it out."
        )
        raise CheckpointError(msg)
    if isinstance(stored, GPTQ) and (not {*stored.layer_bits} <= {*_GPTQ_BITS} or not stored.sym):
        bits = " and ".join(map(str, stored.layer_bits))
        msg = (
            f"{source.model_id} has GPTQ weights of {bits} bits, {stored.to_dict()!r}; vLLM reads "
            "symmetric ones of 4 or 8 bits. Quantize the original again so, or use engine='auto'."
        )
        raise CheckpointError(msg)
    if "bitsandbytes" in stored.packages:
        if options.tensor_parallel_size > 1:
            msg = (
                f"{source.model_id} is quantized by bitsandbytes already, and vLLM does not divide such weights: use "
                f"tensor_parallel_size=1, or take the original and {_QUANTIZE}."
            )
            raise CheckpointError(msg)
        _check_bitsandbytes(source, stored=True)


def _check_bitsandbytes(source: EngineSource, *, stored: bool) -> None:
    version = vllm_version()
    inside = version is not None and Version(Version(version).public) < Version(_WITHOUT_BITSANDBYTES)
    if not inside and installed_version(BITSANDBYTES_PLUGIN) is None:
        what = (
            "has weights of bitsandbytes"
            if stored
            else f"cannot be quantized to {source.scheme and source.scheme.name}"
        )
        msg = (
            f"{source.model_id} {what}: vLLM {version} does that with a plugin alone, pip install "
            f"{BITSANDBYTES_PLUGIN}. Better, {'take the original and ' if stored else ''}{_QUANTIZE}."
        )
        raise MissingPackageError(msg)


def _adapters(source: EngineSource) -> dict[str, Any]:
    """Write the arguments about adapters: all of them at once, of the largest rank among them."""
    if not source.adapters:
        return {}
    ranks = {name: _rank(name, folder) for name, folder in source.adapters.items()}
    largest = max(ranks, key=lambda name: ranks[name])
    fitting = [rank for rank in LORA_RANKS if rank >= ranks[largest]]
    if not fitting:
        msg = (
            f"adapter {largest!r} has rank {ranks[largest]}, and vLLM takes {LORA_RANKS[-1]} at most; use "
            "engine='auto', or merge it: langchain-quantllm merge MODEL ADAPTER."
        )
        raise UnsupportedError(msg)
    # One place more than adapters, which stays zero: on CPUs, a row without an adapter that runs beside rows with one
    # reads the last place, by the index -1. Source: bgmv_expand in vllm/lora/ops/torch_ops/lora_ops.py of 0.32.
    return {"enable_lora": True, "max_loras": len(ranks) + 1, "max_lora_rank": fitting[0]}


def _rank(name: str, folder: str) -> int:
    """Read the largest rank of an adapter's matrices."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    kind = config.get("peft_type")
    unknown = [key for key in ("use_dora", "modules_to_save", "lora_bias") if config.get(key)]
    if kind != "LORA" or unknown or config.get("bias", "none") != "none":
        what = f"peft_type={kind!r}" if kind != "LORA" else f"{(unknown or ['bias'])[0]} set"
        msg = (
            f"adapter {name!r} has {what}, and vLLM runs plain LoRA alone; use engine='auto', or merge it into the "
            "model: langchain-quantllm merge MODEL ADAPTER."
        )
        raise UnsupportedError(msg)
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def sampling_arguments(request: Request, eos_token_ids: tuple[int, ...]) -> dict[str, Any]:
    """Write a request's sampling parameters.

    vLLM's own end tokens are off, since a call may name others; those of the request are stop tokens. A text of a form
    ends at the model's end tokens as well, which an automaton may choose when it is complete.

    Args:
        request: The request.
        eos_token_ids: The model's own end tokens.
    """
    options = request.options
    ends = () if options.ignore_eos else request.end_token_ids
    if request.form is not None:
        ends += eos_token_ids
    given: dict[str, Any] = {
        "max_tokens": request.max_new_tokens,
        "min_tokens": 0 if options.ignore_eos else request.min_new_tokens,
        "ignore_eos": True,
        "stop_token_ids": list(dict.fromkeys(ends)),
        "repetition_penalty": options.repetition_penalty,
        "temperature": 0.0,
    }
    if options.do_sample:
        given |= {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "seed": request.random_numbers().getrandbits(63),
        }
    if options.logprobs is not None:
        given |= (
            {"logprob_token_ids": list(request.reported_ids)}
            if request.reported_ids
            else {"logprobs": options.logprobs}
        )
    return given


def prompt_of(request: Request) -> dict[str, Any]:
    """Write a request's prompt, with the salt under which its KV cache is shared; one of its own shares nothing."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_ids)}
    salt = request.options.cache_salt if request.shares_prefix else secrets.token_hex(16)
    return prompt if salt is None else {**prompt, "cache_salt": salt}


def check_names(given: Mapping[str, Any], known: frozenset[str]) -> None:
    """Check the names of further arguments of vLLM's engine.

    Raises:
        InvalidOptionError: If the installed version does not know one.
    """
    from langchain_quantllm.errors import closest

    for name in given:
        if name not in known:
            meant = closest(name, known)
            hint = f"; did you mean {meant!r}?" if meant else "; its documentation lists them as engine arguments."
            msg = f"VLLM(engine_args={{{name!r}: ...}}) is not an argument of vLLM {vllm_version()}{hint}"
            raise InvalidOptionError(msg)


def adapter_of(request: Request) -> str | None:
    """Return the name of a request's adapter; None for the model as it is."""
    name = request.options.adapter
    return None if name == BASE_ADAPTER else name
