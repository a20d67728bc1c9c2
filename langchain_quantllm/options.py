"""The generation options: their table, their checks, and which layer's value counts.

Owns one table of options, `OPTIONS`, and the rule for defaults: the call's value, else the field's, else the
checkpoint's generation config, else greedy decoding with 256 new tokens. Knows neither LangChain, torch nor a
tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from langchain_quantllm.data.counterparts import COUNTERPARTS, HARMLESS, Kind, advice, names_advised, written
from langchain_quantllm.errors import InvalidOptionError, closest

DEFAULT_MAX_NEW_TOKENS = 256
"""New tokens of a request at most, if neither call, field nor checkpoint says."""

BASE_ADAPTER = "base"
"""The adapter name that stands for the model without any adapter."""


SPECULATIONS = ("draft", "ngram", "forced", "off")
"""Values of `speculation`."""

NO_SPECULATION = SPECULATIONS[-1]
"""The value of `speculation` without any proposals, not even of tokens that a constraint forces."""


class Check(NamedTuple):
    """A test of a value, and the values that pass it, in words."""

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


def _at_least(low: int) -> Check:
    return Check(lambda v: _is_int(v) and v >= low, f"a whole number of at least {low}")


_BOOL = Check(lambda v: isinstance(v, bool), "True or False")
_INT = Check(_is_int, "a whole number")
_NUMBER = Check(_is_number, "a number")
_FRACTION = Check(lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and up to 1")
_CUTOFF = Check(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
_POSITIVE = Check(lambda v: _is_number(v) and v > 0, "a number above 0")
_SECONDS = Check(_POSITIVE.passes, "a number of seconds above 0")
_TEMPERATURE = Check(lambda v: _is_number(v) and v >= 0, "a number of at least 0, where 0 is greedy")
_TOP_K = Check(lambda v: _is_int(v) and v >= 0, "a whole number of at least 0, where 0 keeps every token")
_MIN_P = Check(lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
_STRINGS = Check(_is_strings, "a list of strings, none of them empty")
_LOGPROBS = Check(
    lambda v: isinstance(v, bool) or (_is_int(v) and v >= 0), "True, or how many alternatives to list as well"
)
_SIDE = Check(lambda v: isinstance(v, bool) or v in ("left", "right"), "True, False, 'left' or 'right'")
_IDS = Check(_is_ids, "a token id, or a list of them")
_ADAPTER = Check(lambda v: isinstance(v, str) and bool(v), f"the name of an adapter, or {BASE_ADAPTER!r}")
_SALT = Check(lambda v: isinstance(v, str) and 0 < len(v) <= 256, "a text of 1 to 256 characters")
_SPECULATION = Check(lambda v: v in SPECULATIONS, ", ".join(map(repr, SPECULATIONS)))
ANY = Check(lambda v: True, "a value that transformers' GenerationConfig takes")


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option: its check, and who carries it out.

    Args:
        check: The values that are allowed.
        aliases: Other names of it.
        samples: A layer that names it asks for sampling.
        pipeline_only: Only the pipeline engine carries it out, by transformers' `generate`.
        neutral: Values of a pipeline-only option that change no text, so that any engine may run the request.
        inert: No text depends on it without beam search: it is about caches, padding, compiling or beams.
        changes_scores: It changes the scores before a token is chosen, so `logprobs` would report other ones.
        runs_alone: With it the pipeline engine runs each sequence in a `generate` call of its own, without our sampler.
    """

    check: Check = ANY
    aliases: tuple[str, ...] = ()
    samples: bool = False
    pipeline_only: bool = False
    neutral: tuple[Any, ...] = ()
    inert: bool = False
    changes_scores: bool = False
    runs_alone: bool = False


def _option(default: Any, check: Check, **more: Any) -> Any:
    """Declare a field of `GenerationOptions` and its entry in `OPTIONS`."""
    return field(default=default, metadata={"option": Option(check=check, **more)})


def _sampling(default: Any, check: Check, **more: Any) -> Any:
    return _option(default, check, samples=True, **more)


def _rare_sampling(default: float, check: Check) -> Any:
    return _sampling(default, check, pipeline_only=True, neutral=(default,))


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The options of one call, with every default in place. Lengths are in tokens.

    Each field but the last three is an option, with its check, in `OPTIONS`.
    """

    max_new_tokens: int | None = _option(DEFAULT_MAX_NEW_TOKENS, _at_least(1), aliases=("max_tokens",))
    """None if `max_length` alone bounds the text."""
    max_length: int | None = _option(None, _at_least(1))
    min_new_tokens: int = _option(0, _at_least(0))
    min_length: int = _option(0, _at_least(0))
    do_sample: bool = _option(False, _BOOL)
    temperature: float = _sampling(1.0, _TEMPERATURE)
    top_k: int = _sampling(0, _TOP_K)
    top_p: float = _sampling(1.0, _FRACTION)
    min_p: float = _sampling(0.0, _MIN_P)
    top_h: float = _rare_sampling(1.0, _FRACTION)
    typical_p: float = _rare_sampling(1.0, _FRACTION)
    epsilon_cutoff: float = _rare_sampling(0.0, _CUTOFF)
    eta_cutoff: float = _rare_sampling(0.0, _CUTOFF)
    repetition_penalty: float = _option(1.0, _POSITIVE)
    seed: int | None = _option(None, _INT)
    n: int = _option(1, _at_least(1), aliases=("num_return_sequences",))
    stop: tuple[str, ...] = _option((), _STRINGS, aliases=("stop_sequence", "stop_strings"))
    ignore_eos: bool = _option(False, _BOOL)
    logprobs: int | None = _option(None, _LOGPROBS, aliases=("top_logprobs",))
    """How many alternatives to report for each token; None reports no log probabilities."""
    truncation: bool | str = _option(False, _SIDE)
    return_full_text: bool = _option(False, _BOOL)
    add_special_tokens: bool = _option(True, _BOOL)
    skip_special_tokens: bool = _option(True, _BOOL)
    timeout: float | None = _option(None, _SECONDS)
    eos_token_id: tuple[int, ...] | None = _option(None, _IDS)
    priority: int = _option(0, _INT)
    """Requests of a lower number go first."""
    cache_salt: str | None = _option(None, _SALT)
    """Prefix caching shares blocks only between requests with the same one."""
    adapter: str | None = _option(None, _ADAPTER)
    """The adapter's name or `BASE_ADAPTER`; None runs the model as it is."""
    speculation: str = _option("forced", _SPECULATION, aliases=("prompt_lookup_num_tokens",))
    """Where the fast engine's proposals of several tokens a step come from; no text depends on it."""
    draft: str | None = None
    """The draft model of `speculation="draft"`, by the key of what is loaded for it."""
    asked_new_tokens: bool = False
    """Whether the user, and not a default, chose `max_new_tokens`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Options that are handed to transformers' `generate`, by name."""


OWN: Mapping[str, Option] = {f.name: f.metadata["option"] for f in fields(GenerationOptions) if "option" in f.metadata}
"""Options that are fields of `GenerationOptions`."""


def _handed_on(check: Check = ANY, **more: Any) -> Option:
    return Option(check=check, pipeline_only=True, **more)


_CHANGES_SCORES, _INERT = _handed_on(changes_scores=True), _handed_on(inert=True)

HANDED_ON: Mapping[str, Option] = {
    "num_beams": _handed_on(_at_least(1), runs_alone=True),
    "no_repeat_ngram_size": _handed_on(_at_least(0), neutral=(0,), changes_scores=True),
    "encoder_no_repeat_ngram_size": _handed_on(_at_least(0), neutral=(0,), changes_scores=True),
    "encoder_repetition_penalty": _handed_on(_POSITIVE, neutral=(1,), changes_scores=True),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "exponential_decay_length_penalty"), _CHANGES_SCORES),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _CHANGES_SCORES),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), _CHANGES_SCORES),
    "guidance_scale": _handed_on(_NUMBER, neutral=(1,), changes_scores=True),
    "max_time": _handed_on(_POSITIVE),
    "use_cache": _handed_on(_BOOL, neutral=(True,)),
    "remove_invalid_values": _handed_on(_BOOL, neutral=(False,)),
    "length_penalty": _handed_on(_NUMBER, inert=True),
    "max_matching_ngram_size": _handed_on(_at_least(1), inert=True),
    "renormalize_logits": _handed_on(_BOOL, inert=True),
    "max_cache_len": _handed_on(_at_least(1), inert=True),
    "prefill_chunk_size": _handed_on(_at_least(1), inert=True),
    "disable_compile": _handed_on(_BOOL, inert=True),
    **dict.fromkeys(("early_stopping", "cache_implementation", "cache_config", "compile_config"), _INERT),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), _INERT),
}
"""Fields of transformers' GenerationConfig that the pipeline engine hands to `generate` unchanged."""

OPTIONS: Mapping[str, Option] = {**OWN, **HANDED_ON}
"""Every option, by its name."""

INERT = frozenset(name for name, option in OPTIONS.items() if option.inert)
"""Options about caches, padding, compiling and beams: without beams, no text depends on them."""

ALIASES: Mapping[str, str] = {alias: name for name, option in OPTIONS.items() for alias in option.aliases}
"""Other names of options."""

OPTION_NAMES = frozenset({*OPTIONS, *ALIASES, "pipeline_kwargs", "skip_prompt", "handle_long_generation"})
"""Every name that a call takes, aliases included."""


class Place(NamedTuple):
    """The place of options, for the words of an error: a class, and its constructor or its calls.

    Args:
        kind: The kind of the class.
        owner: Name of the class.
        fields: Names of its fields.
        calls: Names of the options of a call.
        at_call: True for the options of a call, False for the arguments of the constructor.
    """

    kind: Kind = "llm"
    owner: str = "QuantizedHuggingFaceLLM"
    fields: frozenset[str] = frozenset()
    calls: frozenset[str] = OPTION_NAMES
    at_call: bool = True


def normalize(given: Mapping[str, Any], *, lenient: bool = False, place: Place = Place()) -> dict[str, Any]:  # noqa: B008
    """Check options and translate their aliases.

    Args:
        given: Options by any known name; None means not given. `pipeline_kwargs` may hold more of them, which count
            as if given beside it.
        lenient: Leave out unknown names and wrong values instead of raising, for options that a checkpoint stores.
        place: The class, and whether it is its constructor or a call.

    Returns:
        The options under the names of `OPTIONS`.

    Raises:
        InvalidOptionError: If a name is unknown, a value is not allowed, or two names of one option contradict.
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
        if lenient and name not in OPTION_NAMES:
            continue
        try:
            option, checked = _normalize_one(name, value, place)
        except InvalidOptionError:
            if lenient:
                continue
            raise
        if option is None or (option == "logprobs" and checked is True and options.get(option)):
            continue  # a value without effect, or logprobs=True after top_logprobs, which says how many
        if option in options and options[option] not in (checked, True) and not lenient:
            msg = f"{name}={value!r} contradicts {option}={options[option]!r}; give one of them."
            raise InvalidOptionError(msg)
        options[option] = checked
    return options


def _normalize_one(name: str, value: Any, place: Place) -> tuple[str | None, Any]:
    """Return the option's own name and its value; None as the name if the value changes nothing."""
    if name == "skip_prompt":
        name, value = "return_full_text", not value
    elif name == "handle_long_generation":
        if value != "hole":
            msg = f"{name}={value!r} is not allowed; it must be 'hole', which is truncation='left' here."
            raise InvalidOptionError(msg)
        name, value = "truncation", "left"
    elif name == "prompt_lookup_num_tokens":  # transformers' name; the engine finds the best number by itself
        if not (least := _at_least(1)).passes(value):
            msg = f"{name}={value!r} is not allowed; it must be {least.allowed}."
            raise InvalidOptionError(msg)
        name, value = "speculation", "ngram"
    name = ALIASES.get(name, name)
    if name == "stop" and isinstance(value, str):
        value = [value]
    if name == "top_k" and value == -1:  # other servers' way to keep every token
        value = 0
    if name in HARMLESS and value == HARMLESS[name]:
        return None, None
    if (option := OPTIONS.get(name)) is None:
        raise InvalidOptionError(_unknown(name, value, place))
    if not option.check.passes(value):
        msg = f"{name}={value!r} is not allowed; it must be {option.check.allowed}."
        raise InvalidOptionError(msg)
    return name, tuple(value) if isinstance(value, list) and name in OWN else value


def _unknown(name: str, value: Any, place: Place) -> str:
    """Say what to do about an unknown name: the advice for another library's name, or the nearest known name."""
    if (told := _advice(name, place)) is not None:
        return f"{written(name, value)} is not an option here; {told}."
    if place.at_call and name in place.fields:
        return f"{name} is set when the model is made, not at a call: {place.owner}(..., {written(name, value)})."
    what = f"unknown option {name!r}" if place.at_call else f"{place.owner} has no field {name!r}"
    known = place.calls if place.at_call else place.calls | place.fields
    meant = closest(name, known | COUNTERPARTS.keys())
    if meant is not None and meant not in known and closest(name, COUNTERPARTS, cutoff=0.8) is None:
        meant = closest(name, known)  # other libraries' names are many, so only a very near one is meant
    if meant is not None and meant not in known and (told := _advice(meant, place)) is not None:
        return f"{what}; if {meant!r} is meant: {told}."
    if meant is not None:
        return f"{what}; did you mean {meant!r}?"
    common = "max_new_tokens, temperature, top_p, top_k, seed, stop"
    common = common if place.at_call else f"model_id, quantization, {common}"
    return f"{what}; the most used are {common}, and help({place.owner}) has them all."


def _advice(name: str, place: Place) -> str | None:
    told = advice(name, place.kind)
    if told is not None and place.at_call and not place.calls.issuperset(names_advised(told)):
        return f"{told}, when the model is made"
    return told


def resolve(layers: Sequence[Mapping[str, Any]], checkpoint: Mapping[str, Any]) -> GenerationOptions:
    """Merge layers of options and fill in the defaults.

    A layer that names a temperature above 0, or another sampling option, without `do_sample` asks for sampling;
    temperature 0 asks for greedy decoding, whatever else its layer says. In one layer `max_new_tokens` and
    `max_length` may stand together; a layer that names either hides both of those below.

    Args:
        layers: Normalized options, the strongest layer first: the call's, then the fields'.
        checkpoint: The checkpoint's generation config, normalized; the weakest layer.

    Returns:
        The options with every default in place.

    Raises:
        InvalidOptionError: If options contradict each other.
    """
    merged: dict[str, Any] = {}
    asked_new_tokens = False
    for layer in reversed([*layers, checkpoint]):
        values = dict(layer)
        if "do_sample" not in values and layer is not checkpoint and any(OPTIONS[name].samples for name in values):
            values["do_sample"] = values.get("temperature") != 0
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
    extra = {name: merged.pop(name) for name in list(merged) if name in HANDED_ON}
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
        The option and its value, as a user would write them; None if there is none.
    """
    rare = {name: getattr(options, name) for name in _RARE_SAMPLING} if options.do_sample else {}
    for name, value in {**options.extra, **rare}.items():
        if not OPTIONS[name].inert and value not in OPTIONS[name].neutral:
            return f"{name}={value!r}"
    return None


_RARE_SAMPLING = tuple(name for name, option in OWN.items() if option.pipeline_only)


def _check_together(options: GenerationOptions) -> None:
    whole = next((name for name in HANDED_ON if name in options.extra and OPTIONS[name].runs_alone), None)
    if whole is not None and options.do_sample:
        msg = f"{whole}={options.extra[whole]} cannot sample with a seed of its own; add do_sample=False."
        raise InvalidOptionError(msg)
    if whole is not None and options.logprobs is not None:
        msg = f"logprobs and {whole} do not go together; leave one of them out."
        raise InvalidOptionError(msg)
    changed = min((name for name in options.extra if OPTIONS[name].changes_scores), default=None)
    if changed is not None and options.logprobs is not None:
        msg = f"{changed} changes the scores, so logprobs would not be the model's own; drop one of them."
        raise InvalidOptionError(msg)
    if options.max_new_tokens is not None and options.min_new_tokens > options.max_new_tokens:
        msg = (
            f"min_new_tokens={options.min_new_tokens} is more than max_new_tokens={options.max_new_tokens}; "
            "raise the one or lower the other."
        )
        raise InvalidOptionError(msg)
