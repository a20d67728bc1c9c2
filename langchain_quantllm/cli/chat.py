"""The conversation of the command chat, in a terminal or through a pipe.

Answers and results of commands go to standard output, all else to standard error. Loads no model.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

from langchain_quantllm.cli.console import err, out, print_error, print_stream, say
from langchain_quantllm.errors import QuantLLMError

COMMANDS = {
    "/help": "list these commands",
    "/clear": "forget the conversation",
    "/system TEXT": "tell the model about its role; without TEXT show its role",
    "/memory": "show the memory of the model",
    "/exit": "leave, as do /quit, /bye and Ctrl-D",
}
"""Commands of a conversation with their meanings."""

_LEAVING = ("/exit", "/quit", "/bye")


class LastAnswer(BaseCallbackHandler):
    """Keeps the usage and timing of the last answer."""

    info: dict[str, Any]

    def __init__(self) -> None:
        self.info = {}

    def on_llm_end(self, response: Any, **_: Any) -> None:
        """Keep the info of the answer."""
        generation = response.generations[0][0]
        message = getattr(generation, "message", None)  # of a chat model
        self.info = generation.generation_info or {}
        if message is not None:
            self.info = {**message.response_metadata, "usage_metadata": message.usage_metadata}

    def line(self) -> str:
        """Tokens, time and reason of the end in one line; empty before the first answer."""
        if not self.info:
            return ""
        usage, timing = self.info["usage_metadata"], self.info["timing"]
        rate = f", {timing['rate_tok_s']:.1f} tokens/s" if timing["rate_tok_s"] else ""
        return (
            f"{usage['input_tokens']} tokens in, {usage['output_tokens']} out, first after "
            f"{timing['first_token_s']:.2f} s{rate}, ended by {self.info['finish_reason']}"
        )


class Conversation:
    """The turns so far, and the model that answers the next one."""

    def __init__(self, llm: Any, system: str | None = None) -> None:
        """Start an empty conversation.

        Args:
            llm: A chat model, or a model that continues texts.
            system: The role of the model; None for no system message.
        """
        self._llm = llm
        self._system = system
        self._turns: list[dict[str, str]] = []

    def run(self) -> None:
        """Read lines and answer them until one leaves or the input ends."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (with it `input` edits lines and remembers them)
        is_typed = sys.stdin.isatty()
        say("/help lists the commands, Ctrl-C stops an answer, /exit or Ctrl-D leaves.")
        while True:
            try:
                line = input(">>> " if is_typed and sys.stdout.isatty() else "")
            except EOFError:
                if is_typed:
                    err.print()
                return
            except KeyboardInterrupt:
                if not is_typed:
                    raise
                say("\n/exit or Ctrl-D leaves.")
                continue
            if line.strip() in _LEAVING:
                return
            if line.startswith("/"):
                command, _, text = line.partition(" ")
                self._obey(command.strip(), text.strip())
            elif text := line.strip():
                self._answer(text)

    def _obey(self, command: str, text: str) -> None:
        """Carry out one of `COMMANDS`."""
        if command == "/help":
            lines = [f"{name:<14}{meaning}" for name, meaning in COMMANDS.items()]
            out.print("\n".join(lines), markup=False, highlight=False)
        elif command == "/clear":
            self._turns.clear()
            say("The conversation is forgotten.")
        elif command == "/memory":
            out.print(str(self._llm.memory_report()), markup=False, highlight=False, soft_wrap=True)
        elif command != "/system":
            say(f"There is no command {command}; /help lists them. With a space before it, a line is sent as it is.")
        elif text:
            self._system = text
            say("The model has this role from now on.")
        else:
            say(self._system or "The model has no role.")

    def _answer(self, text: str) -> None:
        """Stream one answer and keep the turn; of a stopped answer the text shown, of a failed or empty one nothing."""
        turns = [*self._turns, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        answer, shown = LastAnswer(), list[str]()
        try:
            print_stream(self._llm.stream([*system, *turns], {"callbacks": [answer]}), shown=shown)
            note = answer.line()
        except KeyboardInterrupt:
            out.print()
            note = "stopped; the text so far stays in the conversation"
            if not "".join(shown).strip():
                say("stopped; the turn is forgotten")
                return
        except QuantLLMError as error:
            print_error(str(error))
            return
        self._turns = [*turns, {"role": "assistant", "content": "".join(shown)}]
        say(note)
