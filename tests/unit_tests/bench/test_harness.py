"""The interface of lm-evaluation-harness: its numbers against plain transformers, and where it is installed, against
its own model class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.harness import HarnessModel, run_tasks
from langchain_quantllm.bench.harness_tasks import TaskFiles
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError
from tests.support.bench import bench

TEXT = "The river rose in the night, and by morning the lower field was a lake. Nobody had moved the sheep."
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Berlin, I think"),
    ("The capital ", "of"),  # the blank belongs to the continuation
    ("", "Hello there"),
]

needs_lm_eval = pytest.mark.skipif(not is_installed("lm_eval"), reason="needs lm-eval")


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in args]


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_log_likelihoods_are_plain_transformers_own(llm: QuantizedHuggingFaceLLM) -> None:
    model, tokenizer = llm.pipeline.model, llm.pipeline.tokenizer
    found = HarnessModel(llm).loglikelihood(requests(*PAIRS))
    begin = tokenizer.bos_token_id
    splits = [("The capital of France is", " Paris"), ("The capital of France is", " Berlin, I think")]
    splits += [("The capital", " of")]
    ids = [tuple(tokenizer(text)["input_ids"] for text in pair) for pair in splits]
    ids.append(([begin], tokenizer("Hello there")["input_ids"]))
    for (nats, is_greedy), (context, continuation) in zip(found, ids, strict=True):
        rows = log_probs(model, context + continuation)[len(context) - 1 : -1]
        expected = sum(float(rows[i, token]) for i, token in enumerate(continuation))
        assert nats == pytest.approx(expected, rel=1e-4)  # float32, in a padded batch
        assert is_greedy == (rows.argmax(-1).tolist() == continuation)
    assert found[0][0] > found[1][0] + 5  # Paris, to a model that knows
    assert found[0][1]


def test_a_continuation_within_a_token_is_scored_by_itself(llm: QuantizedHuggingFaceLLM) -> None:
    """The tokenizer joins "a" and "b", so that nothing is left behind the context."""
    tokenizer = llm.pipeline.tokenizer
    assert len(tokenizer("ab")["input_ids"]) == 1
    [(nats, _)] = HarnessModel(llm).loglikelihood(requests(("a", "b")))
    context, continuation = (tokenizer(text)["input_ids"] for text in "ab")
    assert nats == pytest.approx(float(log_probs(llm.pipeline.model, context)[-1, continuation[0]]), rel=1e-5)


def test_each_token_of_a_text_is_scored_once(llm: QuantizedHuggingFaceLLM) -> None:
    harness = HarnessModel(llm)
    [whole] = harness.loglikelihood_rolling(requests((TEXT,)))
    begin, ids = llm.pipeline.tokenizer.bos_token_id, llm.pipeline.tokenizer(TEXT)["input_ids"]
    rows = log_probs(llm.pipeline.model, [begin, *ids])
    assert whole == pytest.approx(float(rows[range(len(ids)), ids].sum()), rel=1e-5)

    harness._most_tokens = 8  # as if the context were as short
    [by_windows] = harness.loglikelihood_rolling(requests((TEXT,)))
    expected, most = 0.0, 8
    for start in range(0, len(ids), most):  # each window is full, the last one by tokens that are scored already
        end = min(start + most, len(ids))
        window = [begin, *ids[:end]] if start == 0 else ids[end - most - 1 : end]
        rows = log_probs(llm.pipeline.model, window[:-1])[-(end - start) :]
        expected += float(rows[range(end - start), ids[start:end]].sum())
    assert by_windows == pytest.approx(expected, rel=1e-5)
    assert by_windows < whole  # less is known of what comes before


def test_texts_are_greedy_end_at_their_strings_and_stay_in_order(llm: QuantizedHuggingFaceLLM) -> None:
    contexts = ["One, two, three,", "The capital of France is", "One, two, three,"]
    options = [{"until": [","], "max_gen_toks": 6}, {"until": ".", "max_gen_toks": 6}, {"max_gen_toks": 3}]
    found = HarnessModel(llm).generate_until(requests(*zip(contexts, options, strict=True)))
    assert found[0] == " four"
    assert found[1].startswith(" Paris")
    assert "." not in found[1]
    assert found[2] == llm.invoke(contexts[2], max_new_tokens=3, temperature=0)


def test_messages_are_rendered_by_the_models_template(llm: QuantizedHuggingFaceLLM) -> None:
    harness = HarnessModel(llm)
    messages = [{"role": "user", "content": "Hi"}]
    text = harness.apply_chat_template(messages)
    assert text.endswith("<|im_start|>assistant\n")
    assert harness.apply_chat_template([*messages, {"role": "assistant", "content": "Yes"}], False).endswith("Yes")
    assert harness.chat_template(True) == llm.pipeline.tokenizer.chat_template


# With lm-eval itself.

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Berlin", "Oslo"], "label": 0},
    {"question": "Two plus two is", "choices": ["five", "four"], "label": 1},
    {"question": "The sun rises in the", "choices": ["west", "east"], "label": 1},
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICE = (
    "task: facts\noutput_type: multiple_choice"
    + COMMON
    + """
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
)
ROLLING = (
    "task: texts\noutput_type: loglikelihood_rolling"
    + COMMON
    + """
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}]
"""
)
WRITING = (
    "task: written\noutput_type: generate_until"
    + COMMON
    + """
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: [".", ","], max_gen_toks: 4}}
filter_list: [{{name: strip, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data="questions.jsonl"), encoding="utf-8")
    lines = "\n".join(map(json.dumps, QUESTIONS))
    (tmp_path / "questions.jsonl").write_text(lines + "\n", encoding="utf-8")
    return tmp_path


@needs_lm_eval
def test_log_likelihoods_are_those_of_the_harness_own_model(llm: QuantizedHuggingFaceLLM) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    own = HFLM(pretrained=llm.pipeline.model, tokenizer=llm.pipeline.tokenizer, batch_size=2, device="cpu")
    ours = HarnessModel(llm)
    pairs = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]
    for x, y in zip(ours.loglikelihood(pairs), own.loglikelihood(pairs, disable_tqdm=True), strict=True):
        assert x[0] == pytest.approx(y[0], rel=1e-4)  # float32, in other batches
        assert x[1] == y[1]
    own._max_length = ours._most_tokens = 8
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (TEXT, "Hi")]
    expected = own.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-5)


@needs_lm_eval
def test_tasks_of_a_folder_run_with_intervals(llm: QuantizedHuggingFaceLLM, folder: Path) -> None:
    found = run_tasks(llm, TaskFiles(str(folder)))
    accuracy = found["facts", "acc", "none"]
    assert accuracy["questions"] == 3
    assert accuracy["value"] == pytest.approx(sum(accuracy["scores"]) / 3)
    assert accuracy["interval"][0] < accuracy["value"] <= accuracy["interval"][1]
    assert found["written", "exact_match", "strip"]["scores"][0] == 1  # Paris
    perplexity = found["texts", "byte_perplexity", "none"]
    texts = [question["question"] for question in QUESTIONS]
    nats = sum(HarnessModel(llm).loglikelihood_rolling(requests(*((text,) for text in texts))))
    assert perplexity["value"] == pytest.approx(math.exp(-nats / sum(map(len, texts))), rel=1e-5)
    assert perplexity["interval"][0] < perplexity["value"] < perplexity["interval"][1]


@needs_lm_eval
def test_some_tasks_and_some_questions_can_be_named(llm: QuantizedHuggingFaceLLM, folder: Path) -> None:
    files = TaskFiles(f"{folder}:facts")
    assert files.names == ["facts"]
    [(key, values)] = run_tasks(llm, files, limit=2).items()
    assert key == ("facts", "acc", "none")
    assert values["questions"] == 2


@needs_lm_eval
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            CHOICE.replace("dataset_path: json", "dataset_path: allenai/ai2_arc"),
            "takes its data from 'allenai/ai2_arc'",
        ),
        (CHOICE.replace("metric: acc", "metric: acc, hf_evaluate: true"), "fetches its metric 'acc'"),
        (CHOICE.replace("metric: acc", "metric: rouge_of_others"), "fetches its metric 'rouge_of_others'"),
        (CHOICE.format(data="other.jsonl"), "names the data file 'other.jsonl', which is not there"),
        (CHOICE.replace("output_type: multiple_choice", "output_type: guess"), "lm-eval cannot build the tasks facts"),
        ("- a list", "holds a list"),
        ("task: [", "cannot be read as YAML"),
        ("dataset_path: json", "holds no task"),
        ("task: facts\ninclude: choice.yaml", "includes itself"),
    ],
)
def test_tasks_that_cannot_run_are_told_before_a_model_is_loaded(folder: Path, text: str, said: str) -> None:
    for file in folder.glob("*.yaml"):
        file.unlink()
    (folder / "choice.yaml").write_text(text.format(data="questions.jsonl") if "{{{{" in text else text, "utf-8")
    result = bench("/no/such/model", "--quality", "--tasks", folder)
    assert result.exit_code == 1
    with pytest.raises(InvalidOptionError, match=said):
        TaskFiles(str(folder))


@needs_lm_eval
@pytest.mark.parametrize(("name", "said"), [("{}/none", "is no folder"), ("{}:fact", "did you mean 'facts'")])
def test_a_folder_or_task_that_is_not_there_is_told(folder: Path, name: str, said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        TaskFiles(name.format(folder))


@pytest.mark.skipif(is_installed("lm_eval"), reason="needs an environment without lm-eval")
def test_without_lm_eval_the_command_that_installs_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match=r"pip install .*langchain-quantllm\[quality\]"):
        TaskFiles(str(tmp_path))
