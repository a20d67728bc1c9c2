"""The engine protocol and its requests: token ids with all that decides their completion.

Knows no model, no tensor and no tokenizer.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from typing_extensions import Self

from langchain_quantllm.engine.stream import ChunkStream
from langchain_quantllm.errors import InvalidOptionError, PromptTooLongError
from langchain_quantllm.options import DEFAULT_MAX_NEW_TOKENS, GenerationOptions


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """The limits of a model's requests.

    Args:
        context_tokens: Most tokens of prompt and completion together; None where the model has no limit.
        vocab_size: Token ids lie below this.
        eos_token_ids: Tokens that end a text.
        pad_token_id: Pads the left of shorter prompts in a batch.
        cache_tokens: Most tokens that the engine's KV cache holds; None where it grows as it needs to.
    """

    context_tokens: int | None
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    cache_tokens: int | None = None


class TokenMask(Protocol):
    """The tokens that a sequence may go on with, step by step: the hook for constrained decoding.

    Attributes:
        ended: Whether the text is complete although no end token was sampled. Read after `fill`; it ends the sequence.
    """

    ended: bool

    def fill(self, bits: Any) -> bool:
        """Set a bit for each allowed token.

        Args:
            bits: A tensor on the CPU of shape `(1, ceil(vocab / 32))`, int32, all ones; the lowest bit of a word
                stands for its first token.

        Returns:
            False if every token is allowed; the bits are then ignored.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Advance by the token that was sampled."""
        ...


@runtime_checkable
class ForeseeingMask(TokenMask, Protocol):
    """A mask that can be filled some tokens ahead, so that several tokens may be written in one step."""

    def fork(self) -> Self:
        """Return a mask in the same state, which goes on by itself."""
        ...

    def forced(self, most: int) -> list[int]:
        """Return up to `most` tokens that come next, where the mask leaves one way, or nearly so.

        Called at any time; it changes no mask. The tokens are verified, so some may be wrong.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class OutputForm:
    """The form that an engine of others is to hold a text to, by an automaton of its own; see `Request.mask` for ours.

    Args:
        kind: `"json"`, `"regex"`, `"choice"`, `"grammar"`, `"structural_tag"` or `"gbnf"`, by the names that servers
            have.
        value: A JSON schema as JSON text, a regular expression, the texts to choose from, a grammar in EBNF,
            xgrammar's structural tag as JSON text, or a grammar in llama.cpp's notation.
    """

    kind: str
    value: str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt as token ids, with the options of its completion.

    Args:
        prompt_ids: Token ids, at least one.
        max_new_tokens: At least 1, and within the context together with the prompt.
        min_new_tokens: No end token before so many.
        options: The resolved options of the call.
        sample_index: Which of the call's `n` samples this is; each has its own random numbers.
        seed: Seed of the random numbers; always set, so that a result can be repeated.
        eos_token_ids: Tokens that end the text.
        stop_token_ids: Special tokens that the call named as stop strings; they end the text too.
        max_rows: Maximum number of the owner's sequences at the same time; None leaves it to the engine.
        owner: Stands for the object that `max_rows` is a setting of.
        shares_prefix: Whether it shares KV cache blocks of its prompt's beginning with other requests.
        mask: Makes the mask of the sequence's tokens; called once per sequence.
        form: The form of its text, in place of `mask`, for engines of others.
        reported_ids: Tokens whose log probabilities are reported at each step, in place of the likeliest ones; with
            `options.logprobs` only.
        media: Further tensors for the model, such as the pixels of images, by the names of its forward's arguments.
        images: The images among them as the fast engine reads them; made by its `submit`.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    min_new_tokens: int
    options: GenerationOptions
    sample_index: int
    seed: int
    eos_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...] = ()
    max_rows: int | None = None
    owner: int | None = None
    shares_prefix: bool = True
    mask: Callable[[], TokenMask] | None = None
    form: OutputForm | None = None
    reported_ids: tuple[int, ...] = ()
    media: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    images: Any = field(default=None, repr=False, compare=False)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """All tokens that end the text."""
        return self.eos_token_ids + self.stop_token_ids

    def random_numbers(self) -> random.Random:
        """Make the generator of the request's random numbers: one for each token, the same for the same seed."""
        return random.Random(f"{self.seed}:{self.sample_index}")  # noqa: S311  (no secrets here)


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """The engine that runs a model, and why it was chosen.

    Args:
        name: `"fast"` or `"pipeline"`; `"server"` or `"vllm"` for one that others keep.
        reason: Why this engine, and which of its features cannot be used.
        graphs: Whether decode steps are CUDA graphs.
        kv_cache_tokens: Tokens that its KV cache holds; None where it grows as it needs to.
        kv_cache_bytes: Bytes of that KV cache.
        kv_cache_dtype: Its dtype: that of the model, `"fp8"` or `"int8"`; None where it is not known.
        state_bytes: Bytes of the states that layers keep beside it, for all sequences; None if no layer keeps any.
        fused: How many modules run by this package's kernels, by kind; see docs/engine.md.
        batch_invariant: Whether a text is the same, bit for bit, whatever runs beside it.
        tuned: The measurements of `bench --tune` that its linear layers follow, in words; None without any.
        version: Name and version of the software that runs the model, for an engine of others; None where it is not
            known, and for engines of this package.
        no_speculation_reason: Why a step gives one token to each sequence; None if it can verify proposals of several.
        proposed_tokens: Tokens proposed so far, several a step.
        accepted_tokens: Those of them that were right.
        draft_models: The draft models that propose.
        no_draft_reason: Why one that was asked for does not, or no more.
    """

    name: str
    reason: str
    graphs: bool = False
    kv_cache_tokens: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str | None = None
    state_bytes: int | None = None
    fused: Mapping[str, int] = field(default_factory=dict)
    batch_invariant: bool = False
    tuned: str | None = None
    version: str | None = None
    no_speculation_reason: str | None = None
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    draft_models: tuple[str, ...] = ()
    no_draft_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """The sequences of an engine at one moment.

    Args:
        running: Sequences in its batch.
        waiting: Sequences that wait for a place.
        cache_tokens: Tokens' places in the KV cache that sequences hold, in whole blocks; None where nobody counts.
    """

    running: int
    waiting: int
    cache_tokens: int | None = None


class Engine(Protocol):
    """An engine runs requests. Any number of threads and event loops may submit at once."""

    @property
    def info(self) -> EngineInfo:
        """The engine's name, and why it was chosen."""
        ...

    @property
    def load(self) -> EngineLoad:
        """Its sequences at this moment. Any thread may ask."""
        ...

    @property
    def limits(self) -> ModelLimits:
        """The limits of its model's requests."""
        ...

    @property
    def peak_cache_tokens(self) -> int:
        """Most tokens, padding included, that the KV cache has held at once."""
        ...

    def submit(
        self,
        requests: Sequence[Request],
        timeout_s: float | None = None,
        *,
        in_pieces: bool = True,
        max_waiting: int | None = None,
    ) -> ChunkStream:
        """Queue requests and return the stream of their chunks; closing it cancels them.

        Args:
            requests: The requests, as `plan_requests` makes them.
            timeout_s: Seconds after which the stream raises.
            in_pieces: Stream text as it comes; if false, a request may get all its text in its last chunk.
            max_waiting: Refuse the requests if so many others wait already; None for no such bound.

        Raises:
            QueueFullError: If more wait than `max_waiting` allows.
        """
        ...

    def close(self) -> None:
        """Cancel all requests and release the model."""
        ...


_REMEDIES = (
    "shorten it, or pass truncation='left' to drop its beginning",
    "give fewer or smaller images, shorter sounds, or less text",
)
"""What to do about a prompt that is too long: of text, and with images or sounds."""


def plan_requests(
    prompt_ids: Sequence[int],
    options: GenerationOptions,
    limits: ModelLimits,
    *,
    truncation_side: str = "left",
    stop_token_ids: Sequence[int] = (),
    max_rows: int | None = None,
    owner: int | None = None,
    shares_prefix: bool = True,
    mask: Callable[[], TokenMask] | None = None,
    form: OutputForm | None = None,
    media: Mapping[str, Any] | None = None,
) -> list[Request]:
    """Fit a prompt into the model's context and make the `n` requests of a call.

    Args:
        prompt_ids: Token ids of the prompt.
        options: The resolved options.
        limits: The limits of the engine's model.
        truncation_side: The end that `truncation=True` cuts: the tokenizer's declared one.
        stop_token_ids: Special tokens that the call named as stop strings.
        max_rows: Maximum number of the owner's sequences at the same time.
        owner: Stands for the object that `max_rows` is a setting of.
        shares_prefix: Whether KV cache blocks of the prompt's beginning may be shared.
        mask: Makes the mask of a sequence's tokens.
        form: The form of the texts, for engines of others.
        media: Further tensors for the model.

    Returns:
        One request for each sample.

    Raises:
        InvalidOptionError: If ids are outside of the vocabulary or missing, or `max_new_tokens` leaves no room for any.
        PromptTooLongError: If the prompt leaves no room for a token and is not to be truncated.
    """
    _check_ids(prompt_ids, options, limits)
    bounds = (limits.context_tokens, limits.cache_tokens, options.max_length)
    total = min((n for n in bounds if n is not None), default=None)
    ids = tuple(prompt_ids)
    if options.truncation and total is not None:
        room = _room_for_prompt(options, limits, total)
        side = truncation_side if options.truncation is True else options.truncation
        if len(ids) > room and media is None:  # the tokens of an image cannot be cut
            ids = ids[-room:] if side == "left" else ids[:room]
    if total is not None:
        _check_length(len(ids), options, limits, total, has_media=media is not None)
    new = [n for n in (options.max_new_tokens, None if total is None else total - len(ids)) if n is not None]
    max_new_tokens = min(new, default=1)
    first = Request(
        prompt_ids=ids,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(max(options.min_new_tokens, options.min_length - len(ids)), max_new_tokens),
        options=options,
        sample_index=0,
        seed=secrets.randbits(63) if options.seed is None else options.seed,
        eos_token_ids=limits.eos_token_ids if options.eos_token_id is None else options.eos_token_id,
        stop_token_ids=tuple(stop_token_ids),
        max_rows=max_rows,
        owner=owner,
        shares_prefix=shares_prefix,
        mask=mask,
        form=form,
        media=media,
    )
    return [first, *(replace(first, sample_index=i) for i in range(1, options.n))]


def _check_ids(prompt_ids: Sequence[int], options: GenerationOptions, limits: ModelLimits) -> None:
    if not prompt_ids:
        msg = "the prompt is empty; give at least one character to continue."
        raise InvalidOptionError(msg)
    if outside := [i for i in prompt_ids if not 0 <= i < limits.vocab_size]:
        msg = f"token id {outside[0]} is not in the model's vocabulary of {limits.vocab_size}; is this its tokenizer?"
        raise InvalidOptionError(msg)
    if outside := [i for i in (options.eos_token_id or ()) if i >= limits.vocab_size]:
        msg = f"eos_token_id={outside[0]} is not in the model's vocabulary of {limits.vocab_size}."
        raise InvalidOptionError(msg)


def _room_for_prompt(options: GenerationOptions, limits: ModelLimits, total: int) -> int:
    """Compute how many of `total` tokens a truncated prompt may have."""
    wanted = options.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    # A default length takes half of the context at most.
    room = total - (wanted if options.asked_new_tokens else min(wanted, max(1, total // 2)))
    if room < 1:
        msg = (
            f"max_new_tokens={wanted} leaves no room for a prompt in the {total} tokens of "
            f"{_limit_name(options, limits)}; ask for fewer."
        )
        raise InvalidOptionError(msg)
    return room


def _check_length(
    prompt_tokens: int, options: GenerationOptions, limits: ModelLimits, total: int, *, has_media: bool
) -> None:
    if prompt_tokens >= total:
        msg = (
            f"the prompt has {prompt_tokens} tokens and {_limit_name(options, limits)} allows {total} with the "
            f"completion; {_REMEDIES[has_media]}."
        )
        raise PromptTooLongError(msg)
    tokens = prompt_tokens + (options.max_new_tokens or 0)
    if options.asked_new_tokens and limits.cache_tokens == total and tokens > total:
        msg = (
            f"the prompt's {prompt_tokens} tokens and max_new_tokens={options.max_new_tokens} need {tokens} in the KV "
            f"cache, which holds {total}; raise kv_cache_memory, or ask for fewer."
        )
        raise PromptTooLongError(msg)


def _limit_name(options: GenerationOptions, limits: ModelLimits) -> str:
    names = {
        "the model's context": limits.context_tokens,
        "the KV cache (see kv_cache_memory)": limits.cache_tokens,
        f"max_length={options.max_length}": options.max_length,
    }
    return min((n for n in names if names[n] is not None), key=lambda n: names[n] or 0)
