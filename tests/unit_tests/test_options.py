"""Options: their names, the values they allow, and which layer's value counts."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from langchain_core.prompts import PromptTemplate
from transformers import GenerationConfig

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.base.fields import OPTION_FIELDS
from langchain_quantllm.data.counterparts import COUNTERPARTS, advice
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.options import (
    ALIASES,
    ANY,
    DEFAULT_MAX_NEW_TOKENS,
    HANDED_ON,
    OPTIONS,
    OWN,
    GenerationOptions,
    normalize,
    resolve,
)
from tests.support.models import forwards, greedy_text, llm_of, tiny_model

FIELDS_OF_TRANSFORMERS = sorted(
    name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"
)

WRONG: dict[str, list[Any]] = {
    "adapter": ["", 5, ["sql"]],
    "priority": [1.5, "high", True],
    "cache_salt": ["", 5, b"one", "x" * 257],
    "speculation": ["eagle", "", True, 3],
    "max_new_tokens": [0, -1, 1.5, "8", True],
    "max_length": [0, "long"],
    "min_new_tokens": [-1, 2.0],
    "min_length": [-1],
    "do_sample": [1, "yes"],
    "temperature": [-0.1, "hot", math.nan, math.inf, True],
    "top_k": [-2, 1.5, True],
    "top_p": [0, 1.1, -1, "0.9", math.nan],
    "min_p": [-0.1, 1.1],
    "top_h": [0, 1.5],
    "typical_p": [0, 2],
    "epsilon_cutoff": [-0.1, 1],
    "eta_cutoff": [-0.1, 1],
    "repetition_penalty": [0, -1, "1.1"],
    "seed": [1.5, "1", True],
    "n": [0, -1, 1.0, True],
    "stop": [[""], [1], 5, "", ["a", ""]],
    "ignore_eos": [1, "no"],
    "logprobs": [-1, 1.5, "yes"],
    "truncation": ["middle", 3, 1.0],
    "return_full_text": ["no", 0],
    "add_special_tokens": ["yes", 1],
    "skip_special_tokens": ["yes", 1],
    "timeout": [0, -1, "soon"],
    "eos_token_id": ["</s>", [1, "x"], -1, [-1], True],
    "num_beams": [0, 1.5],
    "length_penalty": ["long"],
    "no_repeat_ngram_size": [-1, 0.5],
    "encoder_no_repeat_ngram_size": [-1],
    "encoder_repetition_penalty": [0],
    "remove_invalid_values": [1],
    "renormalize_logits": ["yes"],
    "guidance_scale": ["much"],
    "max_matching_ngram_size": [0],
    "max_time": [0],
    "use_cache": ["yes"],
    "max_cache_len": [0],
    "prefill_chunk_size": [0],
    "disable_compile": [0],
}


class TestNames:
    @pytest.mark.parametrize("name", FIELDS_OF_TRANSFORMERS)
    def test_every_field_of_generation_config_is_known(self, name: str) -> None:
        """Each is carried out, handed to `generate`, an alias, or refused with a reason."""
        assert name in {*OPTIONS, *ALIASES, *COUNTERPARTS}

    @pytest.mark.parametrize("name", sorted(HANDED_ON))
    def test_handed_on_fields_exist_in_transformers(self, name: str) -> None:
        assert name in FIELDS_OF_TRANSFORMERS

    @pytest.mark.parametrize("name", sorted(COUNTERPARTS))
    def test_refusals_give_their_reason_and_are_none_for_a_missing_value(self, name: str) -> None:
        with pytest.raises(InvalidOptionError, match=re.escape(f"{advice(name, 'llm')}"[:30])):
            normalize({name: "anything"})
        assert normalize({name: None}) == {}

    def test_options_of_every_engine_are_fields_of_the_class(self) -> None:
        """But for four rare ways of sampling, and `min_length`, which counts the prompt."""
        rare = {name for name, option in OWN.items() if option.pipeline_only}
        assert set(OPTION_FIELDS) == OWN.keys() - rare - {"min_length", "adapter"}
        assert all(QuantizedHuggingFaceLLM.model_fields[name].default is None for name in OPTION_FIELDS)

    def test_no_name_is_in_two_tables(self) -> None:
        tables = [set(OWN), set(HANDED_ON), set(COUNTERPARTS), set(ALIASES)]
        assert sum(map(len, tables)) == len(set.union(*tables))

    @pytest.mark.parametrize(
        ("wrong", "meant"),
        [
            ("max_new_token", "max_new_tokens"),
            ("max_tokns", "max_tokens"),
            ("temprature", "temperature"),
            ("top_pp", "top_p"),
            ("repetition_penality", "repetition_penalty"),
            ("stops", "stop"),
            ("num_beam", "num_beams"),
        ],
    )
    def test_an_unknown_name_names_the_nearest(self, wrong: str, meant: str) -> None:
        with pytest.raises(InvalidOptionError, match=f"unknown option '{wrong}'; did you mean '{meant}'"):
            normalize({wrong: 1})

    def test_a_name_near_to_nothing_lists_the_most_used(self) -> None:
        with pytest.raises(
            InvalidOptionError, match=r"unknown option 'zzzzzz'; the most used are .*max_new_tokens.*top_p"
        ):
            normalize({"zzzzzz": 1})

    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ({"max_tokens": 5}, {"max_new_tokens": 5}),
            ({"num_return_sequences": 3}, {"n": 3}),
            ({"stop_sequence": "x"}, {"stop": ("x",)}),
            ({"stop_strings": ["x", "y"]}, {"stop": ("x", "y")}),
            ({"stop": "x"}, {"stop": ("x",)}),
            ({"top_logprobs": 2}, {"logprobs": 2}),
            ({"skip_prompt": True}, {"return_full_text": False}),
            ({"skip_prompt": False}, {"return_full_text": True}),
            ({"top_k": -1}, {"top_k": 0}),
            ({"handle_long_generation": "hole"}, {"truncation": "left"}),
            ({"pipeline_kwargs": {"max_tokens": 5, "top_k": 3}}, {"max_new_tokens": 5, "top_k": 3}),
            ({"temperature": None, "stop": None}, {}),
            ({"return_tensors": False, "return_text": True, "clean_up_tokenization_spaces": False}, {}),
        ],
    )
    def test_aliases_are_translated(self, given: dict[str, Any], meant: dict[str, Any]) -> None:
        assert normalize(given) == meant


class TestValues:
    def test_wrong_values_are_listed_for_every_checked_option(self) -> None:
        """A new option needs its line in WRONG."""
        checked = {name for name, option in OPTIONS.items() if option.check is not ANY}
        assert set(WRONG) == checked

    @pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
    def test_a_wrong_value_says_what_is_allowed(self, name: str, value: Any) -> None:
        allowed = OPTIONS[name].check.allowed
        with pytest.raises(InvalidOptionError) as error:
            normalize({name: value})
        assert name in str(error.value)
        assert allowed in str(error.value)

    @pytest.mark.parametrize(
        "given",
        [
            {"temperature": 0},
            {"temperature": 2.5},
            {"top_k": 0},
            {"top_p": 1},
            {"top_p": 1e-3},
            {"min_p": 0},
            {"min_p": 1},
            {"seed": -1},
            {"seed": 2**70},
            {"logprobs": True},
            {"logprobs": 0},
            {"truncation": "right"},
            {"eos_token_id": 0},
            {"eos_token_id": []},
            {"stop": []},
            {"min_new_tokens": 0},
        ],
    )
    def test_the_edges_of_what_is_allowed_are_taken(self, given: dict[str, Any]) -> None:
        (name,) = given
        assert name in normalize(given)

    def test_prompt_lookup_of_transformers_is_speculation(self) -> None:
        assert normalize({"prompt_lookup_num_tokens": 10}) == {"speculation": "ngram"}
        with pytest.raises(InvalidOptionError, match="prompt_lookup_num_tokens=0 is not allowed"):
            normalize({"prompt_lookup_num_tokens": 0})
        assert resolve([{}], {}).speculation == "forced"

    def test_nothing_given_is_changed(self) -> None:
        given = {"stop": ["x"], "pipeline_kwargs": {"max_tokens": 5}}
        normalize(given)
        assert given == {"stop": ["x"], "pipeline_kwargs": {"max_tokens": 5}}

    def test_lenient_leaves_out_what_a_checkpoint_has_wrong(self) -> None:
        stored = {"temperature": -1, "top_p": 0.9, "transformers_version": "4.0", "output_scores": True}
        assert normalize(stored, lenient=True) == {"top_p": 0.9}

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"num_beams": 2, "do_sample": True}, "add do_sample=False"),
            ({"num_beams": 2, "logprobs": True}, "leave one of them out"),
            ({"min_new_tokens": 9, "max_new_tokens": 8}, "raise the one or lower the other"),
        ],
    )
    def test_options_that_contradict_each_other_are_refused(self, given: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidOptionError, match=words):
            resolve([normalize(given)], {})


class TestLayers:
    def test_nothing_given_is_greedy_with_256_tokens(self) -> None:
        assert resolve([{}, {}], {}) == GenerationOptions()
        assert (GenerationOptions().do_sample, GenerationOptions().max_new_tokens) == (False, DEFAULT_MAX_NEW_TOKENS)
        assert DEFAULT_MAX_NEW_TOKENS == 256

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("temperature", (0.3, 0.5, 0.9)),
            ("top_k", (3, 5, 9)),
            ("top_p", (0.3, 0.5, 0.9)),
            ("repetition_penalty", (1.1, 1.2, 1.3)),
            ("max_new_tokens", (3, 5, 9)),
            ("seed", (3, 5, 9)),
            ("stop", (("a",), ("b",), ("c",))),
        ],
    )
    def test_the_call_wins_over_the_field_over_the_checkpoint(self, name: str, values: tuple[Any, ...]) -> None:
        layers = [{name: value} for value in values]
        for first in range(3):
            strongest = [{}] * first + layers[first:]
            options = resolve(strongest[:2], strongest[2])
            assert getattr(options, name) == values[first]

    @pytest.mark.parametrize(
        ("call", "fields", "checkpoint", "sampled"),
        [
            ({"temperature": 0.7}, {}, {}, True),
            ({"top_p": 0.9}, {}, {}, True),
            ({"top_k": 5}, {}, {}, True),
            ({"min_p": 0.1}, {}, {}, True),
            ({"temperature": 0}, {}, {}, False),
            ({"temperature": 0, "top_p": 0.9}, {}, {}, False),
            ({"temperature": 0, "do_sample": True}, {}, {}, False),
            ({"temperature": 0.7, "do_sample": False}, {}, {}, False),
            ({"temperature": 0}, {"do_sample": True, "top_p": 0.5}, {"do_sample": True}, False),
            ({"do_sample": False}, {"temperature": 0.7}, {}, False),
            ({"temperature": 0.7}, {"temperature": 0}, {}, True),
            ({}, {"temperature": 0}, {"do_sample": True, "temperature": 0.6}, False),
            ({}, {"temperature": 0.7}, {}, True),
            ({}, {}, {"do_sample": True, "temperature": 0.6}, True),
            ({}, {}, {"temperature": 0.6, "top_p": 0.9}, False),  # transformers does not sample here either
            ({"do_sample": True}, {}, {"temperature": 0.6}, True),
            ({"seed": 1}, {}, {}, False),
            ({"repetition_penalty": 1.2}, {}, {}, False),
        ],
    )
    def test_a_call_samples_if_a_layer_asks_for_it(
        self, call: dict[str, Any], fields: dict[str, Any], checkpoint: dict[str, Any], sampled: bool
    ) -> None:
        assert resolve([call, fields], checkpoint).do_sample is sampled

    def test_asked_to_sample_the_call_takes_the_checkpoint_s_temperature(self) -> None:
        assert resolve([{"do_sample": True}, {}], {"temperature": 0.6, "top_k": 7}).temperature == 0.6
        assert resolve([{"do_sample": True}, {}], {"temperature": 0.6, "top_k": 7}).top_k == 7

    @pytest.mark.parametrize(
        ("call", "fields", "checkpoint", "lengths"),
        [
            ({}, {}, {}, (256, None)),
            ({}, {}, {"max_length": 4096}, (None, 4096)),
            ({"max_new_tokens": 5}, {"max_length": 9}, {}, (5, None)),
            ({"max_length": 9}, {"max_new_tokens": 5}, {}, (None, 9)),
            ({"max_length": 9, "max_new_tokens": 5}, {"max_new_tokens": 7}, {}, (5, 9)),
            ({}, {"max_new_tokens": 7}, {"max_length": 9}, (7, None)),
            ({"min_new_tokens": 300}, {}, {}, (300, None)),
        ],
    )
    def test_a_layer_with_a_length_hides_the_lengths_below(
        self, call: dict[str, Any], fields: dict[str, Any], checkpoint: dict[str, Any], lengths: tuple[Any, Any]
    ) -> None:
        options = resolve([call, fields], checkpoint)
        assert (options.max_new_tokens, options.max_length) == lengths


@pytest.fixture(scope="module")
def sampling_llm(tokenizer: Any) -> QuantizedHuggingFaceLLM:
    """A model whose generation config asks for sampling and five tokens."""
    model = tiny_model(len(tokenizer), seed=3)
    model.generation_config.update(do_sample=True, temperature=1.4, max_new_tokens=5)
    return llm_of(model, tokenizer)


class TestOnTheClass:
    def test_greedy_by_default_though_the_pipeline_injects_sampling(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        """Transformers' text-generation pipeline would sample at 0.7; its default never shows."""
        assert tiny_llm.invoke("The sea is") == tiny_llm.invoke("The sea is") == greedy_text(tiny_llm, "The sea is")
        injected = getattr(tiny_llm.pipeline, "_default_generation_config", None)
        assert injected is not None
        assert injected.do_sample

    def test_a_call_makes_256_tokens_by_default(self, tokenizer: Any) -> None:
        llm = llm_of(tiny_model(len(tokenizer)), tokenizer)
        info = llm.generate(["The sea is"]).generations[0][0].generation_info
        assert info is not None
        assert (info["finish_reason"], info["usage_metadata"]["output_tokens"]) == ("length", 256)

    def test_the_checkpoint_s_generation_config_counts(self, sampling_llm: QuantizedHuggingFaceLLM) -> None:
        samples = sampling_llm.generate(["The sea is"], n=4, seed=1).generations[0]
        assert len({g.text for g in samples}) == 4
        assert [g.generation_info["usage_metadata"]["output_tokens"] for g in samples if g.generation_info] == [5] * 4
        # The checkpoint's temperature counts.
        assert sampling_llm.invoke("The sea is", seed=1) == sampling_llm.invoke("The sea is", seed=1, temperature=1.4)
        assert sampling_llm.invoke("The sea is", temperature=0) == greedy_text(
            sampling_llm, "The sea is", max_new_tokens=5
        )

    def test_options_of_the_user_s_pipeline_count_like_the_checkpoint_s(self, tokenizer: Any) -> None:
        import transformers

        pipe = transformers.pipeline(
            "text-generation", model=tiny_model(len(tokenizer)), tokenizer=tokenizer, max_new_tokens=3
        )
        llm = QuantizedHuggingFaceLLM(pipeline=pipe)
        assert llm.invoke("The sea is") == greedy_text(llm, "The sea is", max_new_tokens=3)
        assert llm.invoke("The sea is", max_new_tokens=4) == greedy_text(llm, "The sea is", max_new_tokens=4)

    def test_the_field_wins_over_the_checkpoint_and_the_call_over_the_field(
        self, sampling_llm: QuantizedHuggingFaceLLM
    ) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=sampling_llm.pipeline, temperature=0, max_new_tokens=3)
        assert llm.invoke("The sea is") == greedy_text(llm, "The sea is", max_new_tokens=3)
        assert llm.invoke("The sea is", max_new_tokens=4) == greedy_text(llm, "The sea is", max_new_tokens=4)

    def test_bound_options_count_like_those_of_the_call(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 1.2, "seed": 7}
        assert tiny_llm.bind(**options).invoke("The sea is") == tiny_llm.invoke("The sea is", **options)
        assert tiny_llm.bind(max_new_tokens=4).invoke("The sea is", max_new_tokens=2) == greedy_text(
            tiny_llm, "The sea is", max_new_tokens=2
        )
        chain = PromptTemplate.from_template("The {x} is") | tiny_llm.bind(stop=["a"], max_tokens=4)
        assert chain.invoke({"x": "sea"}) == tiny_llm.invoke("The sea is", stop=["a"], max_new_tokens=4)

    @pytest.mark.parametrize(
        "fields",
        [
            {"max_tokens": 4},
            {"pipeline_kwargs": {"max_new_tokens": 4}},
            {"generation_kwargs": {"max_new_tokens": 4}},
            {"pipeline_kwargs": {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}},
            {"max_new_tokens": 4, "skip_prompt": True},
        ],
    )
    def test_aliases_count_as_fields_and_at_the_call(
        self, tiny_llm: QuantizedHuggingFaceLLM, fields: dict[str, Any]
    ) -> None:
        expected = greedy_text(tiny_llm, "The sea is", max_new_tokens=4)
        assert QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, **fields).invoke("The sea is") == expected
        if "generation_kwargs" not in fields:
            assert tiny_llm.invoke("The sea is", **fields) == expected

    def test_unknown_and_wrong_options_run_no_forward(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with forwards(tiny_llm) as seen:
            with pytest.raises(InvalidOptionError, match="did you mean 'temperature'"):
                tiny_llm.invoke("The sea is", temprature=1)
            with pytest.raises(InvalidOptionError, match="top_p=3"):
                list(tiny_llm.stream("The sea is", top_p=3))
            with pytest.raises(InvalidOptionError, match="did you mean 'seed'"):
                tiny_llm.batch(["The sea is"] * 2, seeds=3)
            assert seen.count == 0

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"temprature": 0.5}, "did you mean 'temperature'"),
            ({"temperature": -1}, "temperature=-1 is not allowed; it must be a number of at least 0"),
            ({"pipeline_kwargs": {"max_new_tokns": 3}}, "did you mean 'max_new_tokens'"),
            ({"num_beam": 3}, "did you mean 'num_beams'"),
            ({"num_beams": 2, "do_sample": True}, "add do_sample=False"),
            ({"streamer": object()}, r"use \.stream"),
            ({"n": 0}, "n=0 is not allowed; it must be a whole number of at least 1"),
        ],
    )
    def test_fields_are_checked_on_construction(self, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            QuantizedHuggingFaceLLM(model_id="some/model", **fields)

    def test_another_field_of_generation_config_may_be_a_field_of_the_class(
        self, tiny_llm: QuantizedHuggingFaceLLM
    ) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, max_new_tokens=6, num_beams=3)
        assert llm.invoke("The sea is") == greedy_text(tiny_llm, "The sea is", max_new_tokens=6, num_beams=3)
        assert llm.invoke("The sea is", num_beams=1) == greedy_text(tiny_llm, "The sea is", max_new_tokens=6)


class TestCheckpointsWithOptionsOfTheirOwn:
    """`generate` fills fields that we leave None from the generation config; the text must not depend on them."""

    @pytest.mark.parametrize(
        "stored",
        [
            {"return_dict_in_generate": True, "output_scores": True},
            {"token_healing": True},
            {"penalty_alpha": 0.6, "top_k": 4},
            {"num_beam_groups": 2, "diversity_penalty": 0.5},
            {"temperature": 0.6, "top_p": 0.9},
            {"min_length": 2},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("call", [{}, {"num_beams": 2}], ids=str)
    def test_what_it_has_and_nobody_can_use_changes_nothing(
        self, tokenizer: Any, stored: dict[str, Any], call: dict[str, Any]
    ) -> None:
        plain = llm_of(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=5)
        model = tiny_model(len(tokenizer))
        for name, value in stored.items():
            setattr(model.generation_config, name, value)
        llm = llm_of(model, tokenizer, max_new_tokens=5)
        assert llm.invoke("The sea", **call) == plain.invoke("The sea", **call)

    def test_its_stop_strings_and_samples_count(self, tokenizer: Any) -> None:
        model = tiny_model(len(tokenizer))
        text = llm_of(model, tokenizer).invoke("The sea", max_new_tokens=5)
        model.generation_config.stop_strings = [text[-4:]]
        llm = llm_of(model, tokenizer, max_new_tokens=5)
        assert llm.invoke("The sea") == text[: text.index(text[-4:])]
        assert llm.invoke("The sea", stop=[]) == text
        model.generation_config.stop_strings = None
        model.generation_config.num_return_sequences = 2
        assert [g.text for g in llm.generate(["The sea"]).generations[0]] == [text] * 2
        assert [g.text for g in llm.generate(["The sea"], n=1).generations[0]] == [text]

    @pytest.mark.parametrize(
        ("stored", "call"),
        [
            ({"min_length": 4}, {"min_new_tokens": 0}),
            ({"min_new_tokens": 4}, {"min_length": 0}),
            ({"min_new_tokens": 4}, {"min_new_tokens": 0}),
        ],
        ids=str,
    )
    def test_the_call_s_least_length_wins_over_its_own(
        self, tokenizer: Any, stored: dict[str, Any], call: dict[str, Any]
    ) -> None:
        model = tiny_model(len(tokenizer))
        first = llm_of(model, tokenizer).invoke("The sea", max_new_tokens=1)
        model.generation_config.eos_token_id = tokenizer(first)["input_ids"][0]
        llm = llm_of(model, tokenizer, max_new_tokens=5)
        assert llm.invoke("The sea") == ""
        for name, value in stored.items():
            setattr(model.generation_config, name, value)
        assert llm.invoke("The sea") != ""
        assert llm.invoke("The sea", **call) == ""


class TestSamplingOverGreedy:
    @pytest.mark.parametrize("call", [{"do_sample": True}, {"top_p": 0.9}, {"top_k": 5}])
    def test_a_call_that_samples_wins_over_a_field_that_does_not(self, call: dict[str, Any]) -> None:
        options = resolve([normalize(call), normalize({"temperature": 0})], {})
        assert options.do_sample
        assert options.temperature == 1.0

    @pytest.mark.parametrize(
        "given", [{"max_tokens": 5, "max_new_tokens": 10}, {"stop": ["a"], "stop_sequence": "b"}], ids=str
    )
    def test_two_spellings_that_say_two_things_are_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(InvalidOptionError, match="contradicts"):
            normalize(given)

    @pytest.mark.parametrize("names", [("logprobs", "top_logprobs"), ("top_logprobs", "logprobs")])
    def test_logprobs_and_their_number_may_stand_together(self, names: tuple[str, str]) -> None:
        values = {"logprobs": True, "top_logprobs": 2}
        assert normalize({name: values[name] for name in names}) == {"logprobs": 2}
