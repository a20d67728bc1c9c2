"""Masks under the fast engine: only allowed tokens, and failures of a mask fail its request alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import GenerationError
from tests.support.engine import AllowOnly, Background, MakeLLM, ask, ids_after, ids_of, on_pipeline, plan
from tests.support.models import forwards, slowly, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")


class TestMasks:
    def test_only_allowed_tokens_are_sampled(self, tiny: QuantizedHuggingFaceLLM) -> None:
        mask = AllowOnly(AllowOnly.IDS)
        found = ids_after(tiny, ids_of(9), mask=lambda: mask, max_new_tokens=20)
        assert set(found) <= set(AllowOnly.IDS)
        assert len(set(found)) > 1
        assert mask.accepted == found
        model = tiny.pipeline.model
        with torch.no_grad():
            logits = model(torch.tensor([[*ids_of(9), *found]])).logits[0, 8:-1, list(AllowOnly.IDS)]
        assert found == [AllowOnly.IDS[i] for i in logits.argmax(-1).tolist()]

    def test_requests_without_a_mask_run_beside_masked_ones(self, tiny: QuantizedHuggingFaceLLM) -> None:
        requests = [
            *plan(tiny, ids_of(9), mask=lambda: AllowOnly(AllowOnly.IDS), max_new_tokens=9),
            *plan(tiny, ids_of(20), max_new_tokens=12),
            *plan(tiny, ids_of(9), mask=lambda: AllowOnly((7, 8), frees_after=3), max_new_tokens=9),
            *plan(tiny, ids_of(5), mask=lambda: AllowOnly(AllowOnly.IDS), do_sample=True, temperature=3.0, seed=1),
        ]
        answers = ask(tiny, requests)
        assert [a.token_ids for a in answers] == [ask(tiny, [request])[0].token_ids for request in requests]
        assert answers[1].token_ids == ids_after(tiny, ids_of(20), max_new_tokens=12)
        assert set(answers[0].token_ids) | set(answers[3].token_ids) <= set(AllowOnly.IDS)
        assert set(answers[2].token_ids[:3]) <= {7, 8}
        assert not set(answers[2].token_ids[3:]) & {7, 8}

    @pytest.mark.parametrize("in_pieces", [True, False])
    @pytest.mark.parametrize("after", [0, 1, 5])
    def test_a_mask_can_end_its_text(self, tiny: QuantizedHuggingFaceLLM, after: int, in_pieces: bool) -> None:
        for llm in (tiny, on_pipeline(tiny)):
            whole = ids_after(llm, ids_of(9), mask=lambda: AllowOnly(AllowOnly.IDS), max_new_tokens=9)
            requests = [
                *plan(llm, ids_of(9), mask=lambda: AllowOnly(AllowOnly.IDS, ends_after=after), max_new_tokens=9),
                *plan(llm, ids_of(20), max_new_tokens=9),
            ]
            chunks = list(llm._engine().submit(requests, in_pieces=in_pieces))
            found = [i for chunk in chunks if chunk.row == 0 for i in chunk.token_ids]
            assert found == whole[:after]
            text = "".join(chunk.text for chunk in chunks if chunk.row == 0)
            assert text == llm.pipeline.tokenizer.decode(whole[:after])
            ends = {chunk.row: chunk.finish_reason for chunk in chunks if chunk.finish_reason}
            assert ends == {0: "stop", 1: "length"}

    @pytest.mark.parametrize("where", ["first", "later", "factory", "accept"])
    def test_an_error_of_a_mask_fails_its_request_alone(self, tiny: QuantizedHuggingFaceLLM, where: str) -> None:
        def make() -> AllowOnly:
            if where == "factory":
                msg = "the grammar is broken"
                raise RuntimeError(msg)
            mask = AllowOnly(AllowOnly.IDS, fails_at={"first": 0, "later": 4}.get(where))
            if where == "accept":
                mask.accept = lambda token_id: [][token_id]  # type: ignore[method-assign]
            return mask

        expected = ids_after(tiny, ids_of(8), max_new_tokens=40)
        with (
            forwards(tiny, slowly(0.002)) as seen,
            Background(lambda: ids_after(tiny, ids_of(8), max_new_tokens=40)) as other,
        ):
            seen.wait_for(4)
            with pytest.raises(GenerationError) as caught:
                ids_after(tiny, ids_of(9), mask=make, max_new_tokens=9)
        assert isinstance(caught.value.__cause__, IndexError if where == "accept" else RuntimeError)
        assert other.result == expected
        wait_until(lambda: tiny._engine()._blocks.held == 0)

    def test_a_mask_and_a_seed_give_the_tokens_of_the_pipeline_engine(self, tiny: QuantizedHuggingFaceLLM) -> None:
        plain = on_pipeline(tiny)
        options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.5, "seed": 2}
        found = ids_after(tiny, ids_of(9), mask=lambda: AllowOnly(AllowOnly.IDS), **options)
        assert found == ids_after(plain, ids_of(9), mask=lambda: AllowOnly(AllowOnly.IDS), **options)

    def test_a_mask_that_allows_no_token_fails_its_request_alone(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        good = plan(llm, ids_of(20))[0]
        expected = ask(llm, [good])[0].token_ids
        bad = plan(llm, ids_of(10), mask=lambda: AllowOnly(()))[0]
        with (
            Background(lambda: ask(llm, [good])[0].token_ids) as other,
            pytest.raises(GenerationError, match="no token"),
        ):
            ask(llm, [bad])
        assert other.result == expected
