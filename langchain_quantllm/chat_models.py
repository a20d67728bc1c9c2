"""`ChatQuantizedHuggingFace`: a quantized local model as a LangChain chat model.

Owns how messages, tools and wanted formats become requests to the engine, and answers messages. What a prompt
looks like is the chat template's business, what an answer says the parser's.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import ModelProfile
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import Field, model_validator

from langchain_quantllm.base import Plan, QuantizedModel, langchain_errors
from langchain_quantllm.chat.contents import images_in, joined
from langchain_quantllm.chat.images import FETCH_S, ImageSource, read_image
from langchain_quantllm.chat.messages import Turn, turns_of
from langchain_quantllm.chat.options import CHAT_OPTIONS, ChatOptions, choice_of
from langchain_quantllm.chat.output_parser import AnswerParser
from langchain_quantllm.chat.response_template import TemplateParser
from langchain_quantllm.chat.result import Reply
from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.chat.tool_schemas import describe_answer, describe_tool
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.data.counterparts import Kind
from langchain_quantllm.engine.request import ModelLimits, TokenMask
from langchain_quantllm.engine.result import Answers, completion_info
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError, nearest
from langchain_quantllm.loading.checkpoint import reads_images, stored_profile
from langchain_quantllm.loading.inputs import prompt_inputs
from langchain_quantllm.loading.processors import no_images_reason
from langchain_quantllm.options import GenerationOptions, normalize
from langchain_quantllm.structured import Compiler, Constraint, Either, JSONSchema, ToolCalls
from langchain_quantllm.structured.tool_formats import FORMATS, HERMES, ToolFormat, format_of, reasoning_of

_logger = logging.getLogger(__name__)

_SCHEMA_TEXT = "Answer with a JSON object that matches this JSON schema, and with nothing else:\n{schema}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan(Plan):
    """One call, ready for the engine."""

    make_parser: Callable[[], Any]
    parallel: bool


class ChatQuantizedHuggingFace(QuantizedModel, BaseChatModel):
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
        adapters, adapter: LoRA adapters by name, and the one of calls that name none; `adapter` may be given at a call.
        chat_template, chat_template_kwargs: A template in place of the checkpoint's, and variables for it, such as
            `{"enable_thinking": False}`.
        llm: A `QuantizedHuggingFaceLLM` to take over, with its settings and weights.

    Instantiate:
        ```python
        from langchain_quantllm import ChatQuantizedHuggingFace

        chat = ChatQuantizedHuggingFace(model="Qwen/Qwen2.5-7B-Instruct", quantization="nf4")
        ```

    Invoke:
        ```python
        chat.invoke([("system", "You translate to French."), ("human", "Good morning.")]).content
        ```

    Stream:
        ```python
        for chunk in chat.stream("Tell me a story."):
            print(chunk.text, end="", flush=True)
        ```

    Async:
        ```python
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

        For checkpoints of transformers' image-text-to-text models, in base64 or by an http(s) or data URL; OpenAI's and
        Anthropic's blocks are taken as well. Files are not read by their path.

    Response metadata:
        `usage_metadata` counts tokens, those found in the KV cache included; `response_metadata` has
        `finish_reason` (`"stop"`, `"length"`, `"tool_calls"`), `model_name`, `seed`, `timing` in seconds, and
        `logprobs` if asked for. Reasoning stands in `additional_kwargs["reasoning_content"]` and in
        `content_blocks`.

    How templates are treated that do not take every kind of message: `messages.templates.ChatTemplate`.
    """

    chat_template: str | None = None
    """A Jinja template in place of the checkpoint's."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the template, such as `{"enable_thinking": False}`."""
    tool_format: str | None = None
    """How the model writes tool calls, by a name of `messages.formats.FORMATS`; None asks the template."""
    streaming: bool | None = None
    """True makes `invoke` stream inwardly, for callbacks that want tokens."""
    max_retries: int | None = None
    """For compatibility: a model in this process has nothing to retry."""
    _kind: ClassVar[Kind] = "chat"
    _call_options: ClassVar[tuple[str, ...]] = CHAT_OPTIONS

    @model_validator(mode="before")
    @classmethod
    def _take_over(cls, values: Any) -> Any:
        """Bring a loaded LLM's settings, and other providers' names, to the fields."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if (llm := values.pop("llm", None)) is not None:
            if not isinstance(llm, QuantizedModel):
                msg = f"llm={type(llm).__name__} cannot be taken over; give a QuantizedHuggingFaceLLM, or pipeline=."
                raise InvalidOptionError(msg)
            # What is given here counts, under whatever name.
            given = {*values, *normalize(values, lenient=True), "return_full_text"}
            given |= {"device", "device_map"} if given & {"device", "device_map"} else set()
            shared = [n for n in QuantizedModel.model_fields if n in llm.model_fields_set and n not in given]
            values = {**{name: getattr(llm, name) for name in shared}, **values}
        if (api_key := values.pop("api_key", None)) is not None:  # what other providers call the token
            values.setdefault("token", api_key)
        return values

    @model_validator(mode="after")
    def _check_chat(self) -> ChatQuantizedHuggingFace:
        if self.return_full_text:
            msg = "return_full_text=True is not possible here: a chat model returns messages; leave it out."
            raise InvalidOptionError(msg)
        names = [known.name for known in FORMATS]
        if self.tool_format is not None and self.tool_format not in names:
            msg = f"tool_format={self.tool_format!r} is not known{nearest(self.tool_format, names)}"
            raise InvalidOptionError(msg)
        return self

    # Tools and structured output.

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Give the model tools.

        Args:
            tools: Functions, pydantic classes, LangChain tools, or OpenAI's descriptions of functions.
            tool_choice: `"auto"` (the default) leaves it to the model, `"any"` (also `"required"` or True) makes it
                call some tool, a tool's name that one, `"none"` keeps it from calling.
            strict: Written into the descriptions. Calls match their schema in any case, where the extra `structured`
                is installed.
            parallel_tool_calls: Whether there may be several calls in one answer. The default is yes where the
                model's chat template has tools. Made sure of where the extra `structured` is installed.
            **kwargs: Options of the calls.

        Returns:
            The model with tools bound.

        Raises:
            InvalidOptionError: If the tool chosen is none of them.
        """
        described = [describe_tool(tool, strict) for tool in tools]
        choice_of(tool_choice, described)
        given = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        return self.bind(tools=described, **{k: v for k, v in given.items() if v is not None}, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Make the model answer with an object of a schema.

        Args:
            schema: A pydantic class, a TypedDict, or a JSON schema.
            method: `"json_schema"` tells the model the schema and allows it nothing else; `"function_calling"` makes
                it call a function of that schema; `"json_mode"` allows any JSON object, and says nothing of the schema.
            include_raw: Give a dict of `raw` (the message), `parsed`, and `parsing_error` in place of raising.
            strict: Written into the function's description; the schema is enforced in any case.
            **kwargs: Options of the calls, and `tools` that the model may call instead.

        Returns:
            A runnable that gives an instance of the class, or a dict; None where the model called one of the tools.

        Raises:
            InvalidOptionError: If the method is unknown, or needs a schema and has none.
        """
        if method not in ("json_schema", "function_calling", "json_mode"):
            msg = f"method={method!r} is not known; it must be 'json_schema', 'function_calling' or 'json_mode'."
            raise InvalidOptionError(msg)
        if schema is None and method != "json_mode":
            msg = f"method={method!r} needs a schema; give a pydantic class, a TypedDict or a JSON schema."
            raise InvalidOptionError(msg)
        about = {"kwargs": {"method": method, **({} if strict is None else {"strict": strict})}, "schema": schema}
        kwargs["ls_structured_output_format"] = about
        if method == "function_calling":
            llm, parser = self._calling(schema, strict, kwargs)
        else:
            llm, parser = self._formatting(schema if method == "json_schema" else None, schema, strict, kwargs)
        if not include_raw:
            return llm | parser
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        parsed = RunnablePassthrough.assign(
            parsed=lambda given: parser.invoke(given["raw"]), parsing_error=lambda _: None
        )
        # The model comes first, as the first of a sequence is the one that gets a call's options.
        with_fallback = parsed.with_fallbacks([failed], exception_key="parsing_error")
        return llm | RunnableMap(raw=RunnablePassthrough()) | with_fallback

    def _calling(
        self, schema: Any, strict: bool | None, options: dict[str, Any]
    ) -> tuple[Runnable[LanguageModelInput, AIMessage], Runnable[Any, Any]]:
        """Give the model made to call a function of a schema, and the parser of its calls."""
        wanted = describe_tool(schema)
        name = wanted["function"]["name"]
        tools = [wanted, *options.pop("tools", ())]
        options = {"tool_choice": name, "parallel_tool_calls": False, "strict": strict, **options}
        if _is_class(schema):
            return self.bind_tools(tools, **options), PydanticToolsParser(tools=[schema], first_tool_only=True)
        return self.bind_tools(tools, **options), JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)

    def _formatting(
        self, enforced: Any, schema: Any, strict: bool | None, options: dict[str, Any]
    ) -> tuple[Runnable[LanguageModelInput, AIMessage], Runnable[Any, Any]]:
        """Give the model made to write JSON, of a schema if one is enforced, and the parser for it."""
        wanted: dict[str, Any] = {"type": "json_object"}
        if enforced is not None:
            name, described = describe_answer(enforced, strict)
            wanted = {"type": "json_schema", "json_schema": {"name": name, "schema": described}}
        options = {"response_format": wanted, **options}
        tools = options.pop("tools", None)
        parser: Any = PydanticOutputParser(pydantic_object=schema) if _is_class(schema) else JsonOutputParser()
        if not tools:
            return self.bind(**options), parser
        # What calls a tool instead has no object; the call is in the message, which `include_raw` gives.
        either = RunnableLambda(lambda message: None if message.tool_calls else parser.invoke(message))
        return self.bind_tools(tools, **options), either

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
            return self._result(plan, answers)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with langchain_errors():
            is_long = self._is_long(messages, kwargs)
            plan = await self._aplan(self._plan, messages, stop, kwargs, is_long=is_long)
            answers = Answers(plan.requests)
            with plan.submit(in_pieces=False) as stream:
                async for chunk in stream:
                    answers.add(chunk)
            return self._result(plan, answers)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with langchain_errors():
            plan = self._plan_stream(messages, stop, kwargs)
            convert = self._converter(plan)
            with plan.submit() as stream:
                for chunk in stream:
                    for given in convert(chunk):
                        if run_manager:
                            run_manager.on_llm_new_token(given.text, chunk=given)
                        yield given

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        with langchain_errors():
            is_long = self._is_long(messages, kwargs)
            plan = await self._aplan(self._plan_stream, messages, stop, kwargs, is_long=is_long)
            convert = self._converter(plan)
            with plan.submit() as stream:
                async for chunk in stream:
                    for given in convert(chunk):
                        if run_manager:
                            await run_manager.on_llm_new_token(given.text, chunk=given)
                        yield given

    def _should_stream(
        self,
        *,
        async_api: bool,
        run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> bool:
        """Say whether a call streams inwardly; several answers do not, unless a stream was asked for."""
        n = next((kwargs[name] for name in ("n", "num_return_sequences") if kwargs.get(name)), self.n)
        if n not in (None, 1) and not kwargs.get("stream"):
            return False
        return super()._should_stream(async_api=async_api, run_manager=run_manager, **kwargs)

    # Requests.

    def _plan(self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, call: Mapping[str, Any]) -> _Plan:
        chat = ChatOptions.of(call)
        options = self._options(stop, {k: v for k, v in call.items() if k not in CHAT_OPTIONS})
        self._check_call(chat, options)
        template = self._template()
        prompt, sources = self._render(template, self._turns(messages), chat)
        images = self._read(sources, options.timeout)
        tokenizer = self.pipeline.tokenizer
        tool_format = self._tool_format(template) if chat.tools else None
        reasoning = reasoning_of(template.text(tools=bool(chat.tools)))
        in_reasoning = reasoning is not None and prompt.rstrip().endswith(reasoning.begin)
        thinks = None if reasoning is None else (reasoning.begin, reasoning.end, in_reasoning)
        # A model that was not made for tools calls the same one again and again, if it may.
        parallel = template.takes_tools if chat.parallel is None else chat.parallel
        constraint = _constraint(chat, tool_format, thinks, parallel=parallel)
        markers = _markers(tokenizer, tool_format, thinks)
        reads_template = getattr(tokenizer, "response_template", None) is not None and self.tool_format is None
        options = dataclasses.replace(
            options,
            add_special_tokens=self._adds_begin(prompt),
            skip_special_tokens=options.skip_special_tokens and not markers and not reads_template,
        )
        engine = self._engine(options, has_media=bool(images))
        mask = self._mask(constraint, options, engine.limits)
        if mask is not None and not (isinstance(constraint, ToolCalls) and constraint.mode == "auto"):
            # Where a text is complete, nothing but its end is allowed.
            options = dataclasses.replace(options, min_new_tokens=0, min_length=0)
        requests = self._requests(prompt, options, engine=engine, mask=mask, images=images)

        def make_parser() -> Any:
            if reads_template:
                return TemplateParser(tokenizer, prompt, chat.tools)
            parser = AnswerParser(tool_format, chat.tools, reasoning=reasoning, in_reasoning=in_reasoning)
            return _Stripping(parser, tokenizer, markers) if markers else parser

        return _Plan(
            options=options,
            engine=engine,
            tokenizer=tokenizer,
            requests=requests,
            make_parser=make_parser,
            parallel=chat.parallel is not False,
        )

    def _check_call(self, chat: ChatOptions, options: GenerationOptions) -> None:
        if chat.model not in (None, self.model_id):
            msg = (
                f"model={chat.model!r} is not this model ({self.model_id!r}), which is loaded; make another "
                "ChatQuantizedHuggingFace for it."
            )
            raise InvalidOptionError(msg)
        if options.return_full_text:
            msg = "return_full_text=True is not possible here: a chat model returns messages; leave it out."
            raise InvalidOptionError(msg)

    def _plan_stream(
        self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, call: Mapping[str, Any]
    ) -> _Plan:
        plan = self._plan(messages, stop, call)
        if plan.options.n != 1:
            msg = f"n={plan.options.n} answers cannot share one stream; pass n=1, or use generate."
            raise InvalidOptionError(msg)
        return plan

    def _is_long(self, messages: Sequence[BaseMessage], call: Mapping[str, Any]) -> bool:
        """Whether planning a call may take long: grammars are compiled for it, or images fetched and resized."""
        if any(call.get(name) is not None for name in ("tools", "response_format", "constraint")):
            return True
        return any(not isinstance(message.content, str) for message in messages)

    # Images.

    def _processor(self) -> Any:
        """Give what makes inputs of images; None where the model was loaded to read text only."""
        return getattr(self.pipeline, "processor", None)

    def _turns(self, messages: Sequence[BaseMessage]) -> list[Turn]:
        pipeline = self.pipeline
        turns = turns_of(messages, images=self._processor() is not None or reads_images(pipeline.model.config))
        if (found := images_in(turns)) and (error := no_images_reason(pipeline, found[0].message)) is not None:
            raise error
        return turns

    def _read(self, sources: Sequence[ImageSource], timeout_s: float | None) -> list[Any]:
        return [read_image(source, min(timeout_s or FETCH_S, FETCH_S)) for source in sources]

    def _adds_begin(self, prompt: str) -> bool:
        """Whether the tokenizer is to add its begin token: a template has written it, but one made for a processor.

        Source: `ProcessorMixin.apply_chat_template` in transformers/processing_utils.py.
        """
        begin = self.pipeline.tokenizer.bos_token
        return self._processor() is not None and not (begin is not None and prompt.startswith(begin))

    # Prompts.

    def _template(self) -> ChatTemplate:
        """Give the template, with what was found out about it, which all instances over the model share."""
        model = self._loaded()
        found: ChatTemplate = model.remember(
            ("template", self.chat_template),
            lambda: ChatTemplate(self.pipeline.tokenizer, self.chat_template, self._processor()),
        )
        return found

    def _render(
        self,
        template: ChatTemplate,
        turns: list[Turn],
        chat: ChatOptions,
    ) -> tuple[str, list[ImageSource]]:
        # The model is to know what is wanted, not to be driven there blindly.
        if isinstance(chat.constraint, JSONSchema):
            text = _SCHEMA_TEXT.format(schema=chat.constraint.schema)
            at = 1 if turns and turns[0]["role"] == "system" else 0
            turns = [*turns[:at], {"role": "system", "content": text}, *turns[at:]]
            if at:
                turns[0:2] = [{"role": "system", "content": joined([turns[0]["content"], text], "\n\n")}]
        variables = {**self.chat_template_kwargs, **(chat.template_kwargs or {})}
        return template.compose(turns, chat.tools, variables)

    def _tool_format(self, template: ChatTemplate) -> ToolFormat:
        if self.tool_format is not None:
            return next(known for known in FORMATS if known.name == self.tool_format)
        return format_of(template.text(tools=True)) if template.takes_tools else HERMES

    def _mask(
        self, constraint: Constraint | None, options: GenerationOptions, limits: ModelLimits
    ) -> Callable[[], TokenMask] | None:
        if constraint is None:
            return None
        is_optional = isinstance(constraint, ToolCalls) and constraint.mode == "auto"
        if is_optional and not is_installed("xgrammar"):
            return None  # calls are read all the same; only that they match is not made sure of
        model = self._loaded()
        compiler: Compiler = model.remember(
            ("grammars",),
            lambda: Compiler(self.pipeline.tokenizer, limits.vocab_size, limits.eos_token_ids),
        )
        most = options.max_new_tokens or limits.context_tokens or 2**31
        try:
            return compiler.masks(constraint, most, options.eos_token_id)
        except (InvalidOptionError, UnsupportedError) as error:
            if not is_optional:
                raise
            _logger.info("calls are not made sure to match their tools: %s", error)
            return None

    # Answers.

    def _result(self, plan: _Plan, answers: Answers) -> ChatResult:
        generations = []
        for answer in answers.rows:
            reply, parser = Reply(parallel=plan.parallel), plan.make_parser()
            reply.add([*parser.push(answer.text), *parser.finish()])
            info = completion_info(answer, answer.request, plan.tokenizer, self.model_id)
            usage, metadata = _split(info, reply)
            message = reply.message(usage_metadata=usage, response_metadata=metadata)
            generations.append(ChatGeneration(message=message, generation_info=metadata))
        usages = [answer.usage for answer in answers.rows if answer.usage]
        prompt_tokens = usages[0].prompt_tokens if usages else 0
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        counts = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        return ChatResult(generations=generations, llm_output={"model_name": self.model_id, "token_usage": counts})

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        usages = [output["token_usage"] for output in llm_outputs if output]
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        return {"model_name": self.model_id, "token_usage": {n: sum(usage[n] for usage in usages) for n in names}}

    def _converter(self, plan: _Plan) -> Callable[[Any], Iterator[ChatGenerationChunk]]:
        reply, parser = Reply(parallel=plan.parallel), plan.make_parser()

        def convert(chunk: Any) -> Iterator[ChatGenerationChunk]:
            ended = chunk.finish_reason is not None
            pieces = parser.push(chunk.text) + (parser.finish() if ended else [])
            message = reply.add(pieces)
            info = completion_info(chunk, plan.requests[0], plan.tokenizer, self.model_id)
            if not ended:
                if message is not None or info:
                    message = message or AIMessageChunk(content="")
                    message.response_metadata = info
                    yield ChatGenerationChunk(message=message)
                return
            if message is not None:
                yield ChatGenerationChunk(message=message)
            usage, metadata = _split(info, reply)
            last = AIMessageChunk(content="", usage_metadata=usage, response_metadata=metadata, chunk_position="last")
            yield ChatGenerationChunk(message=last, generation_info=metadata)

        return convert

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens of the prompt that messages make, the template's included; loads the model if needed.

        Args:
            messages: The conversation.
            tools: Tools that the prompt describes.
        """
        chat = ChatOptions.of({"tools": tools or ()})
        prompt, sources = self._render(self._template(), self._turns(messages), chat)
        images = self._read(sources, None)
        ids, _ = prompt_inputs(self._loaded(), prompt, images, add_special_tokens=self._adds_begin(prompt))
        return len(ids)

    # LangChain's conventions.

    @property
    def _llm_type(self) -> str:
        return "quantized_huggingface_chat"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """All that changes the output."""
        own = {name: getattr(self, name) for name in ("chat_template", "chat_template_kwargs", "tool_format")}
        return {**super()._identifying_params, **{name: value for name, value in own.items() if value}}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Give the key of the cache: core's own is that of the first call, and knows nothing of a given pipeline."""
        own, call = (sorted(params.items()) for params in (self._identifying_params, {**kwargs, "stop": stop}))
        return f"{self._llm_type}---{own}---{call}"

    def _resolve_model_profile(self) -> ModelProfile | None:
        """Derive the profile from the checkpoint's config and template, as far as they are on this disk."""
        tool_images = None
        if self.own_pipeline is not None:
            config = self.own_pipeline.model.config.to_dict()
            processor = getattr(self.own_pipeline, "processor", None)
            template = self.chat_template or getattr(processor, "chat_template", None)
            template = template or self.own_pipeline.tokenizer.chat_template
            found = ChatTemplate(self.own_pipeline.tokenizer, self.chat_template, processor)
            images = template is not None and found.takes_images()
            tool_images = template is not None and found.takes_images("tool")
        else:
            config, template, sees = stored_profile(self.model_id)
            template = self.chat_template or template
            images = sees and template is not None and is_installed("PIL")
        if not config:
            return None
        profile = ModelProfile(
            text_inputs=True,
            text_outputs=True,
            image_inputs=images,
            image_url_inputs=images,
            audio_inputs=False,
            video_inputs=False,
            pdf_inputs=False,
            tool_calling=True,
            tool_choice=is_installed("xgrammar"),
            structured_output=is_installed("xgrammar"),
            reasoning_output=reasoning_of(str(template or "")) is not None,
        )
        if tool_images is not None or not images:
            profile["image_tool_message"] = bool(tool_images)
        context = config.get("max_position_embeddings") or (config.get("text_config") or {}).get(
            "max_position_embeddings"
        )
        if isinstance(context, int):
            profile["max_input_tokens"] = context
        return profile

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        """Give the standard parameters for tracing."""
        rest = {k: v for k, v in kwargs.items() if k not in CHAT_OPTIONS or k == "model"}
        return super()._get_ls_params(stop=stop, **rest)

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Say where `load` finds the class."""
        return ["langchain_quantllm", "chat_models"]


class _Stripping:
    """A parser before which special tokens are taken out that are no marks of its own."""

    def __init__(self, parser: AnswerParser, tokenizer: Any, markers: Sequence[str]) -> None:
        others = [token for token in tokenizer.all_special_tokens if not any(token in m or m in token for m in markers)]
        self._others = re.compile("|".join(map(re.escape, others))) if others else None
        self._parser = parser
        self.finish = parser.finish

    def push(self, text: str) -> Any:
        return self._parser.push(self._others.sub("", text) if self._others else text)


def _is_class(schema: Any) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def _constraint(
    chat: ChatOptions, tool_format: ToolFormat | None, thinks: tuple[str, str, bool] | None, *, parallel: bool
) -> Constraint | None:
    """Say what the answer must be: what was asked for, calls, or either of them."""
    constraint = chat.constraint
    if tool_format is not None:
        is_required = chat.choice is not None or constraint is not None
        mode: Literal["required", "auto"] = "required" if is_required else "auto"
        calls = ToolCalls(tool_format, chat.callable_tools, mode=mode, parallel=parallel)
        constraint = calls if chat.choice is not None or constraint is None else Either((calls, constraint))
    if constraint is not None and thinks is not None:
        return dataclasses.replace(constraint, reasoning=thinks)
    return constraint


def _markers(tokenizer: Any, tool_format: ToolFormat | None, reasoning: tuple[str, str, bool] | None) -> list[str]:
    """List the special tokens that the parser has to see."""
    texts = [*(reasoning or ())[:2]]
    if tool_format is not None:
        texts += [tool_format.opening, tool_format.trigger, tool_format.call, tool_format.call_end, tool_format.closing]
        texts += tool_format.inner
    return [token for token in tokenizer.all_special_tokens if any(token in text for text in texts)]


def _split(info: dict[str, Any], reply: Reply) -> tuple[Any, dict[str, Any]]:
    """Take the usage out of what is told of a completion, and say that it ended with calls where it did."""
    usage = info.pop("usage_metadata", None)
    if info.get("finish_reason") == "stop" and reply.has_calls:
        info["finish_reason"] = "tool_calls"
    return usage, {**info, "model_provider": "quantllm"}
