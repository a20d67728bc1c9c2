"""Generation options: every name that is known, what it allows, and which layer wins.

Owns the table of options, their checks and aliases, and the one rule for defaults: the
call's value, else the field's, else the checkpoint's generation config, else greedy with
256 new tokens. Knows neither LangChain nor torch, and no tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from langchain_quantllm.data.counterparts import COUNTERPARTS, Kind, advice, names_advised, written
from langchain_quantllm.errors import InvalidOptionError, closest

DEFAULT_MAX_NEW_TOKENS = 256
"""Most tokens that a request makes where nothing else says how many."""

BASE_ADAPTER = "base"
"""Name that stands for the model without any adapter."""


class _Check(NamedTuple):
    passes: Callable[[Any], bool]
    allowed: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_ids(value: Any) -> bool:
    ids = value if isinstance(value, list | tuple) else [value]
    return all(_is_int(v) and v >= 0 for v in ids)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) and v for v in value)


def _at_least(low: int) -> _Check:
    return _Check(lambda v: _is_int(v) and v >= low, f"a whole number of at least {low}")


_BOOL = _Check(lambda v: isinstance(v, bool), "True or False")
_FRACTION = _Check(lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and up to 1")
_CUTOFF = _Check(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
_POSITIVE = _Check(lambda v: _is_number(v) and v > 0, "a number above 0")
_ANY = _Check(lambda v: True, "what transformers' GenerationConfig takes")

OWN: Mapping[str, _Check] = {
    "max_new_tokens": _at_least(1),
    "max_length": _at_least(1),
    "min_new_tokens": _at_least(0),
    "min_length": _at_least(0),
    "do_sample": _BOOL,
    "temperature": _Check(lambda v: _is_number(v) and v >= 0, "a number of at least 0, where 0 is greedy"),
    "top_k": _Check(lambda v: _is_int(v) and v >= 0, "a whole number of at least 0, where 0 keeps every token"),
    "top_p": _FRACTION,
    "min_p": _Check(lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "top_h": _FRACTION,
    "typical_p": _FRACTION,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "repetition_penalty": _POSITIVE,
    "seed": _Check(_is_int, "a whole number"),
    "n": _at_least(1),
    "stop": _Check(_is_strings, "a list of strings, none of them empty"),
    "ignore_eos": _BOOL,
    "logprobs": _Check(
        lambda v: isinstance(v, bool) or (_is_int(v) and v >= 0), "True, or how many alternatives to list as well"
    ),
    "truncation": _Check(lambda v: isinstance(v, bool) or v in ("left", "right"), "True, False, 'left' or 'right'"),
    "return_full_text": _BOOL,
    "add_special_tokens": _BOOL,
    "skip_special_tokens": _BOOL,
    "timeout": _Check(lambda v: _is_number(v) and v > 0, "a number of seconds above 0"),
    "eos_token_id": _Check(_is_ids, "a token id, or a list of them"),
    "adapter": _Check(lambda v: isinstance(v, str) and bool(v), f"the name of an adapter, or {BASE_ADAPTER!r}"),
}
"""Options that every engine carries out itself, row by row."""

GENERATE: Mapping[str, _Check] = {
    "num_beams": _at_least(1),
    "early_stopping": _ANY,
    "length_penalty": _Check(_is_number, "a number"),
    "no_repeat_ngram_size": _at_least(0),
    "encoder_no_repeat_ngram_size": _at_least(0),
    "encoder_repetition_penalty": _POSITIVE,
    "bad_words_ids": _ANY,
    "sequence_bias": _ANY,
    "suppress_tokens": _ANY,
    "begin_suppress_tokens": _ANY,
    "forced_bos_token_id": _ANY,
    "forced_eos_token_id": _ANY,
    "exponential_decay_length_penalty": _ANY,
    "remove_invalid_values": _BOOL,
    "renormalize_logits": _BOOL,
    "guidance_scale": _Check(_is_number, "a number"),
    "prompt_lookup_num_tokens": _at_least(1),
    "max_matching_ngram_size": _at_least(1),
    "max_time": _POSITIVE,
    "use_cache": _BOOL,
    "cache_implementation": _ANY,
    "cache_config": _ANY,
    "max_cache_len": _at_least(1),
    "prefill_chunk_size": _at_least(1),
    "compile_config": _ANY,
    "disable_compile": _BOOL,
    "pad_token_id": _ANY,
    "bos_token_id": _ANY,
    "decoder_start_token_id": _ANY,
}
"""Fields of transformers' GenerationConfig that the pipeline engine hands to `generate` as they are."""

INERT = frozenset(
    {
        "early_stopping",
        "length_penalty",
        "max_matching_ngram_size",
        "renormalize_logits",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "prefill_chunk_size",
        "compile_config",
        "disable_compile",
        "pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
    }
)
"""Fields about caches, padding, compiling and beams: no token of a row that runs without beams depends on them."""

_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...] | None] = {
    "use_cache": (True,),
    "remove_invalid_values": (False,),
    "guidance_scale": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    **dict.fromkeys(INERT),
}
"""Fields that do not change the text where there are neither beams nor padding; None stands for every value."""

_RARE_SAMPLERS = {"top_h": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}

_PROCESSORS = frozenset(
    {
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "bad_words_ids",
        "sequence_bias",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "guidance_scale",
    }
)
"""Those of them that change the scores before a token is chosen."""

_ALIASES: Mapping[str, str] = {
    "max_tokens": "max_new_tokens",
    "num_return_sequences": "n",
    "stop_sequence": "stop",
    "stop_strings": "stop",
    "top_logprobs": "logprobs",
}
_SAMPLERS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_HARMLESS: Mapping[str, tuple[Any, ...]] = {  # values that ask for what happens anyway
    "clean_up_tokenization_spaces": (False,),
    "return_text": (True,),
    "return_tensors": (False,),
    "return_dict_in_generate": (False,),
    "output_scores": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_logits": (False,),
    "prefix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "mirostat": (0,),
    "tfs_z": (1,),
    "best_of": (1,),
    "echo": (False,),
}

_COMMON = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
"""The options that most calls are content with."""


def option_names() -> list[str]:
    """List every option that may be given at a call, aliases included."""
    return [*OWN, *GENERATE, *_ALIASES, "pipeline_kwargs", "skip_prompt", "handle_long_generation"]


_KNOWN = frozenset(option_names())


class Place(NamedTuple):
    """Where options are given, for the words of an error.

    Args:
        kind: The class that is asked.
        owner: Its name.
        fields: Names of its fields.
        calls: Names of the options of a call.
        at_call: Whether it is a call's options, or what the object is made with.
    """

    kind: Kind = "llm"
    owner: str = "QuantizedHuggingFaceLLM"
    fields: frozenset[str] = frozenset()
    calls: frozenset[str] = _KNOWN
    at_call: bool = True


def normalize(given: Mapping[str, Any], *, lenient: bool = False, place: Place = Place()) -> dict[str, Any]:  # noqa: B008
    """Check options and translate their aliases.

    Args:
        given: Options by any known name; None means not given. `pipeline_kwargs` may hold
            more of them, which count as if given beside it.
        lenient: Leave out what is unknown or not allowed instead of raising. For values that
            come out of a checkpoint, not from a user.
        place: Where they are given.

    Returns:
        The options under the names of `OWN` and `GENERATE`.

    Raises:
        InvalidOptionError: If a name is unknown or refused, or a value is not allowed.
    """
    options: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            known = place.calls | place.fields | COUNTERPARTS.keys()
            if not (lenient or place.at_call or name in known):
                raise InvalidOptionError(_unknown(name, value, place))
            continue
        if name == "pipeline_kwargs":
            options.update(normalize(value, lenient=lenient, place=place))
            continue
        if lenient and name not in _KNOWN:
            continue
        try:
            canonical, checked = _normalize_one(name, value, place)
        except InvalidOptionError:
            if lenient:
                continue
            raise
        if canonical == "logprobs" and checked is True and options.get(canonical):
            continue  # top_logprobs said it already, and how many
        if canonical in options and options[canonical] not in (checked, True) and not lenient:
            msg = f"{name}={value!r} contradicts {canonical}={options[canonical]!r}; give one of them."
            raise InvalidOptionError(msg)
        if canonical:
            options[canonical] = checked
    return options


def _normalize_one(name: str, value: Any, place: Place) -> tuple[str, Any]:
    if name == "skip_prompt":
        name, value = "return_full_text", not value
    elif name == "handle_long_generation" and value == "hole":
        name, value = "truncation", "left"
    elif name == "handle_long_generation":
        msg = f"{name}={value!r} is not allowed; it must be 'hole', which is truncation='left' here."
        raise InvalidOptionError(msg)
    name = _ALIASES.get(name, name)
    if name == "stop" and isinstance(value, str):
        value = [value]
    if name == "top_k" and value == -1:  # how other servers say that every token stays
        value = 0
    if name in _HARMLESS and value in _HARMLESS[name]:
        return "", None
    check = OWN.get(name) or GENERATE.get(name)
    if check is None:
        raise InvalidOptionError(_unknown(name, value, place))
    if not check.passes(value):
        msg = f"{name}={value!r} is not allowed; it must be {check.allowed}."
        raise InvalidOptionError(msg)
    if isinstance(value, list) and name in OWN:
        value = tuple(value)
    return name, value


def _unknown(name: str, value: Any, place: Place) -> str:
    """Say what to do for a name that is no option: the counterpart of another library's, or the nearest name."""
    if (told := _advice(name, place)) is not None:
        return f"{written(name, value)} is no option here; {told}."
    if place.at_call and name in place.fields:
        return f"{name} is set when the model is made, not at a call: {place.owner}(..., {written(name, value)})."
    what = f"unknown option {name!r}" if place.at_call else f"{place.owner} has no field {name!r}"
    known = place.calls if place.at_call else place.calls | place.fields
    meant = closest(name, known | COUNTERPARTS.keys())
    if meant is not None and meant not in known and closest(name, COUNTERPARTS, cutoff=0.8) is None:
        meant = closest(name, known)  # of names that are many, and none of ours, the nearest is seldom meant
    if meant is not None and meant not in known and (told := _advice(meant, place)) is not None:
        return f"{what}; if {meant!r} is meant: {told}."
    if meant is not None:
        return f"{what}; did you mean {meant!r}?"
    common = (*(() if place.at_call else ("model_id", "quantization")), *_COMMON)
    return f"{what}; the most used are {', '.join(common)}, and help({place.owner}) has them all."


def _advice(name: str, place: Place) -> str | None:
    told = advice(name, place.kind)
    if told is not None and place.at_call and not place.calls.issuperset(names_advised(told)):
        return f"{told}, when the model is made"
    return told


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What one call asks for, with every default in place. Lengths are in tokens.

    `max_new_tokens` is None where only `max_length` bounds the text. `logprobs` is None where
    none were asked for, else how many alternatives to list. `extra` holds the fields of
    transformers' GenerationConfig that only the pipeline engine carries out.
    """

    max_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_h: float = 1.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    truncation: bool | str = False
    return_full_text: bool = False
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    timeout: float | None = None
    eos_token_id: tuple[int, ...] | None = None
    adapter: str | None = None
    """Name of the adapter that the row runs with, or `BASE_ADAPTER`; None takes the model as it is."""
    asked_new_tokens: bool = False
    """Whether the user, and not a default, chose `max_new_tokens`."""
    extra: Mapping[str, Any] = field(default_factory=dict)


def resolve(layers: Sequence[Mapping[str, Any]], checkpoint: Mapping[str, Any]) -> GenerationOptions:
    """Put layers of options over each other and fill in what none of them says.

    A layer that names a temperature above 0, or another sampling option, without `do_sample`
    asks for sampling; temperature 0 asks for none, whatever else its layer says. In one layer `max_new_tokens` and
    `max_length` may stand together; a layer that names either hides both of those below.

    Args:
        layers: Normalized options, the strongest first: the call's, then the fields'.
        checkpoint: The checkpoint's generation config, normalized; weakest of all.

    Returns:
        The options with every default in place.

    Raises:
        InvalidOptionError: If options contradict each other.
    """
    merged: dict[str, Any] = {}
    asked_new_tokens = False
    for layer in reversed([*layers, checkpoint]):
        values = dict(layer)
        if "do_sample" not in values and layer is not checkpoint and (given := values.keys() & set(_SAMPLERS)):
            if values.get("temperature") == 0:
                values["do_sample"] = False
            elif given:
                values["do_sample"] = True
        if values.get("do_sample") and merged.get("temperature") == 0:  # of a weaker layer
            del merged["temperature"]
        if "max_new_tokens" in values or "max_length" in values:
            merged["max_new_tokens"] = merged["max_length"] = None
            asked_new_tokens = "max_new_tokens" in values
        if "min_new_tokens" in values or "min_length" in values:
            merged["min_new_tokens"] = merged["min_length"] = 0
        merged.update(values)
    if merged.get("temperature") == 0:
        merged["do_sample"], merged["temperature"] = False, 1.0
    if isinstance(logprobs := merged.get("logprobs"), bool):
        merged["logprobs"] = 0 if logprobs else None
    if isinstance(eos := merged.get("eos_token_id"), int):
        merged["eos_token_id"] = (eos,)
    extra = {name: merged.pop(name) for name in list(merged) if name in GENERATE}
    if extra.get("num_beams") == 1:
        del extra["num_beams"]
    if not {"max_new_tokens", "max_length"} & merged.keys():
        merged["max_new_tokens"] = max(DEFAULT_MAX_NEW_TOKENS, merged.get("min_new_tokens", 0))
    options = GenerationOptions(**merged, extra=extra, asked_new_tokens=asked_new_tokens)
    _check_together(options)
    return options


def needs_generate(options: GenerationOptions) -> str | None:
    """Find an option that only transformers' `generate` carries out.

    Args:
        options: The options of a call.

    Returns:
        It with its value, as a user would write it; None where there is none.
    """
    for name, value in options.extra.items():
        harmless = _WITHOUT_EFFECT.get(name, ())
        if harmless is not None and value not in harmless:
            return f"{name}={value!r}"
    for name, default in _RARE_SAMPLERS.items():
        if options.do_sample and getattr(options, name) != default:
            return f"{name}={getattr(options, name)!r}"
    return None


def _check_together(options: GenerationOptions) -> None:
    whole = [name for name in ("num_beams", "prompt_lookup_num_tokens") if name in options.extra]
    if whole and options.do_sample:
        msg = f"{whole[0]}={options.extra[whole[0]]} cannot sample with a seed of its own; add do_sample=False."
        raise InvalidOptionError(msg)
    if whole and options.logprobs is not None:
        msg = f"logprobs and {whole[0]} do not go together; leave one of them out."
        raise InvalidOptionError(msg)
    processed = sorted(options.extra.keys() & _PROCESSORS)
    if processed and options.logprobs is not None:
        msg = f"logprobs would be those after {processed[0]}; leave one of the two out."
        raise InvalidOptionError(msg)
    if options.max_new_tokens is not None and options.min_new_tokens > options.max_new_tokens:
        msg = (
            f"min_new_tokens={options.min_new_tokens} is more than max_new_tokens={options.max_new_tokens}; "
            "raise the one or lower the other."
        )
        raise InvalidOptionError(msg)
