"""The options of `VLLM`, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from langchain_quantllm.compat.vllm import vllm_version
from langchain_quantllm.engine.external.spec import ExternalEngine
from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.options import GenerationOptions

BACKENDS = ("mp", "ray", "uni")
"""vLLM's ways to start its workers: processes of this machine, Ray's, or none beside its engine's process."""

MOST_TEMPERATURE = 2.0
"""vLLM refuses higher temperatures. Source: SamplingParams._verify_args in vllm/sampling_params.py."""

OWN_ARGUMENTS: Mapping[str, str] = {
    "model": "model_id= of the model",
    "tokenizer": "model_id= of the model; the tokenizer is the checkpoint's",
    "dtype": "dtype= of the model",
    "quantization": "quantization= of the model",
    "revision": "revision= of the model",
    "tokenizer_revision": "revision= of the model",
    "hf_token": "token= of the model",
    "download_dir": "cache_dir= of the model",
    "trust_remote_code": "trust_remote_code= of the model",
    "skip_tokenizer_init": "nothing: vLLM's automata need the tokenizer",
    "node_rank": "nothing: this process is rank 0; the others are started by vllm serve --headless",
    "enable_lora": "adapters= of the model",
    "scheduling_policy": "nothing: it is 'priority', for priority= of calls",
    "runner": "nothing: texts are generated",
}
"""Arguments of vLLM's engine that follow from the model's fields, each with the field."""


@dataclass(frozen=True, kw_only=True)
class VLLMOptions(ExternalEngine):
    """The options of `VLLM`, which has their meaning, with their checks."""

    name: ClassVar[str] = "vllm"
    reads_adapters: ClassVar[bool] = True
    _MEANT: ClassVar[Mapping[str, str]] = {
        "tp": "tensor_parallel_size",
        "tp_size": "tensor_parallel_size",
        "pp": "pipeline_parallel_size",
        "pp_size": "pipeline_parallel_size",
        "backend": "distributed_executor_backend",
        "max_length": "max_model_len",
        "context_length": "max_model_len",
        "kv_cache_memory": "kv_cache_memory_bytes",
        "vllm_kwargs": "engine_args",
        "engine_kwargs": "engine_args",
        "nodes": "nnodes",
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        **ExternalEngine.REFUSED,
        "device": "as it takes the devices that it sees; name them in CUDA_VISIBLE_DEVICES",
        "device_map": "as it spreads the weights itself; say how in VLLM(tensor_parallel_size=...)",
        "kv_cache_memory": "as its KV cache is its own; write VLLM(kv_cache_memory_bytes=...)",
        "kv_cache_dtype": "as its KV cache is its own; write VLLM(engine_args={'kv_cache_dtype': ...})",
        "model_kwargs": "which are of transformers' from_pretrained; vLLM's own go into VLLM(engine_args={...})",
    }

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    nnodes: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    max_num_seqs: int | None = None
    enforce_eager: bool = False
    engine_args: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check the options."""
        for option in ("tensor_parallel_size", "pipeline_parallel_size", "nnodes"):
            self._check_count(option)
        for option in ("master_port", "max_model_len", "kv_cache_memory_bytes", "max_num_seqs"):
            if getattr(self, option) is not None:
                self._check_count(option)
        if self.distributed_executor_backend not in (None, *BACKENDS):
            backend = self.distributed_executor_backend
            msg = f"VLLM(distributed_executor_backend={backend!r}) is not known{nearest(str(backend), BACKENDS)}"
            raise InvalidOptionError(msg)
        share = self.gpu_memory_utilization
        if share is not None and (not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1):
            msg = f"VLLM(gpu_memory_utilization={share!r}) is not allowed; it must be a number above 0 and up to 1."
            raise InvalidOptionError(msg)
        if not isinstance(self.enforce_eager, bool):
            msg = f"VLLM(enforce_eager={self.enforce_eager!r}) is not allowed; it must be True or False."
            raise InvalidOptionError(msg)
        self._check_nodes()
        self._check_engine_args()

    def _check_count(self, option: str) -> None:
        value = getattr(self, option)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            msg = f"VLLM({option}={value!r}) is not allowed; it must be a whole number of at least 1."
            raise InvalidOptionError(msg)

    def _check_nodes(self) -> None:
        workers = self.tensor_parallel_size * self.pipeline_parallel_size
        if self.distributed_executor_backend == "uni" and workers > 1:
            msg = (
                f"VLLM(distributed_executor_backend='uni') runs one worker, and tensor_parallel_size="
                f"{self.tensor_parallel_size} and pipeline_parallel_size={self.pipeline_parallel_size} take {workers}; "
                "use 'mp' or 'ray'."
            )
            raise InvalidOptionError(msg)
        if self.nnodes == 1:
            if self.master_addr is not None or self.master_port is not None:
                msg = "VLLM(master_addr=..., master_port=...) are for nnodes= of at least 2; leave them out."
                raise InvalidOptionError(msg)
            return
        if self.distributed_executor_backend not in (None, "mp"):
            msg = (
                f"VLLM(nnodes={self.nnodes}) is vLLM's own way, without Ray: leave distributed_executor_backend="
                f"{self.distributed_executor_backend!r} out; with Ray, leave nnodes out."
            )
            raise InvalidOptionError(msg)
        if not isinstance(self.master_addr, str) or not self.master_addr:
            msg = (
                f"VLLM(nnodes={self.nnodes}) needs master_addr=, the address of this machine for the others, such as "
                "'10.0.0.1'."
            )
            raise InvalidOptionError(msg)
        if workers % self.nnodes:
            msg = (
                f"VLLM(nnodes={self.nnodes}) cannot divide {workers} workers (tensor_parallel_size times "
                "pipeline_parallel_size) evenly; choose sizes whose product it divides."
            )
            raise InvalidOptionError(msg)

    def _check_engine_args(self) -> None:
        given = self.engine_args
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            msg = f"VLLM(engine_args={given!r}) is not allowed; it must be a dict of vLLM's arguments by name."
            raise InvalidOptionError(msg)
        object.__setattr__(self, "engine_args", dict(given))
        own = {f.name for f in fields(self)}
        for name in given:
            if name in OWN_ARGUMENTS:
                msg = f"VLLM(engine_args={{{name!r}: ...}}) is not possible; use {OWN_ARGUMENTS[name]}."
                raise InvalidOptionError(msg)
            if name in own:
                msg = f"VLLM(engine_args={{{name!r}: ...}}) has an option of its own; write VLLM({name}=...)."
                raise InvalidOptionError(msg)

    def check_options(self, options: GenerationOptions) -> None:
        """Refuse options of a call that vLLM does not carry out.

        Raises:
            InvalidOptionError: If there is one.
        """
        super().check_options(options)
        if options.do_sample and options.temperature > MOST_TEMPERATURE:
            msg = (
                f"temperature={options.temperature!r} is not possible with engine=VLLM(...), which takes "
                f"{MOST_TEMPERATURE:g} at most; lower it, or use engine='auto'."
            )
            raise InvalidOptionError(msg)

    @property
    def place(self) -> str:
        """Where the weights are, in words."""
        return "in vLLM's processes"

    def identity(self) -> dict[str, Any]:
        """Return what of vLLM changes texts: its version, and what the rounding of sums depends on."""
        return {"version": vllm_version(), **self.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        """Return the dict form: the name, and the options that differ from their defaults."""
        return {name: value for name, value in super().to_dict().items() if value != {} or name != "engine_args"}
