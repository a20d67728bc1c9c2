"""`Server`: an OpenAI-compatible server as the engine of a model. `server_engine` talks to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_quantllm.engine.external.server_options import ServerOptions
from langchain_quantllm.engine.external.spec import EngineSource

if TYPE_CHECKING:
    from langchain_quantllm.engine.external.server_engine import ServerEngine


class Server(ServerOptions):
    """A server that speaks OpenAI's protocol as the engine: vLLM, SGLang, Ray Serve LLM, `langchain-quantllm serve`.

    No weights are loaded here. The tokenizer is: prompts go to the server as token ids, and its tokens become text
    here, so chat templates, tool calls, reasoning and stop strings are the same as with any other engine.

    Args:
        url: The base of the server's addresses, `"http://host:8000/v1"`; `/v1` may be left out.
        api_key: The server's key; None reads `QUANTLLM_API_KEY`. It is never shown, serialized or pickled.
        model: The name of the model at the server; None takes that of `model_id`, or the only one that it has.
        max_retries: Times that a request is sent again after a failed connection, an overloaded server (429) or an
            error of its own (5xx), as long as no token has come.
        max_connections: Most requests that are at the server at once; others wait here, the oldest first.
        connect_timeout_s: Seconds after which a connection that is not established has failed.
        read_timeout_s: Seconds without a byte of an answer after which it has failed; None waits for ever. A call's
            `timeout` counts beside it.

    Raises:
        InvalidOptionError: If a value is not allowed.
    """

    def open(self, source: EngineSource) -> ServerEngine:
        """Connect to the server, learn what it can do, and check that its model and tokenizer are ours."""
        from langchain_quantllm.engine.external.server_engine import ServerEngine

        return ServerEngine(self, source)
