"""What came with an answer: its tokens and its time.

Owns the line that is shown below an answer. Prints nothing.
"""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import BaseCallbackHandler


class LastAnswer(BaseCallbackHandler):
    """Keeps the usage and timing of the last answer."""

    info: dict[str, Any]

    def __init__(self) -> None:
        self.info = {}

    def on_llm_end(self, response: Any, **_: Any) -> None:
        """Note what came with the answer."""
        generation = response.generations[0][0]
        message = getattr(generation, "message", None)  # of a chat model
        self.info = generation.generation_info or {}
        if message is not None:
            self.info = {**message.response_metadata, "usage_metadata": message.usage_metadata}

    def line(self) -> str:
        """Say it in one line."""
        if not self.info:
            return ""
        usage, timing = self.info["usage_metadata"], self.info["timing"]
        rate = f", {timing['rate_tok_s']:.1f} tokens/s" if timing["rate_tok_s"] else ""
        return (
            f"{usage['input_tokens']} tokens in, {usage['output_tokens']} out, first after "
            f"{timing['first_token_s']:.2f} s{rate}, ended by {self.info['finish_reason']}"
        )
