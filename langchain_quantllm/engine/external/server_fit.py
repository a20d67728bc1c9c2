"""What a server has and can do, found out once: its models, its tokens, its options, and whether they are ours.

Owns the table of known kinds of servers, and the probes. Knows a client and a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from langchain_quantllm.engine.external import llamacpp
from langchain_quantllm.engine.external.requests import NEUTRAL
from langchain_quantllm.engine.external.server_client import ServerClient
from langchain_quantllm.engine.external.server_options import ServerOptions
from langchain_quantllm.engine.external.spec import FORMS, EngineSource
from langchain_quantllm.errors import InvalidOptionError, ServerError, UnsupportedError, nearest

PROBE = "The sea, 3.14 km² wide — naïve café; été 東京 🌊\n\tdef f(x): return {'a': x**2}"
"""A text that tokenizers of different models write in different ids."""

_PROBED_IDS = 64
_PROBED_CHOICE = "quantllm"
"""A text that no model begins with by itself behind `PROBE`."""


@dataclass(frozen=True, kw_only=True)
class ServerFit:
    """What was found out about a server.

    Args:
        software: The kind of server, and its version if it tells: `"vllm 0.32.0"`.
        model: The name of the model there.
        adapters: The names of the models there that stand for adapters, by the adapters' names here.
        context_tokens: Most tokens of prompt and completion; None if it does not tell.
        gives_ids: Whether answers have the ids of their tokens. Else texts are tokenized again here.
        is_llamacpp: Whether its options have llama.cpp's names.
        lacking: Options of `requests.NEUTRAL` that it does not have.
        forms: The kinds of `OutputForm` that it holds texts to.
        compared: What of the tokenizer was compared with ours, in words.
    """

    software: str
    model: str
    adapters: Mapping[str, str]
    context_tokens: int | None
    gives_ids: bool
    is_llamacpp: bool
    lacking: frozenset[str]
    forms: frozenset[str]
    compared: str

    @property
    def reason(self) -> str:
        """What `engine_info` says of it."""
        tokens = "its token ids are read" if self.gives_ids else "it gives no token ids, so texts are tokenized again"
        parts = [f"asked for; {self.software} runs {self.model!r}", tokens, self.compared]
        if self.lacking:
            parts.append(f"it lacks {', '.join(sorted(self.lacking))}")
        return "; ".join(parts)


async def find_fit(client: ServerClient, server: ServerOptions, source: EngineSource) -> ServerFit:
    """Ask a server what it has and can do, and compare its model and tokenizer with ours.

    Args:
        client: The connections to it.
        server: The options.
        source: Our model.

    Raises:
        ServerError: If it does not answer as a server should.
        InvalidOptionError: If it does not have the model or an adapter.
        UnsupportedError: If it takes no token ids, or has another tokenizer.
    """
    cards = {str(card["id"]): card for card in await client.models()}
    model = _choose(server, source, cards)
    adapters = {name: _choose_adapter(server, name, given, cards) for name, given in source.adapters.items()}
    owner = str(cards[model].get("owned_by") or "a server")
    choice, is_strict = await _probe(client, model, source)
    gives_ids = _is_ids(choice.get("token_ids"))
    known = owner if owner == llamacpp.OWNER else ""
    if gives_ids:
        _check_decoding(server, source, choice)
        if owner in _LACKING:
            known = owner
        elif await _holds_forms(client, model, source):  # servers over vLLM name themselves otherwise
            known = "vllm"
    number, length = None, cards[model].get("max_model_len")
    if known == llamacpp.OWNER:
        number, length = await llamacpp.look_at(client)
    elif isinstance(version := await client.beside("GET", "/version"), Mapping):
        number = version.get("version")
    return ServerFit(
        software=owner if number is None else f"{owner} {number}",
        model=model,
        adapters=adapters,
        context_tokens=length if isinstance(length, int) and length > 0 else None,
        gives_ids=gives_ids,
        is_llamacpp=known == llamacpp.OWNER,
        lacking=_LACKING[known],
        forms=_FORMS[known],
        compared=await _compare(
            client, server, source, model, is_strict=is_strict, is_llamacpp=known == llamacpp.OWNER
        ),
    )


_LACKING: Mapping[str, frozenset[str]] = {
    "vllm": frozenset(),
    "langchain-quantllm": frozenset({"priority"}),
    llamacpp.OWNER: llamacpp.LACKING,
    "": frozenset(NEUTRAL),
}
"""Options that kinds of servers lack; one of another kind may have more than are used."""

_FORMS: Mapping[str, frozenset[str]] = {
    "vllm": frozenset(FORMS) - {"json", "gbnf"},
    "langchain-quantllm": frozenset({"json", "regex", "choice", "grammar"}),
    llamacpp.OWNER: llamacpp.FORMS,
    "": frozenset(),
}
"""Forms that kinds of servers hold texts to. JSON is a structural tag for vLLM, with our layout: of its own form, any
white space is part, and a model may write nothing else until its tokens run out."""


def _choose(server: ServerOptions, source: EngineSource, cards: Mapping[str, Mapping[str, Any]]) -> str:
    """Choose the server's model that is ours."""
    bases = [name for name, card in cards.items() if not card.get("parent")] or list(cards)
    if server.model is not None:
        if server.model in cards:
            return server.model
        msg = f"{server.url} has no model {server.model!r}; its models are {', '.join(map(repr, cards)) or 'none'}."
        raise InvalidOptionError(msg)
    own = PurePath(source.model_id).name
    named = [n for n in bases if source.model_id in (n, cards[n].get("root"))]
    named = named or [n for n in bases if own in (PurePath(n).name, PurePath(str(cards[n].get("root"))).name)]
    if len(named) == 1 or (not named and len(bases) == 1):
        return (named or bases)[0]
    msg = (
        f"{server.url} has {len(bases)} models, and which one is {source.model_id} is not clear; name it, "
        f"Server(model=...): {', '.join(map(repr, bases)) or 'none'}."
    )
    raise InvalidOptionError(msg)


def _choose_adapter(server: ServerOptions, name: str, given: str, cards: Mapping[str, Any]) -> str:
    for known in (name, given, PurePath(given).name):
        if known in cards:
            return known
    msg = (
        f"adapter {name!r} is no model of {server.url}{nearest(name, cards)} The server loads adapters, such as vLLM "
        f"with --enable-lora --lora-modules {name}=FOLDER."
    )
    raise InvalidOptionError(msg)


async def _probe(client: ServerClient, model: str, source: EngineSource) -> tuple[Mapping[str, Any], bool]:
    """Request one token for given ids; returns the choice, and whether the server refuses fields it does not know."""
    ids = source.tokenizer.encode(PROBE, add_special_tokens=False)[:_PROBED_IDS]
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0}
    try:
        return await client.complete({**body, "return_token_ids": True}), False
    except InvalidOptionError:
        pass
    try:
        return await client.complete(body), True
    except InvalidOptionError as error:
        msg = f"the server takes no token ids as prompt, which all of this package's prompts are: {error}"
        raise UnsupportedError(msg) from error


async def _holds_forms(client: ServerClient, model: str, source: EngineSource) -> bool:
    """Whether a server holds a text to a form in vLLM's terms: others leave out in silence what they do not know."""
    ids = source.tokenizer.encode(PROBE, add_special_tokens=False)[:_PROBED_IDS]
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    try:
        choice = await client.complete({**body, "structured_outputs": {"choice": [_PROBED_CHOICE]}})
    except (InvalidOptionError, ServerError):
        return False
    found = choice.get("token_ids")
    if found is None or not _is_ids(found) or any(not 0 <= i < source.limits.vocab_size for i in found):
        return False
    begin = source.tokenizer.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return bool(begin) and _PROBED_CHOICE.startswith(begin)


def _check_decoding(server: ServerOptions, source: EngineSource, choice: Mapping[str, Any]) -> None:
    """Check that the ids of an answer are of our vocabulary."""
    ids = choice["token_ids"]
    if any(not 0 <= i < source.limits.vocab_size for i in ids):
        raise _other_tokenizer(
            server, source, f"it has written token {max(ids)}, and ours end at {len(source.tokenizer)}"
        )


async def _compare(
    client: ServerClient,
    server: ServerOptions,
    source: EngineSource,
    model: str,
    *,
    is_strict: bool,
    is_llamacpp: bool,
) -> str:
    """Compare the server's tokenizer with ours, by ids or by text.

    Returns:
        What was compared, in words.

    Raises:
        UnsupportedError: If it is another one.
    """
    ours = source.tokenizer.encode(PROBE, add_special_tokens=False)
    body = {"model": model, "prompt": PROBE, "add_special_tokens": False}
    answer = await client.beside("POST", "/tokenize", llamacpp.tokenize_body(PROBE) if is_llamacpp else body)
    theirs = answer.get("tokens") if isinstance(answer, Mapping) else None
    if theirs is not None and _is_ids(theirs):
        if list(theirs) != ours:
            raise _other_tokenizer(server, source, f"{PROBE[:7]!r}... is {theirs[:6]} there, and {ours[:6]} here")
        return "its tokenizer gives our ids"
    decoded = source.tokenizer.decode(ours, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not is_strict:
        try:
            echo = await client.complete(
                {"model": model, "prompt": ours, "max_tokens": 1, "temperature": 0, "echo": True}
            )
        except (InvalidOptionError, ServerError):
            echo = {}
        text = echo.get("text")
        if isinstance(text, str) and len(text) >= len(decoded):
            if not text.strip().startswith(decoded.strip()):
                raise _other_tokenizer(server, source, f"our ids of {decoded[:9]!r} are {text[:9]!r} there")
            return "its tokenizer reads our ids"
    return "its tokenizer could not be compared with ours"


def _other_tokenizer(server: ServerOptions, source: EngineSource, how: str) -> UnsupportedError:
    return UnsupportedError(
        f"{server.url} has another tokenizer than {source.model_id}: {how}. Give the model_id that the server runs."
    )


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(type(i) is int for i in value)
    )
