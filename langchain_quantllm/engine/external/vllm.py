"""`VLLM`: vLLM's engine in this process, as the engine of a model.

`vllm_options` owns the options, `vllm_engine` starts vLLM and runs requests, `vllm_arguments` translates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_quantllm.engine.external.spec import EngineSource
from langchain_quantllm.engine.external.vllm_options import VLLMOptions

if TYPE_CHECKING:
    from langchain_quantllm.engine.external.vllm_engine import VLLMEngine


class VLLM(VLLMOptions):
    """vLLM in this process as the engine: tensor and pipeline parallelism, over GPUs and machines.

    vLLM reads the weights, in processes of its own that it starts and that end with the model. Prompts go to it as
    token ids, and its tokens become text here, so chat templates, tool calls, reasoning and stop strings are the same
    as with any other engine. It starts processes, so a script needs `if __name__ == "__main__":` around its calls.

    Args:
        tensor_parallel_size: Devices that share each layer.
        pipeline_parallel_size: Stages of layers, each on as many devices.
        distributed_executor_backend: `"mp"` starts workers on this machine, `"ray"` in Ray's cluster, `"uni"` runs the
            one worker in the engine's process; None leaves it to vLLM.
        nnodes: Machines that share the model by vLLM's own means, without Ray; this process is the first of them.
        master_addr: Address of this machine for the others.
        master_port: Port of it, on which the others ask for their part.
        max_model_len: Most tokens of prompt and completion; None is the model's own length, or as many as the KV cache
            holds if these are fewer.
        gpu_memory_utilization: Fraction of each device's memory for weights and KV cache; None is vLLM's.
        kv_cache_memory_bytes: Bytes of the KV cache on each device, in place of what is left of that fraction.
        max_num_seqs: Most sequences that run at once; None is vLLM's.
        enforce_eager: Compile nothing and capture no CUDA graphs: starts sooner, runs slower.
        engine_args: Further arguments of vLLM's `AsyncEngineArgs`, by name, such as `{"block_size": 32}`.

    Raises:
        InvalidOptionError: If a value is not allowed, or two do not go together.
    """

    def open(self, source: EngineSource) -> VLLMEngine:
        """Start vLLM for a model.

        Raises:
            MissingPackageError: If vLLM is not installed.
            CheckpointError: If it cannot read the checkpoint's quantization, or fails to start with it.
            UnsupportedError: If its processes cannot be started from here.
        """
        from langchain_quantllm.engine.external.vllm_engine import VLLMEngine

        return VLLMEngine(self, source)
