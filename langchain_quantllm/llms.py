"""`QuantizedHuggingFaceLLM`: a quantized local model as a LangChain LLM.

Owns the way from LangChain's calls of a text model to requests, and from the engine's chunks to generations. Every
call is a stream; `invoke` and `batch` join its chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables.config import RunnableConfig, get_config_list
from typing_extensions import Self

from langchain_quantllm.base import PreparedCall, QuantizedModel, langchain_errors, run_together, setting
from langchain_quantllm.base.aside import read_aside, run_aside, submit_aside
from langchain_quantllm.compat.transformers_pipelines import flat_options, with_options
from langchain_quantllm.engine.result import Answers, completion_info
from langchain_quantllm.engine.stream import Chunk
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, pip_install
from langchain_quantllm.loading.inputs import require_parts

_call_options: ContextVar[Mapping[str, Any] | None] = ContextVar("quantllm_call_options", default=None)
"""The options of the call in progress; LangChain makes its cache key of the fields alone."""

_LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "repetition_penalty")


class QuantizedHuggingFaceLLM(QuantizedModel, BaseLLM):
    """A quantized Hugging Face model, run in this process, as a LangChain LLM.

    Setup:
        ```bash
        pip install langchain-quantllm          # with bitsandbytes: int8, nf4, fp4
        pip install "langchain-quantllm[gptq]"  # GPTQ checkpoints as well
        ```

    Key init args:
        model_id: A folder, or the name of a repository on the Hub.
        quantization: `"int8"`, `"nf4"`, `"nf4-double"`, `"fp4"`, `"gptq"`, `"none"`, or a scheme
            such as `NF4(double_quantization=True)`. None takes the checkpoint as it is.
        max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, n:
            Generation options, with transformers' names. A call takes each of them as well.
        adapters, adapter: LoRA adapters by name, and the adapter of calls that name none. A call takes `adapter` too.

    Instantiate:
        ```python
        from langchain_quantllm import QuantizedHuggingFaceLLM

        llm = QuantizedHuggingFaceLLM(model_id="elyza/ELYZA-japanese-Llama-2-7b", quantization="int8")
        ```

    Invoke:
        ```python
        llm.invoke("The capital of France is", max_new_tokens=8)
        ```

    Stream:
        ```python
        for text in llm.stream("The capital of France is"):
            print(text, end="", flush=True)
        ```

    Batch:
        ```python
        llm.batch(["1, 2, 3,", "a, b, c,"])
        ```

    Async:
        ```python
        await llm.ainvoke("The capital of France is")
        ```

    Memory:
        ```python
        llm.load()
        print(llm.memory_report())
        ```

    Response metadata:
        The `generation_info` of each completion of `generate` has its `finish_reason` (`"stop"` or `"length"`),
        `model_name`, `usage_metadata`, `seed`, `timing` in seconds, and `logprobs` if asked for; `llm_output` has the
        sums of the usage.

    Which value counts: the call's, else the field's, else the checkpoint's generation config, else greedy decoding with
    256 new tokens.
    """

    # Constructors, and HuggingFacePipeline.

    @classmethod
    def from_model_id(
        cls,
        model_id: str,
        task: str = "text-generation",
        backend: str = "default",
        device: int | None = None,
        device_map: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        pipeline_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make an LLM from the arguments of `HuggingFacePipeline.from_model_id`.

        Args:
            model_id: A folder, or the name of a repository on the Hub.
            task: `"text-generation"`, the only task.
            backend: `"default"`, which is transformers.
            device: Number of a GPU, or -1 for the CPU.
            device_map: As transformers takes it, instead of `device`.
            model_kwargs: Arguments of `from_pretrained`, such as `quantization_config`.
            pipeline_kwargs: Generation options, such as `max_new_tokens`.
            batch_size: Maximum number of sequences that run at once.
            **kwargs: Fields of this class.

        Returns:
            An LLM that loads its weights on first use.

        Raises:
            InvalidOptionError: If the task or the backend is another one.
        """
        if task != "text-generation":
            msg = f"task={task!r} is not possible; this class continues texts: task='text-generation'."
            raise InvalidOptionError(msg)
        if backend not in ("default", "pt", "ipex"):
            msg = f"backend={backend!r} is not possible; the models run in PyTorch: backend='default'."
            raise InvalidOptionError(msg)
        kwargs |= {"model_kwargs": model_kwargs, "pipeline_kwargs": pipeline_kwargs, "batch_size": batch_size}
        return cls(model_id=model_id, device=device, device_map=device_map, **kwargs)

    @classmethod
    def from_huggingface_pipeline(cls, llm: Any, **kwargs: Any) -> Self:
        """Make an LLM over a langchain-huggingface `HuggingFacePipeline` and its loaded weights.

        Args:
            llm: The `HuggingFacePipeline`; it can still be used.
            **kwargs: Fields of this class, such as `max_new_tokens`.

        Returns:
            An LLM over the same pipeline, with the options of its `pipeline_kwargs`.

        Raises:
            InvalidOptionError: If it is no `HuggingFacePipeline`.
        """
        if not hasattr(llm, "pipeline_kwargs") or getattr(llm, "pipeline", None) is None:
            msg = f"from_huggingface_pipeline takes a langchain-huggingface HuggingFacePipeline, not {llm!r}."
            raise InvalidOptionError(msg)
        options = flat_options(llm.pipeline, llm.pipeline_kwargs or {})
        given = {"generation_kwargs": options, "batch_size": llm.batch_size, **kwargs}
        return cls(**{"pipeline": llm.pipeline, "model_id": llm.model_id or "", **given})

    def to_huggingface_pipeline(self) -> Any:
        """Make a langchain-huggingface `HuggingFacePipeline` over the loaded weights.

        Returns:
            A `HuggingFacePipeline` over the same model, with the options of this instance except `stop`, `seed` and
            `n`, which it does not support.

        Raises:
            MissingPackageError: If langchain-huggingface is not installed.
        """
        try:
            from langchain_huggingface import HuggingFacePipeline

            from langchain_quantllm.engine.generate import DEFAULT_ROWS
        except ImportError as error:
            msg = f"HuggingFacePipeline needs its package: {pip_install('langchain-quantllm[huggingface]')}"
            raise MissingPackageError(msg) from error
        options = self._options(None, {})
        kwargs: dict[str, Any] = {**options.extra, "do_sample": options.do_sample}
        kwargs |= {name: value for name in _LENGTHS if (value := getattr(options, name))}
        if options.do_sample:
            kwargs |= {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        pipeline = self.pipeline
        if pipeline.task == "image-text-to-text":
            kwargs = {"generate_kwargs": kwargs}
        return HuggingFacePipeline(
            pipeline=with_options(pipeline, kwargs),  # HuggingFacePipeline passes options to its calls alone
            model_id=self.model_id,
            batch_size=self.batch_size or DEFAULT_ROWS,
            pipeline_kwargs=kwargs,
        )

    # LangChain's calls.

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        with langchain_errors():
            plan = self._plan(prompts, stop, kwargs)
            answers = Answers(plan.requests)
            with plan.submit(in_pieces=False) as stream:
                for chunk in stream:
                    answers.add(chunk)
            return self._result(plan, answers)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        with langchain_errors():
            plan, stream = await submit_aside(self._plan, prompts, stop, kwargs, in_pieces=False)
            answers = Answers(plan.requests)
            with stream:
                async for chunk in stream:
                    answers.add(chunk)
            return await run_aside(self._result, plan, answers)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with langchain_errors():
            plan = self._plan_stream(prompt, stop, kwargs)
            with plan.submit() as stream:
                for made in itertools.chain(self._echo(plan), (self._chunk(plan, chunk) for chunk in stream)):
                    if run_manager:
                        run_manager.on_llm_new_token(made.text, chunk=made)
                    yield made

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        with langchain_errors():
            plan, stream = await submit_aside(self._plan_stream, prompt, stop, kwargs)
            with stream:
                for made in self._echo(plan):
                    if run_manager:
                        await run_manager.on_llm_new_token(made.text, chunk=made)
                    yield made
                async for chunk in stream:
                    made = await read_aside(partial(self._chunk, plan), chunk)
                    if run_manager:
                        await run_manager.on_llm_new_token(made.text, chunk=made)
                    yield made

    def generate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """Complete prompts like `BaseLLM.generate`, with the call's options in the cache key."""
        with setting(_call_options, _own_options(kwargs)):
            return super().generate(prompts, stop=stop, callbacks=callbacks, **kwargs)

    async def agenerate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """Complete prompts like `BaseLLM.agenerate`, with the call's options in the cache key."""
        with setting(_call_options, _own_options(kwargs)):
            return await super().agenerate(prompts, stop=stop, callbacks=callbacks, **kwargs)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Complete many prompts in one running batch.

        Args:
            inputs: Prompts.
            config: As for every Runnable; `max_concurrency` is the maximum number of prompts that run at once.
            return_exceptions: Return an error in the place of its prompt's text. Otherwise the first error is raised
                and the other prompts are cancelled.
            **kwargs: Options of the call.

        Returns:
            The texts, and the errors with `return_exceptions`, in the order of the prompts.
        """
        if not return_exceptions or len(inputs) < 2:
            return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        configs = get_config_list(config, len(inputs))
        workers = configs[0].get("max_concurrency") or min(len(inputs), 2 * (self.batch_size or 64))

        def complete(prompt: LanguageModelInput, config: RunnableConfig) -> Any:
            try:
                return self.invoke(prompt, config, **kwargs)
            except Exception as error:
                return error

        return run_together(complete, inputs, configs, workers=workers)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Complete many prompts in one running batch; see `batch`."""
        if not return_exceptions or len(inputs) < 2:
            return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        return await super(BaseLLM, self).abatch(inputs, config, return_exceptions=True, **kwargs)

    # Plans and results.

    def _plan(self, prompts: Sequence[str], stop: Sequence[str] | None, call: Mapping[str, Any]) -> PreparedCall:
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt:
                msg = f"the prompt is {prompt!r}; give a text of at least one character."
                raise InvalidOptionError(msg)
        options = self._options(stop, call)
        engine = self._engine(options)
        requests = [request for prompt in prompts for request in self._requests(prompt, options, engine=engine)]
        return PreparedCall(
            options=options,
            engine=engine,
            tokenizer=require_parts(self._loaded()).tokenizer,
            requests=requests,
            max_waiting=self.max_waiting,
            prompts=prompts,
        )

    def _plan_stream(self, prompt: str, stop: Sequence[str] | None, call: Mapping[str, Any]) -> PreparedCall:
        plan = self._plan([prompt], stop, call)
        if plan.options.n != 1:
            msg = f"n={plan.options.n} completions cannot share one stream; pass n=1, or use generate."
            raise InvalidOptionError(msg)
        return plan

    def _echo(self, plan: PreparedCall) -> list[GenerationChunk]:
        return [GenerationChunk(text=plan.prompts[0])] if plan.options.return_full_text else []

    def _chunk(self, plan: PreparedCall, chunk: Chunk) -> GenerationChunk:
        info = completion_info(chunk, plan.requests[chunk.row], plan.tokenizer, self.model_id)
        return GenerationChunk(text=chunk.text, generation_info=info or None)

    def _result(self, plan: PreparedCall, answers: Answers) -> LLMResult:
        n = plan.options.n
        generations = [
            Generation(
                text=(plan.prompts[i // n] if plan.options.return_full_text else "") + answer.text,
                generation_info=completion_info(answer, answer.request, plan.tokenizer, self.model_id),
            )
            for i, answer in enumerate(answers.rows)
        ]
        usages = [answer.usage for answer in answers.rows if answer.usage]
        prompt_tokens = sum(usage.prompt_tokens for usage in usages[::n])
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return LLMResult(
            generations=[generations[i : i + n] for i in range(0, len(generations), n)],
            llm_output={
                "model_name": self.model_id,
                "token_usage": {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": completion_tokens,
                    "total_tokens": prompt_tokens + completion_tokens,
                    "cached_tokens": sum(usage.cached_tokens for usage in usages[::n]),
                },
            },
        )

    # LangChain's conventions.

    @property
    def _llm_type(self) -> str:
        return "quantized_huggingface"

    def asdict(self) -> dict[str, Any]:
        """Return all fields that change the output, and the options of the call in progress."""
        # LangChain overwrites `stop` with the call's stop strings, so the field's go under a second name.
        stop = {} if self.stop is None else {"stop_strings": self.stop}
        return {**super().asdict(), **stop, **(_call_options.get() or {})}

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Return the module where `load` finds the class."""
        return ["langchain_quantllm", "llms"]


def _own_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the arguments of LangChain's own among a call's options."""
    langchain = ("tags", "metadata", "run_name", "run_id")
    return {k: v for k, v in kwargs.items() if k not in langchain}
