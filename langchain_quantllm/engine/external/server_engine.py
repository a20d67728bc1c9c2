"""The engine over an OpenAI-compatible server: requests out, tokens in.

Each request of a submission is one request there. It is sent, again if the server is busy or gone and no token has
come; its tokens go into its `Completion`. However it ends, its connection is given back or closed.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from langchain_quantllm.engine.detokenizer import Completion
from langchain_quantllm.engine.external import llamacpp
from langchain_quantllm.engine.external.loop_engine import LoopEngine, StreamTasks
from langchain_quantllm.engine.external.requests import check_requests
from langchain_quantllm.engine.external.server_answer import Answer
from langchain_quantllm.engine.external.server_client import Attempts, LostAnswerError, ServerClient
from langchain_quantllm.engine.external.server_fit import ServerFit, find_fit
from langchain_quantllm.engine.external.server_options import ServerOptions
from langchain_quantllm.engine.external.spec import EngineSource
from langchain_quantllm.engine.request import EngineInfo, Request
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.options import BASE_ADAPTER

_MOST_SEED = 2**63


class ServerEngine(LoopEngine):
    """Runs requests at a server."""

    def __init__(self, server: ServerOptions, source: EngineSource) -> None:
        """Connect, and find out what the server has and can do.

        Args:
            server: The options.
            source: The model.

        Raises:
            ServerError: If it does not answer as a server should.
            InvalidOptionError: If it does not have the model or an adapter.
            UnsupportedError: If its model or tokenizer is another one.
        """
        super().__init__(
            "quantllm-server", source.tokenizer, places=server.max_connections, rows=server.max_connections
        )
        self._server = server
        self._client: ServerClient | None = None
        try:
            self._client, self._fit = self._thread.wait_for(self._connect(source))
        except BaseException:
            self.close()
            raise
        bounds = [n for n in (source.limits.context_tokens, self._fit.context_tokens) if n is not None]
        self.limits = replace(source.limits, context_tokens=min(bounds, default=None))
        self.info = EngineInfo(name=server.name, reason=self._fit.reason, version=self._fit.software)

    async def _connect(self, source: EngineSource) -> tuple[ServerClient, ServerFit]:
        client = ServerClient(self._server)
        try:
            return client, await find_fit(client, self._server, source)
        except BaseException:
            await client.close()
            raise

    async def _release(self) -> None:
        if self._client is not None:
            await self._client.close()

    @property
    def forms(self) -> frozenset[str]:
        """The kinds of form that the server holds texts to."""
        return self._fit.forms

    def _check(self, requests: Sequence[Request]) -> None:
        fit = self._fit
        check_requests(requests, self._server, self.limits, adapters=fit.adapters, forms=fit.forms, lacking=fit.lacking)
        if fit.gives_ids:
            return
        for request in requests:
            if request.options.logprobs is not None:
                msg = f"logprobs={request.options.logprobs!r} takes token ids, which this server does not give."
                raise InvalidOptionError(msg)
            if not request.options.skip_special_tokens:
                msg = (
                    "special tokens are to be in the text, by skip_special_tokens=False or for the model's format of "
                    "calls or reasoning, and this server gives texts without them; use a server that gives token ids."
                )
                raise InvalidOptionError(msg)
            if set(request.eos_token_ids) != set(self.limits.eos_token_ids):
                msg = (
                    f"eos_token_id={list(request.eos_token_ids)!r} takes token ids, which this server does not give; "
                    "leave it out, or name strings in stop=."
                )
                raise InvalidOptionError(msg)

    async def _answer(self, completion: Completion, tasks: StreamTasks) -> None:
        """Send a request until it has ended, again as long as nothing has come."""
        assert self._client is not None
        attempts = Attempts(self._server.max_retries)
        body = self._body(completion.request)
        while True:
            answer = Answer(completion, tasks, self._fit, self._tokenizer)
            try:
                await answer.read(self._client, body)
            except LostAnswerError as lost:
                if answer.has_begun:
                    raise lost.error from lost.__cause__
                await attempts.pause(lost)
            else:
                return

    def _body(self, request: Request) -> dict[str, Any]:
        """Write a request in the server's terms: every option by its value, as servers have defaults of their own."""
        options, fit = request.options, self._fit
        adapter = None if options.adapter == BASE_ADAPTER else options.adapter
        body: dict[str, Any] = {
            "model": fit.model if adapter is None else fit.adapters[adapter],
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": options.temperature if options.do_sample else 0.0,
            "top_p": options.top_p if options.do_sample else 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.do_sample:
            body["seed"] = llamacpp.seed_of(_seed(request)) if fit.is_llamacpp else _seed(request)
        if fit.is_llamacpp:
            body |= llamacpp.fields(request)
        if not fit.gives_ids:
            if request.stop_token_ids:
                body["stop"] = [self._tokenizer.decode([i]) for i in request.stop_token_ids]
            return body
        # Tokens that the server would end at, and this request does not, are not to end it: it ends here then. A text
        # of a form ends at the model's own end tokens too, which an automaton chooses when the text is complete.
        own_ends = set(self.limits.eos_token_ids)
        goes_on = request.form is None and (options.ignore_eos or not own_ends <= set(request.eos_token_ids))
        body |= {
            "top_k": options.top_k if options.do_sample else 0,
            "min_p": options.min_p if options.do_sample else 0.0,
            "repetition_penalty": options.repetition_penalty,
            "min_tokens": request.min_new_tokens,
            "stop_token_ids": [] if goes_on else sorted(set(request.end_token_ids)),
            "ignore_eos": goes_on,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if options.logprobs is not None:
            body |= {"logprobs": options.logprobs, "return_tokens_as_token_ids": True}
        if options.priority:
            body["priority"] = options.priority
        if options.cache_salt is not None or not request.shares_prefix:
            body["cache_salt"] = secrets.token_hex(16) if not request.shares_prefix else options.cache_salt
        if request.form is not None:
            value = request.form.value
            body["structured_outputs"] = {request.form.kind: list(value) if isinstance(value, tuple) else value}
        return body


def _seed(request: Request) -> int:
    """Derive the seed of a sample: the call's own for the first one, and another for each of the others."""
    if request.sample_index == 0 and 0 <= request.seed < _MOST_SEED:
        return request.seed
    digest = hashlib.sha256(f"{request.seed}:{request.sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _MOST_SEED
