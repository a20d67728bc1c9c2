"""`ChatQuantizedHuggingFace`: a quantized local model as a LangChain chat model.

One call: `bind_tools` and `with_structured_output` (`chat.binding`) make options of it; `_plan` writes the prompt
(`chat.plan.write_prompt`), finds the format of the answer (`chat.plan.AnswerFormat`) and makes the engine's requests;
`_submit` streams their chunks; `chat.result.ResultReader` reads them into messages, whole in `_generate`
and `_agenerate`, chunk by chunk in `_stream` and `_astream`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import Field, model_validator

from langchain_quantllm.base import PreparedCall, QuantizedModel, langchain_errors
from langchain_quantllm.base.aside import read_aside, run_aside, submit_aside
from langchain_quantllm.chat.binding import BindingChatModel
from langchain_quantllm.chat.fetching import FetchRules
from langchain_quantllm.chat.messages import texts_with_roles
from langchain_quantllm.chat.options import CHAT_OPTIONS, ChatOptions, refuse_full_text
from langchain_quantllm.chat.plan import AnswerFormat, Prompt, write_prompt
from langchain_quantllm.chat.profile import checkpoint_profile, pipeline_profile
from langchain_quantllm.chat.result import ResultReader, chat_result, combined_output
from langchain_quantllm.chat.template import ChatTemplate, TemplateRefusalError
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.data.counterparts import Kind
from langchain_quantllm.engine.external.spec import ExternalEngineRun, external_engine
from langchain_quantllm.engine.request import Engine, ModelLimits, OutputForm, TokenMask
from langchain_quantllm.engine.result import Answers
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, UnsupportedError, nearest
from langchain_quantllm.loading.inputs import prompt_inputs, require_parts
from langchain_quantllm.options import GenerationOptions, normalize
from langchain_quantllm.structured import Compiler, output_form
from langchain_quantllm.structured.tool_formats import FORMATS

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PreparedCall(PreparedCall):
    """One call, ready for the engine; `new_reader` makes the reader of an answer."""

    new_reader: Callable[[], ResultReader]


class ChatQuantizedHuggingFace(QuantizedModel, BindingChatModel):
    """A quantized Hugging Face model, run in this process, as a LangChain chat model.

    Setup:
        ```bash
        pip install langchain-quantllm                # with bitsandbytes: int8, nf4, fp4
        pip install "langchain-quantllm[structured]"  # tool calls and outputs that always match their schema
        pip install "langchain-quantllm[vision]"      # images, for models that read them
        ```

    Key init args:
        model_id: A folder, or the name of a repository on the Hub; `model` means the same.
        quantization: `"int8"`, `"nf4"`, `"nf4-double"`, `"fp4"`, `"gptq"`, `"none"`, or a scheme. None takes the
            checkpoint as it is.
        max_new_tokens (or max_tokens), temperature, top_p, top_k, seed, stop, n:
            Sampling. Each may be given at a call as well.
        adapters, adapter: LoRA adapters by name, and the default one; `adapter` may be given at a call.
        chat_template, chat_template_kwargs: A template in place of the checkpoint's, and variables for it, such as
            `{"enable_thinking": False}`.
        llm: A `QuantizedHuggingFaceLLM` whose settings and weights the chat model takes over.

    Instantiate, invoke and stream:
        ```python
        from langchain_quantllm import ChatQuantizedHuggingFace

        chat = ChatQuantizedHuggingFace(model="Qwen/Qwen2.5-7B-Instruct", quantization="nf4")
        chat.invoke([("system", "You translate to French."), ("human", "Good morning.")]).content
        for chunk in chat.stream("Tell me a story."):
            print(chunk.text, end="", flush=True)
        await chat.ainvoke("Good morning.")
        ```

    Tool calling:
        ```python
        def weather(city: str) -> str:
            '''Get the weather in a city.'''

        chat.bind_tools([weather]).invoke("What is the weather in Oslo?").tool_calls
        chat.bind_tools([weather], tool_choice="weather")  # always calls it, with arguments that match
        ```

    Structured output:
        ```python
        class Person(BaseModel):
            name: str
            age: int

        chat.with_structured_output(Person).invoke("Ada Lovelace died at 36.")
        ```

    Image input:
        ```python
        image = {"type": "image", "base64": base64.b64encode(content).decode(), "mime_type": "image/png"}
        chat.invoke([HumanMessage([image, {"type": "text", "text": "What is in this picture?"}])])
        ```

        For checkpoints of transformers' image-text-to-text models, in base64 or by an http(s) or data URL, in OpenAI's
        and Anthropic's blocks as well. Files are not read by their path.

    Audio input:
        ```python
        sound = {"type": "audio", "base64": base64.b64encode(content).decode(), "mime_type": "audio/wav"}
        chat.invoke([HumanMessage([sound, {"type": "text", "text": "What is said here?"}])])
        ```

        For checkpoints that hear, such as Qwen2-Audio and Gemma 4, in the ways of images, and in OpenAI's
        `input_audio`. WAV, MP3, FLAC, M4A, OGG and others, which the package's extra `audio` decodes.

    Response metadata:
        `usage_metadata` counts tokens, those found in the KV cache included; `response_metadata` has
        `finish_reason` (`"stop"`, `"length"`, `"tool_calls"`), `model_name`, `seed`, `timing` in seconds, and
        `logprobs` if asked for. Reasoning stands in `additional_kwargs["reasoning_content"]` and in
        `content_blocks`.

    The rules for templates that do not take every kind of message: `langchain_quantllm.chat.template.ChatTemplate`.
    """

    chat_template: str | None = None
    """A Jinja template in place of the checkpoint's."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the template, such as `{"enable_thinking": False}`."""
    tool_format: str | None = None
    """The model's format of tool calls, by a name of `structured.tool_formats.FORMATS`; None asks the template."""
    allow_private_urls: bool = False
    """Fetch images and sounds from addresses of this machine and of private networks too, not only from public ones."""
    allowed_domains: list[str] | None = None
    """The only hosts that media are fetched from, such as `["example.com", "*.example.org"]`; None is any."""
    special_tokens: Literal["text", "allow"] = "text"
    """Special tokens in the texts of messages and tools: `"text"` keeps them text, so that a stranger's text writes no
    turn; `"allow"` lets them be tokens, as those that the template writes always are."""
    streaming: bool | None = None
    """True makes `invoke` stream inwardly, for callbacks that want tokens."""
    max_retries: int | None = None
    """For compatibility: a model in this process has nothing to retry."""
    _kind: ClassVar[Kind] = "chat"
    _call_options: ClassVar[tuple[str, ...]] = CHAT_OPTIONS

    @model_validator(mode="before")
    @classmethod
    def _take_over(cls, values: Any) -> Any:
        """Move a loaded LLM's settings, and other providers' names, to the fields."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if (llm := values.pop("llm", None)) is not None:
            if not isinstance(llm, QuantizedModel):
                msg = f"llm={type(llm).__name__} cannot be taken over; give a QuantizedHuggingFaceLLM, or pipeline=."
                raise InvalidOptionError(msg)
            # Values given here come first, under any of their names.
            given = {*values, *normalize(values, lenient=True), "return_full_text"}
            given |= {"device", "device_map"} if given & {"device", "device_map"} else set()
            shared = [n for n in QuantizedModel.model_fields if n in llm.model_fields_set and n not in given]
            values = {**{name: getattr(llm, name) for name in shared}, **values}
        if (api_key := values.pop("api_key", None)) is not None:  # the token, in other providers' words
            if external_engine(values.get("engine")) is not None:
                msg = (
                    "api_key= is the token of the Hugging Face Hub here (token=); the key of a server goes into "
                    "engine=Server(..., api_key=...)."
                )
                raise InvalidOptionError(msg)
            values.setdefault("token", api_key)
        return values

    @model_validator(mode="after")
    def _check_chat(self) -> ChatQuantizedHuggingFace:
        refuse_full_text(self.return_full_text)
        names = [known.name for known in FORMATS]
        if self.tool_format is not None and self.tool_format not in names:
            msg = f"tool_format={self.tool_format!r} is not known{nearest(self.tool_format, names)}"
            raise InvalidOptionError(msg)
        self._fetch_rules()
        return self

    # LangChain's calls.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with langchain_errors():
            plan = self._plan(messages, stop, kwargs)
            answers = Answers(plan.requests)
            with plan.submit(in_pieces=False) as stream:
                for chunk in stream:
                    answers.add(chunk)
            return chat_result(answers, plan.new_reader, self.model_id)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with langchain_errors():
            plan, stream = await submit_aside(self._plan, messages, stop, kwargs, in_pieces=False)
            answers = Answers(plan.requests)
            with stream:
                async for chunk in stream:
                    answers.add(chunk)
            return await run_aside(chat_result, answers, plan.new_reader, self.model_id)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with langchain_errors():
            plan = self._plan_stream(messages, stop, kwargs)
            reader = plan.new_reader()
            with plan.submit() as stream:
                for chunk in stream:
                    for read in reader.chunks(chunk, plan.requests[0]):
                        if run_manager:
                            run_manager.on_llm_new_token(read.text, chunk=read)
                        yield read

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        with langchain_errors():
            plan, stream = await submit_aside(self._plan_stream, messages, stop, kwargs)
            with stream:
                reader = await run_aside(plan.new_reader)
                async for chunk in stream:
                    for read in await read_aside(partial(reader.chunks, request=plan.requests[0]), chunk):
                        if run_manager:
                            await run_manager.on_llm_new_token(read.text, chunk=read)
                        yield read

    def _should_stream(
        self,
        *,
        async_api: bool,
        run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> bool:
        """Whether a call streams inwardly; several answers do so only where a stream was asked for."""
        n = next((kwargs[name] for name in ("n", "num_return_sequences") if kwargs.get(name)), self.n)
        if n not in (None, 1) and not kwargs.get("stream"):
            return False
        return super()._should_stream(async_api=async_api, run_manager=run_manager, **kwargs)

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        return combined_output(llm_outputs, self.model_id)

    # The plan of a call.

    def _plan(
        self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, call: Mapping[str, Any]
    ) -> _PreparedCall:
        chat = ChatOptions.of(call)
        options = self._options(stop, {k: v for k, v in call.items() if k not in CHAT_OPTIONS})
        chat.check_model(self.model_id)
        refuse_full_text(options.return_full_text)
        tokenizer = require_parts(self._loaded()).tokenizer
        prompt = self._write_prompt(messages, chat, options.timeout)
        answer = AnswerFormat(chat, self._template(), prompt, tokenizer, self.tool_format)
        options = dataclasses.replace(
            options,
            add_special_tokens=prompt.adds_begin,
            skip_special_tokens=options.skip_special_tokens and not answer.shows_special_tokens,
        )
        engine = self._engine(options, media=prompt.media)
        form = self._form(answer, engine)
        mask = self._mask(answer, options, engine.limits) if self._external() is None else None
        if (mask is not None or form is not None) and not answer.is_optional:
            # A complete text may only end.
            options = dataclasses.replace(options, min_new_tokens=0, min_length=0)

        def new_reader() -> ResultReader:
            return ResultReader(answer.parser(), tokenizer, self.model_id, parallel=chat.parallel is not False)

        requests = self._requests(prompt.pieces, options, engine=engine, mask=mask, form=form, media=prompt.media)
        return _PreparedCall(
            options=options,
            engine=engine,
            tokenizer=tokenizer,
            requests=requests,
            max_waiting=self.max_waiting,
            new_reader=new_reader,
        )

    def _plan_stream(
        self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, call: Mapping[str, Any]
    ) -> _PreparedCall:
        plan = self._plan(messages, stop, call)
        if plan.options.n != 1:
            msg = f"n={plan.options.n} answers cannot share one stream; pass n=1, or use generate."
            raise InvalidOptionError(msg)
        return plan

    def _fetch_rules(self) -> FetchRules:
        return FetchRules(allow_private=self.allow_private_urls, allowed_domains=self.allowed_domains)

    def _write_prompt(
        self, messages: Sequence[BaseMessage], chat: ChatOptions, timeout_s: float | None = None
    ) -> Prompt:
        return write_prompt(
            messages,
            chat,
            self._template(),
            require_parts(self._loaded()),
            variables=self.chat_template_kwargs,
            allows_special_tokens=self.special_tokens == "allow",
            timeout_s=timeout_s,
            rules=self._fetch_rules(),
        )

    def _template(self) -> ChatTemplate:
        """Return the chat template; all instances over the model share it, with the results of its trials."""
        model = self._loaded()
        parts = require_parts(model)
        found: ChatTemplate = model.remember(
            ("template", self.chat_template),
            lambda: ChatTemplate(parts.tokenizer, self.chat_template, parts.processor),
        )
        return found

    def _form(self, answer: AnswerFormat, engine: Engine) -> OutputForm | None:
        """Write the constraint of an answer as the form that an engine of others knows; None where there is none."""
        if answer.constraint is None or self._external() is None:
            return None
        try:
            return output_form(answer.constraint, cast("ExternalEngineRun", engine).forms)
        except (InvalidOptionError, MissingPackageError, UnsupportedError) as error:
            if not answer.is_optional:
                raise
            _logger.info("tool calls are not held to their schemas: %s", error)
            return None

    def _mask(
        self, answer: AnswerFormat, options: GenerationOptions, limits: ModelLimits
    ) -> Callable[[], TokenMask] | None:
        """Compile the constraint of an answer; None where there is none, or an optional one cannot be enforced."""
        if answer.constraint is None or (answer.is_optional and not is_installed("xgrammar")):
            return None
        compiler: Compiler = self._loaded().remember(
            ("grammars",),
            lambda: Compiler(require_parts(self._loaded()).tokenizer, limits.vocab_size, limits.eos_token_ids),
        )
        most = options.max_new_tokens or limits.context_tokens or 2**31
        try:
            return compiler.mask_factory(answer.constraint, most, options.eos_token_id)
        except (InvalidOptionError, UnsupportedError) as error:
            if not answer.is_optional:
                raise
            _logger.info("tool calls are not held to their schemas: %s", error)
            return None

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens of a conversation's prompt, the template's included; loads the model if needed.

        The count is that of `usage_metadata["input_tokens"]` of a call with these messages. Where a call would say that
        the template does not take them, it is that of their texts, each after its role.

        Args:
            messages: The conversation, or any part of it; 0 tokens for none.
            tools: Tools that the prompt describes.
        """
        if not messages:
            return 0
        try:
            return len(self._prompt_ids(messages, {"tools": tools or ()}))
        except TemplateRefusalError:
            return sum(self.get_num_tokens(text) for text in texts_with_roles(messages))

    def _prompt_ids(self, messages: Sequence[BaseMessage], call: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a conversation's prompt, the template's included."""
        prompt = self._write_prompt(messages, ChatOptions.of(call))
        ids, _ = prompt_inputs(self._loaded(), prompt.pieces, prompt.media, add_special_tokens=prompt.adds_begin)
        return ids

    # LangChain's conventions.

    @property
    def _llm_type(self) -> str:
        return "quantized_huggingface_chat"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """All settings that change the output."""
        own = {name: getattr(self, name) for name in ("chat_template", "chat_template_kwargs", "tool_format")}
        own["special_tokens"] = "" if self.special_tokens == "text" else self.special_tokens
        return {**super()._identifying_params, **{name: value for name, value in own.items() if value}}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Make the key of the cache; langchain-core's is that of the first call, and omits a pipeline."""
        own, call = (sorted(params.items()) for params in (self._identifying_params, {**kwargs, "stop": stop}))
        return f"{self._llm_type}---{own}---{call}"

    def _resolve_model_profile(self) -> ModelProfile | None:
        if self.own_pipeline is not None:
            return pipeline_profile(self.own_pipeline, self.chat_template)
        return checkpoint_profile(self.model_id, self.chat_template)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        """Return the standard parameters for tracing."""
        rest = {k: v for k, v in kwargs.items() if k not in CHAT_OPTIONS or k == "model"}
        params = super()._get_ls_params(stop=stop, **rest)
        params["ls_model_type"] = "chat"
        return params

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Return the path by which `load` finds the class."""
        return ["langchain_quantllm", "chat_models"]
