"""Two models side by side: who they are, what they wrote, and where they diverge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import langchain_quantllm
from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.compare import Comparison, as_document, compare
from langchain_quantllm.bench.nearness import ReferenceReader
from langchain_quantllm.bench.random_models import random_checkpoint
from langchain_quantllm.cli import app
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, ModelNotFoundError
from tests.support.models import tiny_model

PROMPTS = ["What is the capital of France?", "Count to five.", "Name three colours of the rainbow."]


@pytest.fixture(scope="module")
def found(any_smollm2: Path) -> list[Comparison]:
    return compare("none", "nf4", PROMPTS, model=str(any_smollm2), max_new_tokens=16, device="cpu")


def cli(*words: object) -> Result:
    return CliRunner().invoke(app, ["compare", *(str(word) for word in words), "--device", "cpu"])


def test_it_is_exported() -> None:
    assert langchain_quantllm.compare is compare


def test_models_and_answers(found: list[Comparison], any_smollm2: Path, smollm2: Path) -> None:
    assert [one.prompt for one in found] == PROMPTS
    for one in found:
        assert (one.model_a.scheme, one.model_b.scheme) == ("none", "nf4")
        assert one.model_b.weights_bytes < one.model_a.weights_bytes
        for answer in (one.a, one.b):
            assert len(answer.tokens) <= 16
            assert answer.rate_tok_s is None or answer.rate_tok_s > 0
            assert "".join(answer.tokens).removesuffix("<|im_end|>") == answer.text
    if any_smollm2 == smollm2:
        assert "Paris" in found[0].a.text


def test_answers_are_the_models_own_greedy_ones(found: list[Comparison], any_smollm2: Path) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=str(any_smollm2), quantization="nf4", device="cpu", progress=False)
    message = [{"role": "user", "content": PROMPTS[1]}]
    text = llm.pipeline.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert llm.invoke(text, temperature=0, max_new_tokens=16) == found[1].b.text
    llm.unload()


def test_answers_diverge_at_the_first_token_that_differs(found: list[Comparison]) -> None:
    for one in found:
        if one.divergence is None:
            assert one.agree
            assert one.a.text == one.b.text == one.common_text
            continue
        n = one.divergence.tokens
        assert one.a.tokens[:n] == one.b.tokens[:n]
        assert one.common_text.startswith("".join(one.a.tokens[:n]))
        chosen = [answer.tokens[n] if n < len(answer.tokens) else None for answer in (one.a, one.b)]
        assert [one.divergence.chosen_a, one.divergence.chosen_b] == chosen
        assert chosen[0] != chosen[1]
        for gap in (one.divergence.gap_a_nats, one.divergence.gap_b_nats):
            assert gap is None or gap >= 0  # greedy: each found its own the likeliest
    assert any(one.divergence is not None and one.divergence.gap_a_nats is not None for one in found)


def test_the_unquantized_model_reads_both_answers(found: list[Comparison], any_smollm2: Path) -> None:
    """Against forwards over prompt and answer, token by token, and over the whole vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(any_smollm2, dtype="bfloat16").eval()
    tokenizer = AutoTokenizer.from_pretrained(any_smollm2)
    for one in found:
        assert one.reference == "none"
        assert one.near_a is not None
        assert one.near_b is not None
        # From itself, whose steps of one token round bfloat16 in another order than one forward does, and from nf4.
        assert one.near_a.mean_kl_nats < 1e-2 < one.near_b.mean_kl_nats
        message = [{"role": "user", "content": one.prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer("".join(one.b.tokens), add_special_tokens=False)["input_ids"]
        if len(answer) != len(one.b.tokens):
            continue  # the text is encoded in another way than it was written
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].double()
        expected = rows.log_softmax(-1)[range(len(answer)), answer]
        assert one.near_b.nats == pytest.approx(expected.tolist(), abs=1e-6)
        assert list(one.near_b.choices) == [tokenizer.decode(i) for i in rows.argmax(-1)]


def test_where_answers_part_the_text_on_either_side_and_the_references_choice_are_told(
    found: list[Comparison],
) -> None:
    parted = [one for one in found if one.divergence is not None]
    assert parted
    for one in parted:
        assert one.divergence is not None
        n = one.divergence.tokens
        assert "".join(one.a.tokens[:n]).endswith(one.divergence.before)
        assert "".join(one.a.tokens[n:]).startswith(one.divergence.after_a)
        assert "".join(one.b.tokens[n:]).startswith(one.divergence.after_b)
        assert one.divergence.after_a != one.divergence.after_b
        # The first model is the reference: it finds its own token likelier, and the likeliest.
        assert one.divergence.reference_gap_nats is not None
        assert one.divergence.reference_gap_nats >= 0
        if one.divergence.reference_gap_nats > 0:
            assert one.divergence.reference_choice == one.divergence.chosen_a


def test_the_divergence_over_the_likeliest_tokens_is_a_little_below_that_over_all(tokenizer: Any) -> None:
    model, other = (tiny_model(len(tokenizer), seed=seed) for seed in (0, 1))
    prompt, answer = [5, 6, 7], [8, 9, 10]
    with torch.no_grad():
        p, q = (
            m(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0, 2:].log_softmax(-1) for m in (model, other)
        )

    def read(most: int) -> float:
        entries = []
        for row, token in zip(q.double(), answer, strict=True):
            likeliest = row.topk(most)
            pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            top = [{"token_id": i, "logprob": logprob} for i, logprob in pairs]
            entries.append({"token_id": token, "logprob": float(row[token]), "top_logprobs": top})
        view = ReferenceReader(model, tokenizer).read(prompt, entries)
        assert view is not None
        assert view.nats == pytest.approx(p.double()[range(3), answer].tolist(), rel=1e-5)
        return view.mean_kl_nats

    whole = float((p.double().exp() * (p.double() - q.double())).sum(-1).mean())
    assert read(len(tokenizer)) == pytest.approx(whole, rel=1e-3)  # shares below 1e-9 count as that
    assert 0 < read(20) < read(2000) < whole


def test_a_third_model_reads_both_and_is_loaded_last(short_smollm2: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = {"model": str(short_smollm2), "max_new_tokens": 6, "device": "cpu", "report": lines.append}
    [one] = compare("fp4", "int8", PROMPTS[:1], reference="none", **options)
    assert lines[-1] == "none: read the answers of both"
    assert one.near_a is not None
    assert one.near_b is not None
    assert one.near_b.mean_kl_nats < one.near_a.mean_kl_nats  # int8 is nearer to 16 bits than fp4
    assert as_document([one])["kl_nats"][1]["mean"] == pytest.approx(one.near_b.mean_kl_nats)
    lines.clear()
    tiny = str(random_checkpoint("tiny", tmp_path))
    [one] = compare("fp4", "int8", PROMPTS[:1], reference=tiny, **options)
    assert "its vocabulary is not that of both models" in lines[-1]
    assert one.near_a is one.near_b is one.reference is None


def test_a_model_agrees_with_itself(any_smollm2: Path) -> None:
    [one] = compare("nf4", f"{any_smollm2}:nf4", PROMPTS[:1], model=str(any_smollm2), max_new_tokens=8, device="cpu")
    assert one.agree
    assert one.divergence is None
    assert one.a.tokens == one.b.tokens
    assert len(one.a.tokens) == 8


def test_models_with_other_vocabularies_are_compared_by_their_text(any_smollm2: Path, tmp_path: Path) -> None:
    tiny = str(random_checkpoint("tiny", tmp_path))
    [one] = compare(str(any_smollm2), tiny, ["The capital of France is"], max_new_tokens=4, device="cpu", chat=False)
    assert one.divergence is not None
    assert one.divergence.tokens == 0
    assert one.divergence.gap_a_nats is None  # neither has the other's token


@pytest.mark.parametrize(
    ("a", "b", "prompts", "said"),
    [
        ("none", "nf4", PROMPTS, "'none' is a scheme; say of which model"),
        ("MODEL", "nf5", PROMPTS, "did you mean 'nf4'"),
        ("MODEL", "MODEL:nf5", PROMPTS, "did you mean 'nf4'"),
        ("MODEL", "MODEL:nf4", [], "at least one text"),
        ("MODEL", "MODEL:nf4", [""], "no empty ones"),
    ],
)
def test_what_is_not_allowed_is_told(a: str, b: str, prompts: list[str], said: str, short_smollm2: Path) -> None:
    names = [name.replace("MODEL", str(short_smollm2)) for name in (a, b)]
    with pytest.raises(InvalidOptionError, match=said):
        compare(*names, prompts, device="cpu")


def test_a_missing_second_model_is_told(short_smollm2: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no folder /no/such/folder"):
        compare("/no/such/folder", str(short_smollm2), PROMPTS, device="cpu")


def test_the_command_shows_both(any_smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Count to five.\n\n", encoding="utf-8")
    words = ("-m", any_smollm2, "--file", file, "--prompt", PROMPTS[0], "--max-new-tokens", 12)
    result = cli("none", "int8", *words, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (document["a"]["scheme"], document["b"]["scheme"]) == ("none", "int8")
    assert [row["prompt"] for row in document["rows"]] == [PROMPTS[0], "Count to five."]
    assert "tokens/s" in result.stdout
    assert document["reference"] == "none"
    assert document["kl_nats"][0]["mean"] < document["kl_nats"][1]["mean"]
    assert f"{document['agreeing']} of 2 answers are the same" in result.stdout
    marks = sum(2 for row in document["rows"] if row["divergence"] is not None)
    assert result.stdout.count("▸") == marks
    assert "int8: answered 2 prompts" in result.stderr


def test_the_document_holds_each_model_once(found: list[Comparison]) -> None:
    document = json.loads(json.dumps(as_document(found)))
    assert document["kind"] == "comparison"
    assert document["agreeing"] == sum(one.agree for one in found)
    assert all("model_a" not in row for row in document["rows"])


def test_errors_of_the_command_are_a_sentence(tmp_path: Path) -> None:
    for words, said in (
        (("a/b:nf5", "nf4"), "did you mean 'nf4'"),
        (("none", "nf4", "--file", tmp_path / "none.txt"), "cannot be read"),
    ):
        result = cli(*words)
        assert result.exit_code == 1
        assert said in result.stderr


def test_a_model_that_cannot_be_loaded_is_told_before_the_other_is_loaded(smollm2: Path) -> None:
    lines: list[str] = []
    with pytest.raises(CheckpointError, match="is not quantized, and GPTQ takes calibration data"):
        compare("none", "gptq", PROMPTS, model=str(smollm2), device="cpu", report=lines.append)
    with pytest.raises(ModelNotFoundError, match="no folder /no/such/folder"):
        compare(str(smollm2), "/no/such/folder", PROMPTS, device="cpu", report=lines.append)
    assert lines == []


def test_answers_of_one_model_are_shown_where_the_other_fails(tmp_path: Path) -> None:
    sound, damaged = (random_checkpoint("tiny", tmp_path / name) for name in ("sound", "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    file = tmp_path / "out.json"
    words = ("--prompt", "One, two", "--max-new-tokens", 4, "--raw", "--json", file)
    result = cli(sound, damaged, *words)
    assert result.exit_code == 1
    assert "is damaged" in result.stderr
    assert "One, two" in result.stdout
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["a"]["label"] == str(sound)
    [row] = document["rows"]
    assert row["prompt"] == "One, two"
    assert len(row["a"]["tokens"]) == 4
