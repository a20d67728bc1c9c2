"""The sampler of one request: the distribution, transformers' warpers, penalties, logprobs, and seeds."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as lp

from langchain_quantllm.engine.generate_sampler import RowSampler
from langchain_quantllm.engine.request import Request
from tests.support.sampling import chi_square, request_of

VOCAB = 64


def logits_of(seed: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def sample(request: Request, logits: torch.Tensor, count: int) -> list[int]:
    sampler = RowSampler(request)
    return [sampler.sample(logits.clone(), [])[0] for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"do_sample": True}, []),
        ({"temperature": 0.6}, [lp.TemperatureLogitsWarper(0.6)]),
        ({"temperature": 1.8}, [lp.TemperatureLogitsWarper(1.8)]),
        ({"top_k": 5}, [lp.TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [lp.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.2}, [lp.MinPLogitsWarper(0.2)]),
        ({"typical_p": 0.6}, [lp.TypicalLogitsWarper(0.6)]),
        ({"epsilon_cutoff": 0.02}, [lp.EpsilonLogitsWarper(0.02)]),
        ({"eta_cutoff": 0.02}, [lp.EtaLogitsWarper(0.02, device="cpu")]),
        ({"top_h": 0.4}, [lp.TopHLogitsWarper(0.4)]),
        (
            {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
            [
                lp.TemperatureLogitsWarper(1.3),
                lp.TopKLogitsWarper(20),
                lp.TopPLogitsWarper(0.8),
                lp.MinPLogitsWarper(0.05),
            ],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sampled_tokens_follow_the_softmax_of_transformers_warpers(options: dict[str, Any], warpers: list[Any]) -> None:
    """Chi-square over 4000 samples; its mean is the degrees of freedom d, its deviation sqrt(2d).

    Five deviations: a right sampler with these fixed seeds passes for ever, and one whose
    temperature is off by a fifth does not, as the next test shows.
    """
    logits = logits_of(1)
    scores = logits[None].clone()
    for warp in warpers:
        scores = warp(None, scores)
    probabilities = scores[0].softmax(-1)
    sampled = sample(request_of(seed=3, **options), logits, 4000)
    assert all(probabilities[i] > 0 for i in set(sampled))
    statistic, freedom = chi_square(sampled, probabilities)
    assert freedom >= 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_the_chi_square_check_notices_a_wrong_distribution() -> None:
    """The check above can fail: samples at temperature 0.8 are not taken for those at 1."""
    sampled = sample(request_of(seed=3, temperature=0.8), logits_of(1), 4000)
    statistic, freedom = chi_square(sampled, logits_of(1).softmax(-1))
    assert statistic > freedom + 5 * (2 * freedom) ** 0.5


def test_warpers_stand_in_the_order_of_generate() -> None:
    """Top-p before or after the temperature keeps other tokens; `generate` builds the list to compare with."""
    from transformers import GenerationConfig, LogitsProcessorList

    from tests.support.models import tiny_model

    options: dict[str, Any] = {
        "temperature": 2.0,
        "top_k": 30,
        "top_p": 0.8,
        "min_p": 0.1,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.005,
        "eta_cutoff": 0.01,
        "top_h": 0.9,
    }
    config = GenerationConfig(do_sample=True, num_beams=1, **options)
    theirs = tiny_model(VOCAB)._get_logits_processor(
        generation_config=config, input_ids_seq_length=3, logits_processor=LogitsProcessorList(), device="cpu"
    )
    ours = RowSampler(request_of(**options))._warpers
    assert [type(w) for w in ours] == [type(w) for w in theirs]
    for seed in range(20):
        mine = expected = logits_of(seed)[None]
        for warp in ours:
            mine = warp(None, mine)
        for warp in theirs:
            expected = warp(torch.tensor([[1, 2, 3]]), expected)
        assert torch.equal(mine, expected)


def test_a_token_of_probability_zero_is_never_sampled() -> None:
    """Even for the lowest and the highest of the random numbers."""
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[5, 40]] = torch.tensor([0.0, 1.0])
    sampler = RowSampler(request_of(do_sample=True))

    class Fixed(random.Random):
        value = 0.0

        def random(self) -> float:
            return self.value

    sampler._random = Fixed()
    for value, token in ((0.0, 5), (0.2689, 5), (0.269, 40), (1 - 2**-53, 40)):
        Fixed.value = value
        assert sampler.sample(logits.clone(), [])[0] == token


def test_greedy_takes_the_best() -> None:
    for seed in range(50):
        logits = logits_of(seed)
        assert RowSampler(request_of()).sample(logits.clone(), []) == (int(logits.argmax()), None)


def test_repetition_penalty_equals_transformers() -> None:
    prompt, made = (1, 2, 3, 60), [7, 7, 61]
    for seed, penalty in ((0, 1.3), (1, 0.7), (2, 5.0)):
        logits = logits_of(seed)
        seen = torch.tensor([[*prompt, *made]])
        expected = lp.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits[None].clone())[0]
        given = logits.clone()
        token_id, _ = RowSampler(request_of(prompt_ids=prompt, repetition_penalty=penalty)).sample(given, made)
        assert torch.equal(given, expected)
        assert token_id == int(expected.argmax())


def test_end_tokens_are_blocked_until_the_least_length() -> None:
    logits = torch.zeros(VOCAB)
    logits[0] = 9.0  # the end token
    sampler = RowSampler(request_of(min_new_tokens=3))
    assert [sampler.sample(logits.clone(), [1] * n)[0] == 0 for n in range(5)] == [False, False, False, True, True]
    assert RowSampler(request_of(ignore_eos=True)).sample(logits.clone(), [1] * 90)[0] != 0
    sampled = sample(request_of(do_sample=True, ignore_eos=True), logits, 200)
    assert 0 not in sampled


def test_logprobs_are_the_model_s_own_before_any_option() -> None:
    logits = logits_of(5)
    options: dict[str, Any] = {"temperature": 0.3, "top_k": 2, "repetition_penalty": 3.0, "ignore_eos": True}
    token_id, logprob = RowSampler(request_of(logprobs=4, **options)).sample(logits.clone(), [9])
    expected = logits.log_softmax(-1)
    assert logprob is not None
    assert logprob.token_id == token_id
    assert logprob.logprob == float(expected[token_id])
    assert [i for i, _ in logprob.top] == expected.topk(4).indices.tolist()
    assert [value for _, value in logprob.top] == expected.topk(4).values.tolist()


def test_more_alternatives_than_tokens_are_all_of_them() -> None:
    _, logprob = RowSampler(request_of(logprobs=1000)).sample(logits_of(5), [])
    assert logprob is not None
    assert len(logprob.top) == VOCAB


def test_a_seed_repeats_and_samples_of_one_seed_differ() -> None:
    request = request_of(seed=5, do_sample=True)
    logits = logits_of(2, scale=0.5)
    assert sample(request, logits, 50) == sample(request, logits, 50)
    runs = [tuple(sample(replace(request, sample_index=i), logits, 50)) for i in range(4)]
    runs += [tuple(sample(replace(request, seed=s), logits, 50)) for s in (6, -5, 2**80)]
    assert len(set(runs)) == 7


def test_samples_of_neighbouring_seeds_are_independent() -> None:
    """Sample 1 of seed 0 is not sample 0 of seed 1, as it were if the two were added."""
    logits = logits_of(2, scale=0.5)
    one = sample(request_of(seed=0, sample_index=1, do_sample=True), logits, 50)
    assert one != sample(request_of(seed=1, sample_index=0, do_sample=True), logits, 50)


def test_global_generators_stay_as_they_are() -> None:
    before = torch.random.get_rng_state(), random.getstate()
    sample(request_of(seed=5, temperature=0.7, top_p=0.9), logits_of(2), 20)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
