"""vLLM as the engine, in an environment that has it: `make test-vllm`.

One engine over a tiny random Llama with two adapters serves most tests; it takes a minute to start.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from langchain_core.messages import HumanMessage
from pydantic import BaseModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from langchain_quantllm import (
    AWQ,
    GPTQ,
    VLLM,
    Calibration,
    ChatQuantizedHuggingFace,
    Distillation,
    QuantizedHuggingFaceLLM,
    quantize,
)
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.compat.vllm import has_died, processes
from langchain_quantllm.engine import stream as streams
from langchain_quantllm.engine.external.vllm_engine import DIED
from langchain_quantllm.engine.request import OutputForm, Request
from langchain_quantllm.errors import (
    CheckpointError,
    GenerationError,
    GenerationTimeoutError,
    InvalidOptionError,
    QueueFullError,
    UnsupportedError,
)
from langchain_quantllm.quantization.formats import format_of_scheme
from langchain_quantllm.structured.constraints import Choice, Grammar, JSONObject, Regex
from tests.support.adapters import PROMPT, Reference, make_adapter
from tests.support.checkpoints import make_checkpoint
from tests.support.engine import Answer, ask, plan
from tests.support.gptq_checkpoints import load_float_twin, make_gptq_checkpoint
from tests.support.models import wait_until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not is_installed("vllm"), reason="needs vLLM: make test-vllm"),
    pytest.mark.timeout(1200),
]

CONTEXT_TOKENS = 2048
BLOCK_TOKENS = 32
TINY = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 4 << 20,
    "max_num_seqs": 64,
    "engine_args": {"block_size": BLOCK_TOKENS},
}
"""Options under which vLLM starts soon and takes little memory."""
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@dataclass
class Tiny:
    """The tiny model, its adapters, and the LLM over vLLM."""

    base: Path
    adapters: dict[str, str]
    llm: QuantizedHuggingFaceLLM
    reference: Reference

    @property
    def engine(self) -> Any:
        return self.llm._engine()

    def fields(self, **fields: Any) -> dict[str, Any]:
        """The fields of a model that shares the engine."""
        return {
            "model_id": str(self.base),
            "dtype": "float32",
            "adapters": self.adapters,
            "engine": VLLM(**TINY),
            "max_new_tokens": 12,
            "progress": False,
            **fields,
        }

    def unfinished(self) -> int:
        """Requests that vLLM has not ended."""
        return int(self.engine._llm.get_num_unfinished_requests())


@pytest.fixture(scope="module")
def unstarted(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The model and its LLM, without an engine as yet."""
    folder = tmp_path_factory.mktemp("vllm")
    base = make_checkpoint(folder / "tiny", dtype="float32", max_position_embeddings=CONTEXT_TOKENS)
    adapters = {
        "sql": str(make_adapter(base, folder / "sql", seed=1)),
        "chat": str(make_adapter(base, folder / "chat", seed=2, r=8)),
    }
    made = Tiny(base, adapters, None, Reference(base))  # type: ignore[arg-type]
    made.llm = QuantizedHuggingFaceLLM(**made.fields())
    return made


@pytest.fixture(scope="module")
def tiny(unstarted: Tiny) -> Iterator[Tiny]:
    """The same with an engine that runs."""
    unstarted.llm.load()
    yield unstarted
    children = psutil.Process().children(recursive=True)
    unstarted.llm.unload()
    wait_until(lambda: not any(is_vllm(child) for child in children), 60)


def is_vllm(process: psutil.Process) -> bool:
    """Whether a process of vLLM's is there."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "VLLM" in " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        return False


def ids(tiny: Tiny, text: str = PROMPT) -> list[int]:
    return list(tiny.reference.tokenizer(text).input_ids)


def greedy(tiny: Tiny, prompt_ids: list[int], tokens: int) -> list[int]:
    """The tokens of transformers' generate, at the likeliest one each."""
    given = torch.tensor([prompt_ids])
    output = tiny.reference.model(None).generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    return [int(i) for i in output[0, len(prompt_ids) :]]


def answers(tiny: Tiny, requests: list[Request]) -> list[Answer]:
    return ask(tiny.llm, requests)


def test_the_engine_says_what_it_is(tiny: Tiny) -> None:
    info = tiny.llm.engine_info
    assert (info.name, info.version) == ("vllm", tiny.engine.info.version)
    assert info.kv_cache_tokens is not None
    assert info.kv_cache_tokens >= CONTEXT_TOKENS
    assert tiny.engine.limits.context_tokens == CONTEXT_TOKENS


@pytest.mark.parametrize("text", [PROMPT, "a", "Quantized models take less memory " * 20])
def test_greedy_tokens_are_those_of_generate(tiny: Tiny, text: str) -> None:
    prompt_ids = ids(tiny, text)
    (answer,) = answers(tiny, plan(tiny.llm, prompt_ids, max_new_tokens=24, eos_token_id=None))
    assert answer.token_ids == greedy(tiny, prompt_ids, 24)


def test_sixty_four_at_once_are_as_each_alone(tiny: Tiny) -> None:
    prompts = [f"{i} and {i * i} are numbers" for i in range(64)]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(tiny.llm.invoke, prompts))
    assert together == [tiny.reference.text(None, prompt) for prompt in prompts]


def test_a_stream_is_the_whole_in_pieces(tiny: Tiny) -> None:
    pieces = list(tiny.llm.stream(PROMPT))
    assert len(pieces) > 1
    assert "".join(pieces) == tiny.llm.invoke(PROMPT)


async def test_event_loops_may_call(tiny: Tiny) -> None:
    assert await tiny.llm.ainvoke(PROMPT) == tiny.llm.invoke(PROMPT)
    assert "".join([piece async for piece in tiny.llm.astream(PROMPT)]) == tiny.llm.invoke(PROMPT)


def test_a_stop_string_ends_the_text_and_the_request(tiny: Tiny) -> None:
    whole = tiny.llm.invoke(PROMPT, max_new_tokens=40)
    stop = whole[8:10]
    result = tiny.llm.generate([PROMPT], stop=[stop], max_new_tokens=CONTEXT_TOKENS // 2).generations[0][0]
    assert result.text == whole[: whole.index(stop)]
    assert result.generation_info is not None
    assert result.generation_info["finish_reason"] == "stop"
    wait_until(lambda: tiny.unfinished() == 0)


def test_an_end_token_of_the_call_ends_the_text(tiny: Tiny) -> None:
    prompt_ids = ids(tiny)
    written = greedy(tiny, prompt_ids, 12)
    (answer,) = answers(tiny, plan(tiny.llm, prompt_ids, eos_token_id=(written[4],)))
    assert answer.token_ids == written[: written.index(written[4]) + 1]
    assert answer.finish_reason == "stop"
    (answer,) = answers(tiny, plan(tiny.llm, prompt_ids, eos_token_id=(written[4],), ignore_eos=True))
    assert answer.token_ids == written
    (answer,) = answers(tiny, plan(tiny.llm, prompt_ids, eos_token_id=(written[0],), min_new_tokens=6))
    assert len(answer.token_ids) >= 6
    assert written[0] not in answer.token_ids[:6]


def test_a_seed_gives_the_same_text_alone_and_beside_others(tiny: Tiny) -> None:
    options = {"temperature": 1.0, "seed": 7, "n": 3}
    alone = [g.text for g in tiny.llm.generate([PROMPT], **options).generations[0]]
    beside = [g.text for g in tiny.llm.generate(["a", PROMPT, "b"], **options).generations[1]]
    assert alone == beside
    assert len(set(alone)) == 3
    assert alone != [g.text for g in tiny.llm.generate([PROMPT], **{**options, "seed": 8}).generations[0]]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_options_that_leave_one_token_are_greedy(tiny: Tiny, options: dict[str, Any]) -> None:
    assert tiny.llm.invoke(PROMPT, temperature=1.5, seed=1, **options) == tiny.llm.invoke(PROMPT)


def test_a_repetition_penalty_is_that_of_generate(tiny: Tiny) -> None:
    expected = tiny.reference.text(None, PROMPT, repetition_penalty=1.7)
    assert tiny.llm.invoke(PROMPT, repetition_penalty=1.7) == expected


def test_logprobs_are_those_of_the_model_before_temperature(tiny: Tiny) -> None:
    prompt_ids = ids(tiny)
    requests = plan(tiny.llm, prompt_ids, logprobs=3, do_sample=True, temperature=0.5, seed=2)
    (answer,) = answers(tiny, requests)
    with torch.no_grad():
        logits = tiny.reference.model(None)(torch.tensor([prompt_ids + answer.token_ids])).logits[0]
    logprobs = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
    assert len(answer.logprobs) == len(answer.token_ids)
    for row, token_id, told in zip(logprobs, answer.token_ids, answer.logprobs, strict=True):
        best = row.topk(3)
        assert told.token_id == token_id
        assert math.isclose(told.logprob, row[token_id].item(), abs_tol=1e-3)
        assert [i for i, _ in told.top] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([p for _, p in told.top]), best.values, atol=1e-3, rtol=0)


def test_named_tokens_have_their_logprobs_in_order(tiny: Tiny) -> None:
    named = (300, 5, 77)
    (request,) = plan(tiny.llm, ids(tiny), logprobs=0, max_new_tokens=2)
    (answer,) = answers(tiny, [replace(request, reported_ids=named)])
    assert [tuple(i for i, _ in told.top) for told in answer.logprobs] == [named, named]
    with torch.no_grad():
        row = tiny.reference.model(None)(torch.tensor([ids(tiny)])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(
        torch.tensor([p for _, p in answer.logprobs[0].top]), row[list(named)], atol=1e-3, rtol=0
    )
    with pytest.raises(InvalidOptionError, match="more than 128 named tokens"):
        tiny.engine.submit([replace(request, reported_ids=tuple(range(129)))])


def test_usage_counts_tokens_and_those_in_the_cache(tiny: Tiny) -> None:
    prompt_ids = [7 + i % 400 for i in range(3 * BLOCK_TOKENS + 5)]
    first, second = (answers(tiny, plan(tiny.llm, prompt_ids, cache_salt="one"))[0].usage for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.prompt_tokens, first.completion_tokens) == (len(prompt_ids), 12)
    assert (first.cached_tokens, second.cached_tokens) == (0, 3 * BLOCK_TOKENS)


def test_a_salt_and_prefix_caching_off_share_nothing(tiny: Tiny) -> None:
    prompt_ids = [9 + i % 400 for i in range(3 * BLOCK_TOKENS + 5)]

    def cached(salt: str, *, shares_prefix: bool = True) -> int:
        (request,) = plan(tiny.llm, prompt_ids, cache_salt=salt)
        (answer,) = answers(tiny, [replace(request, shares_prefix=shares_prefix)])
        assert answer.usage is not None
        return answer.usage.cached_tokens

    assert cached("a") == 0
    assert cached("b") == 0
    assert cached("b") == 3 * BLOCK_TOKENS
    assert cached("b", shares_prefix=False) == 0


def test_a_closed_stream_aborts_its_request_at_vllm(tiny: Tiny) -> None:
    stream = tiny.engine.submit(plan(tiny.llm, ids(tiny), max_new_tokens=CONTEXT_TOKENS - 100))
    next(iter(stream))
    assert tiny.unfinished() == 1
    stream.close()
    wait_until(lambda: tiny.unfinished() == 0 and not tiny.engine._unended)
    assert len(tiny.llm.invoke(PROMPT)) > 0


def test_a_request_over_its_time_is_aborted_though_nobody_reads(tiny: Tiny) -> None:
    requests = plan(tiny.llm, ids(tiny), max_new_tokens=CONTEXT_TOKENS - 100)
    stream = tiny.engine.submit(requests, 0.3)
    wait_until(lambda: stream.cancelled and not tiny.engine._unended and tiny.unfinished() == 0)
    with pytest.raises(GenerationTimeoutError, match="timeout=0.3"):
        list(stream)


def test_a_request_whose_time_is_over_at_once_leaves_its_place(tiny: Tiny) -> None:
    one = [replace(request, max_rows=1, owner=7) for request in plan(tiny.llm, ids(tiny))]
    stream = tiny.engine.submit(one, 1e-9)
    wait_until(lambda: not tiny.engine._unended, 20)
    with pytest.raises(GenerationTimeoutError):
        list(stream)
    assert ask(tiny.llm, one)[0].finish_reason is not None


def test_a_stream_that_is_not_read_is_not_written_to(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_UNREAD", 20)
    tokens = 300
    stream = tiny.engine.submit(plan(tiny.llm, ids(tiny), max_new_tokens=tokens, ignore_eos=True))
    wait_until(lambda: stream.is_full and tiny.unfinished() == 0, 120)  # vLLM has written all
    assert len(stream._items) < tokens // 2
    assert sum(len(chunk.token_ids) for chunk in stream) == tokens


def test_batch_size_bounds_the_requests_of_an_object(tiny: Tiny) -> None:
    llm = QuantizedHuggingFaceLLM(**tiny.fields(batch_size=1))
    assert llm._engine() is tiny.engine
    long = [replace(r, owner=id(llm)) for _ in range(3) for r in plan(llm, ids(tiny), max_new_tokens=400)]
    with tiny.engine.submit(long) as stream:
        next(iter(stream))
        assert tiny.unfinished() == 1
        assert tiny.llm.invoke(PROMPT)  # of another object
    assert llm.batch([PROMPT, "a", "b"]) == [tiny.llm.invoke(p) for p in (PROMPT, "a", "b")]


def test_a_full_queue_says_so(tiny: Tiny) -> None:
    llm = QuantizedHuggingFaceLLM(**tiny.fields(batch_size=1, max_waiting=1))
    (request,) = (replace(r, owner=id(llm)) for r in plan(llm, ids(tiny), max_new_tokens=400))
    with ExitStack() as open_streams:
        open_streams.enter_context(tiny.engine.submit([request]))
        open_streams.enter_context(tiny.engine.submit([request]))
        with pytest.raises(QueueFullError, match="max_waiting=1"):
            llm.invoke(PROMPT)
    wait_until(lambda: not tiny.engine._unended)


@pytest.mark.parametrize("name", ["sql", "chat", "base"])
def test_adapters_write_the_texts_of_peft(tiny: Tiny, name: str) -> None:
    folder = None if name == "base" else Path(tiny.adapters[name])
    assert tiny.llm.invoke(PROMPT, adapter=name) == tiny.reference.text(folder, PROMPT)


def test_rows_of_several_adapters_and_of_none_run_side_by_side(tiny: Tiny) -> None:
    names = ["base", "sql", "chat"] * 4
    requests = [request for name in names for request in plan(tiny.llm, ids(tiny), adapter=name)]
    expected = {name: tiny.reference.text(Path(tiny.adapters[name]), PROMPT) for name in tiny.adapters}
    expected["base"] = tiny.reference.text(None, PROMPT)
    assert [answer.text for answer in answers(tiny, requests)] == [expected[name] for name in names]


class Person(BaseModel):
    name: str
    age: int


def chat_of(tiny: Tiny, **fields: Any) -> ChatQuantizedHuggingFace:
    return ChatQuantizedHuggingFace(**tiny.fields(**{"chat_template": TEMPLATE, "max_new_tokens": 200, **fields}))


def test_structured_output_matches_its_schema(tiny: Tiny) -> None:
    chat = chat_of(tiny, temperature=1.0)
    assert chat._engine() is tiny.engine
    for seed in range(4):
        found = chat.with_structured_output(Person, method="json_schema", include_raw=True).invoke("Who?", seed=seed)
        text = found["raw"].content
        if found["raw"].response_metadata["finish_reason"] == "stop":
            assert set(json.loads(text)) == {"name", "age"}
        else:  # vLLM's automaton does not close a text before its tokens run out
            assert text.startswith("{")


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        (Choice(["yes", "no"]), "(yes|no)"),
        (Regex("[0-9]{3}-[a-z]"), "[0-9]{3}-[a-z]"),
        (Grammar('root ::= "ab" | "cd"'), "(ab|cd)"),
    ],
)
def test_constraints_hold(tiny: Tiny, constraint: Any, expected: str) -> None:
    for seed in range(3):
        message = chat_of(tiny, temperature=1.5).invoke("?", constraint=constraint, seed=seed)
        assert re.fullmatch(expected, str(message.content)), message
        assert message.response_metadata["finish_reason"] == "stop"


def test_a_json_object_is_one(tiny: Tiny) -> None:
    message = chat_of(tiny, max_new_tokens=1500).invoke("?", constraint=JSONObject(), temperature=1.0, seed=3)
    if message.response_metadata["finish_reason"] == "stop":
        assert isinstance(json.loads(str(message.content)), dict)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("json", '{"type": "boolean"}', ("true", "false")),
        ("regex", "(left|right)", ("left", "right")),
        ("choice", ("left", "right"), ("left", "right")),
        ("grammar", 'root ::= "left" | "right"', ("left", "right")),
    ],
)
def test_each_kind_of_form_is_held(tiny: Tiny, kind: str, value: Any, expected: tuple[str, ...]) -> None:
    (request,) = plan(tiny.llm, ids(tiny), max_new_tokens=40)
    (answer,) = answers(tiny, [replace(request, form=OutputForm(kind=kind, value=value))])
    assert answer.text.strip() in expected
    assert answer.finish_reason == "stop"


def test_a_bad_request_fails_alone(tiny: Tiny) -> None:
    long = plan(tiny.llm, ids(tiny), max_new_tokens=300)
    (request,) = plan(tiny.llm, ids(tiny))
    bad = replace(request, form=OutputForm(kind="regex", value="(unclosed"))
    with tiny.engine.submit(long) as stream:
        with pytest.raises((InvalidOptionError, GenerationError)) as raised:
            list(tiny.engine.submit([bad]))
        assert "vLLM" in str(raised.value)
        assert sum(len(chunk.token_ids) for chunk in stream) == 300


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": 2.5}, "temperature=2.5"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"top_h": 0.5, "temperature": 1.0}, "top_h=0.5"),
        ({"adapter": "unknown"}, "adapter='unknown'"),
    ],
)
def test_what_vllm_does_not_carry_out_is_refused_by_name(tiny: Tiny, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidOptionError, match=told):
        tiny.llm.invoke(PROMPT, **options)


def test_masks_and_media_are_refused(tiny: Tiny) -> None:
    (request,) = plan(tiny.llm, ids(tiny))
    with pytest.raises(InvalidOptionError, match="mask"):
        tiny.engine.submit([replace(request, mask=lambda: None)])
    with pytest.raises(InvalidOptionError, match="images"):
        tiny.engine.submit([replace(request, media={"pixel_values": None})])


def test_starting_leaves_the_environment_as_it_was(tiny: Tiny) -> None:
    changed = {"VLLM_WORKER_MULTIPROC_METHOD", "LD_PRELOAD", "VLLM_NO_USAGE_STATS", "NUMEXPR_MAX_THREADS"}
    assert tiny.llm.is_loaded
    assert not changed & set(os.environ)


def test_many_threads_cancel_and_ask_and_nothing_is_left(tiny: Tiny) -> None:
    expected = {text: tiny.reference.text(None, text) for text in (PROMPT, "a", "b b", "c c c")}
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn, (text, whole) in enumerate(expected.items()):
            if (number + turn) % 3 == 0:
                with tiny.engine.submit(plan(tiny.llm, ids(tiny, text), max_new_tokens=500)) as stream:
                    next(iter(stream))
            elif tiny.llm.invoke(text) != whole:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not wrong
    wait_until(lambda: tiny.unfinished() == 0 and not tiny.engine._unended)


def test_the_end_of_vllms_process_fails_requests_with_words_and_the_next_call_starts_another(tiny: Tiny) -> None:
    engine = tiny.engine
    streams = [engine.submit(plan(tiny.llm, ids(tiny), max_new_tokens=1500)) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
    for process in processes(engine._llm):
        os.kill(process.pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(GenerationError) as raised:
            list(stream)
        assert str(raised.value) == DIED
    wait_until(lambda: has_died(engine._llm))
    assert tiny.llm.invoke(PROMPT) == tiny.reference.text(None, PROMPT)
    assert tiny.engine is engine
    assert tiny.llm.invoke(PROMPT, adapter="sql") == tiny.reference.text(Path(tiny.adapters["sql"]), PROMPT)


SCRIPT = """
from langchain_quantllm import VLLM, QuantizedHuggingFaceLLM

llm = QuantizedHuggingFaceLLM(model_id={model!r}, dtype="float32", max_new_tokens=8, engine=VLLM(**{options!r}))
{guard}print("TEXT", repr(llm.invoke({prompt!r})), flush=True)
"""


SCRIPTS_OWN = "QUANTLLM_TEST_SCRIPT"
"""Environment variable that a script's processes have, and no others."""


def run_script(tiny: Tiny, folder: Path, guard: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(model=str(tiny.base), options=TINY, guard=guard, prompt=PROMPT))
    command, env = [sys.executable, str(script)], {**os.environ, SCRIPTS_OWN: str(folder)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1000, check=False)


def is_of_script(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.environ().get(SCRIPTS_OWN) == str(folder)
    except psutil.Error:  # it has ended, or is another user's
        return False


def test_a_script_without_a_guard_gets_an_error_before_anything_starts(unstarted: Tiny, tmp_path: Path) -> None:
    done = run_script(unstarted, tmp_path, "")
    assert done.returncode == 1
    assert "__main__" in done.stderr
    assert f"line 5 of {tmp_path / 'script.py'}" in done.stderr
    assert "VLLM::" not in done.stderr


def test_the_end_of_a_script_ends_vllms_processes(unstarted: Tiny, tmp_path: Path) -> None:
    done = run_script(unstarted, tmp_path, 'if __name__ == "__main__":\n    ')
    assert f"TEXT {unstarted.reference.text(None, PROMPT, 8)!r}" in done.stdout, done.stderr[-3000:]
    assert done.returncode == 0
    wait_until(lambda: not any(is_of_script(process, tmp_path) for process in psutil.process_iter()), 60)


def test_tensor_parallel_over_two_processes_writes_the_same_tokens(
    unstarted: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else each worker wants a NUMA node of its own
    llm = QuantizedHuggingFaceLLM(
        **unstarted.fields(adapters={}, engine=VLLM(**TINY, tensor_parallel_size=2, distributed_executor_backend="mp"))
    )
    try:
        assert llm.batch([PROMPT, "a", "b"]) == [unstarted.reference.text(None, text) for text in (PROMPT, "a", "b")]
    finally:
        llm.unload()


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM uses Ray where there are GPUs")
def test_ray_is_refused_without_gpus(unstarted: Tiny) -> None:
    llm = QuantizedHuggingFaceLLM(**unstarted.fields(engine=VLLM(**TINY, distributed_executor_backend="ray")))
    with pytest.raises(UnsupportedError, match="does not run its workers for CPUs in Ray"):
        llm.invoke(PROMPT)


def test_gptq_folders_of_ours_go_straight_in(smollm2: Path, tmp_path: Path) -> None:
    """Each greedy token is the likeliest of the same weights in float32, but for what 16 bits round off."""
    folder = make_gptq_checkpoint(smollm2, tmp_path / "gptq", bits=4, group_size=64)
    llm = QuantizedHuggingFaceLLM(
        model_id=str(folder), dtype="bfloat16", engine=VLLM(**{**TINY, "kv_cache_memory_bytes": 64 << 20})
    )
    try:
        prompt_ids = llm.get_token_ids("The capital of France is")
        (answer,) = ask(llm, plan(llm, prompt_ids, max_new_tokens=16))
        assert "Paris" in answer.text
        assert llm.scheme.name == "gptq"
    finally:
        llm.unload()
    assert largest_loss(load_float_twin(smollm2, bits=4), prompt_ids, answer.token_ids) < 0.5


def largest_loss(model: Any, prompt_ids: list[int], answer_ids: list[int]) -> float:
    """Return how much less likely a token is than the likeliest in its place; 16 bits are off by 0.25 in an engine."""
    with torch.no_grad():
        rows = model(torch.tensor([prompt_ids + answer_ids])).logits[0]
    rows = rows[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return float((rows.amax(-1) - rows.gather(-1, torch.tensor(answer_ids)[:, None])[:, 0]).max())


@pytest.mark.parametrize(
    ("scheme", "distill"),
    [(AWQ(group_size=64), None), (GPTQ(bits=4, group_size=64), Distillation(epochs=1))],
    ids=["awq", "gptq-distilled"],
)
def test_what_quantize_writes_is_read_with_its_own_weights(
    short_smollm2: Path, tmp_path: Path, scheme: Any, distill: Distillation | None
) -> None:
    texts = Calibration(samples=4, tokens=64)
    quantize(short_smollm2, scheme, texts, tmp_path / "out", distill=distill, device="cpu", progress=False)
    llm = QuantizedHuggingFaceLLM(
        model_id=str(tmp_path / "out"), engine=VLLM(**{**TINY, "kv_cache_memory_bytes": 64 << 20})
    )
    try:
        prompt_ids = llm.get_token_ids("The capital of France is")
        (answer,) = ask(llm, plan(llm, prompt_ids, max_new_tokens=16))
        assert llm.scheme.name == scheme.name
    finally:
        llm.unload()
    form = format_of_scheme(scheme)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    twin = AutoModelForCausalLM.from_pretrained(short_smollm2, dtype=torch.float32)
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        layer = form.read({key: tensors[f"{name}.{key}"] for key in form.tensors})
        twin.get_submodule(name).weight.data.copy_(layer.dequantize())
    assert largest_loss(twin, prompt_ids, answer.token_ids) < 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM reads it on GPUs")
def test_gptq_of_eight_bits_is_refused_on_a_cpu(smollm2: Path, tmp_path: Path) -> None:
    folder = make_gptq_checkpoint(smollm2, tmp_path / "gptq", bits=8, small=True)
    llm = QuantizedHuggingFaceLLM(model_id=str(folder), dtype="bfloat16", engine=VLLM(**TINY))
    with pytest.raises(CheckpointError, match=r"GPTQ weights of 8 bits, which vLLM .* reads on GPUs alone"):
        llm.invoke(PROMPT)


def test_gptq_in_float32_is_refused_with_vllms_reason(smollm2: Path, tmp_path: Path) -> None:
    folder = make_gptq_checkpoint(smollm2, tmp_path / "gptq", small=True)
    llm = QuantizedHuggingFaceLLM(model_id=str(folder), dtype="float32", engine=VLLM(**TINY))
    with pytest.raises(CheckpointError, match=r"cannot run .*: torch\.float32 is not supported"):
        llm.invoke(PROMPT)


def test_what_vllm_cannot_start_says_so_and_leaves_no_process(unstarted: Tiny) -> None:
    before = set(psutil.Process().children(recursive=True))
    llm = QuantizedHuggingFaceLLM(**unstarted.fields(engine=VLLM(**{**TINY, "engine_args": {"block_size": 7}})))
    with pytest.raises(CheckpointError, match="vLLM .* cannot run"):
        llm.invoke(PROMPT)
    wait_until(lambda: not any(is_vllm(p) for p in set(psutil.Process().children(recursive=True)) - before))


def test_an_argument_that_vllm_does_not_know_is_named(unstarted: Tiny) -> None:
    llm = QuantizedHuggingFaceLLM(**unstarted.fields(engine=VLLM(engine_args={"blok_size": 32})))
    with pytest.raises(InvalidOptionError, match="did you mean 'block_size'"):
        llm.invoke(PROMPT)


def test_options_of_a_call_are_checked_against_the_limits(tiny: Tiny) -> None:
    (request,) = plan(tiny.llm, ids(tiny))
    with pytest.raises(InvalidOptionError, match="token ids from 0"):
        tiny.engine.submit([replace(request, prompt_ids=(10**6,))])
    assert isinstance(chat_of(tiny).invoke([HumanMessage("hi")], max_new_tokens=2).content, str)
