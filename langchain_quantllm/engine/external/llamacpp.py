"""llama.cpp's server behind `Server`: its own names of options, and what it has and lacks.

It takes token ids as prompts and gives texts: with their tokens' ids beside them on request, but without those of
characters that several tokens make up, so the ids are not read. Tried with llama.cpp's server of October 2026.

Source: tools/server/README.md of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_quantllm.engine.external.server_client import ServerClient
from langchain_quantllm.engine.request import Request

__all__ = ["FORMS", "LACKING", "OWNER", "fields", "look_at", "seed_of", "tokenize_body"]

OWNER = "llamacpp"
"""Owner of its models."""

LACKING = frozenset({"min_new_tokens", "priority", "cache_salt"})
"""Options of `requests.NEUTRAL` that it does not have."""

FORMS = frozenset({"gbnf"})
"""Forms that it holds texts to."""

_OFF = {
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dry_multiplier": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Samplers that the server may have been started with, each with the value under which it changes nothing."""

_SEEDS = 2**32 - 1
"""The largest number of 32 bits asks for a seed by chance."""


def fields(request: Request) -> dict[str, Any]:
    """Return the fields of a request that OpenAI's protocol does not have."""
    options, penalizes = request.options, request.options.repetition_penalty != 1
    found: dict[str, Any] = {
        **_OFF,
        "top_k": options.top_k if options.do_sample else 0,
        "min_p": options.min_p if options.do_sample else 0.0,
        "repeat_penalty": options.repetition_penalty,
        "repeat_last_n": len(request.prompt_ids) + request.max_new_tokens if penalizes else 0,
        "ignore_eos": options.ignore_eos,
    }
    if request.form is not None:
        found["grammar"] = request.form.value
    return found


def seed_of(seed: int) -> int:
    """Return the seed in its bits."""
    return seed % _SEEDS


def tokenize_body(text: str) -> dict[str, Any]:
    """Return the body of a request for a text's token ids."""
    return {"content": text, "add_special": False}


async def look_at(client: ServerClient) -> tuple[str | None, int | None]:
    """Ask for its build, and for the tokens of prompt and completion in each of its slots; None for what it hides."""
    found = await client.beside("GET", "/props")
    if not isinstance(found, Mapping):
        return None, None
    settings, build = found.get("default_generation_settings"), found.get("build_info")
    length = settings.get("n_ctx") if isinstance(settings, Mapping) else None
    return build if isinstance(build, str) else None, length if isinstance(length, int) and length > 0 else None
