"""Memory: estimates against really loaded models, measurements against known allocations."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import mmap
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    TorchAoConfig,
    ViTConfig,
)

from langchain_quantllm.compat.transformers_models import cache_name
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    ModelNotFoundError,
    NotEnoughMemoryError,
    UnsupportedError,
)
from langchain_quantllm.loading.estimate import estimate_memory
from langchain_quantllm.memory import (
    CpuReading,
    MemoryReport,
    MemorySnapshot,
    WeightBytes,
    available_memory,
    check_fits,
    format_bytes,
    memory_notes,
    take_snapshot,
    track_memory,
    weights_by_kind,
)
from langchain_quantllm.memory.bars import Bars, stage_bars
from langchain_quantllm.memory.measure import _container_left_bytes, _resident_parts
from langchain_quantllm.schemes import GPTQ, NF4, SCHEMES, Int8, Scheme
from tests.support.checkpoints import run_python
from tests.support.gptq_checkpoints import make_gptq_checkpoint
from tests.support.models import wait_until
from tests.support.selection import slow_but

MB = 10**6
SCHEME_NAMES = ["none", "int8", "nf4", "nf4-double", "fp4"]
LLAMA_2_7B = LlamaConfig(max_position_embeddings=4096, dtype="float16")  # the defaults are those of the 7B model
LLAMA_2_7B_PARAMETERS = 6_738_415_616
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "dtype": "bfloat16",
}


def load(folder: Path, scheme: Scheme, dtype: str = "bfloat16", device: str = "cpu") -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        quantization_config=scheme.transformers_config(dtype),
        device_map=device,
        local_files_only=True,
    )


def save_tiny(folder: Path, **options: Any) -> Path:
    config = LlamaConfig(**{**TINY, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def assert_estimated(estimated: WeightBytes, loaded: WeightBytes) -> None:
    """3% is what the estimate promises; the formulas of today's formats are exact."""
    assert loaded.total_bytes > 0
    assert estimated.total_bytes == pytest.approx(loaded.total_bytes, rel=0.03)
    assert estimated.quantized_bytes == pytest.approx(loaded.quantized_bytes, rel=0.03)
    assert estimated.unquantized_bytes == pytest.approx(loaded.unquantized_bytes, rel=0.03)
    assert estimated.buffers_bytes == pytest.approx(loaded.buffers_bytes, rel=0.03)


class TestEstimate:
    @pytest.mark.parametrize("name", slow_but(("none", "int8", "nf4"), SCHEME_NAMES, pytest.mark.compat))
    def test_smollm2_as_loaded(self, smollm2: Path, name: str) -> None:
        estimate = estimate_memory(str(smollm2), name)
        assert estimate.dtype == "bfloat16"
        assert estimate.scheme == SCHEMES[name]
        assert estimate.parameters == 134_515_008
        assert_estimated(estimate.weights, weights_by_kind(load(smollm2, SCHEMES[name])))
        assert estimate.total_bytes == estimate.bytes_by_scheme[name]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["none", "int8", "nf4"])
    def test_qwen_as_loaded(self, qwen_coder: Path, name: str) -> None:
        assert_estimated(
            estimate_memory(str(qwen_coder), name).weights, weights_by_kind(load(qwen_coder, SCHEMES[name]))
        )

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_dtype_as_loaded(self, tmp_path: Path, dtype: str) -> None:
        folder = save_tiny(tmp_path, attention_bias=True)
        estimate = estimate_memory(str(folder), "int8", dtype=getattr(torch, dtype))
        assert estimate.dtype == dtype
        assert estimate.weights == weights_by_kind(load(folder, SCHEMES["int8"], dtype))

    @pytest.mark.parametrize(
        "scheme",
        [
            NF4(storage_dtype="bfloat16"),
            NF4(skip_modules=("lm_head", "down_proj"), double_quantization=True),
            Int8(skip_modules=("lm_head", "model.layers.1")),
        ],
        ids=lambda s: s.name,
    )
    @pytest.mark.parametrize("tied", [False, True])
    def test_options_as_loaded(self, tmp_path: Path, scheme: Scheme, tied: bool) -> None:
        folder = save_tiny(tmp_path, tie_word_embeddings=tied)
        assert estimate_memory(str(folder), scheme).weights == weights_by_kind(load(folder, scheme))

    def test_conv1d_and_odd_shapes_as_loaded(self, tmp_path: Path) -> None:
        config = GPT2Config(vocab_size=101, n_embd=60, n_layer=1, n_head=2, n_positions=64, dtype="bfloat16")
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        estimate = estimate_memory(str(tmp_path), "nf4-double")
        assert estimate.context_tokens == 64
        assert estimate.weights == weights_by_kind(load(tmp_path, SCHEMES["nf4-double"]))

    def test_modules_kept_in_float32_as_loaded(self, tmp_path: Path) -> None:
        """T5 keeps `wo` in float32 when the rest is float16."""
        config = T5Config(vocab_size=256, d_model=64, d_kv=32, num_heads=2, d_ff=128, num_layers=2)
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
        assert {p.dtype for p in loaded.parameters()} == {torch.float16, torch.float32}
        assert estimate_memory(str(tmp_path), dtype="float16").weights == weights_by_kind(loaded)

    def test_llama_2_7b(self) -> None:
        estimate = estimate_memory(LLAMA_2_7B, "nf4")
        assert estimate.parameters == LLAMA_2_7B_PARAMETERS
        buffers_bytes = 2 * 64 * 4  # the rotary frequencies, kept twice
        assert estimate.bytes_16bit == 2 * LLAMA_2_7B_PARAMETERS + buffers_bytes
        linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
        quantized_bytes = linears // 2 + 4 * linears // 64 + 32 * 7 * 16 * 4
        unquantized_bytes = 2 * (LLAMA_2_7B_PARAMETERS - linears)
        assert estimate.weights.quantized_bytes == quantized_bytes
        assert estimate.weights.unquantized_bytes == unquantized_bytes
        assert estimate.total_bytes == quantized_bytes + unquantized_bytes + buffers_bytes
        assert estimate.saving == pytest.approx(1 - estimate.total_bytes / (2 * LLAMA_2_7B_PARAMETERS), abs=1e-6)
        token_bytes = 2 * 32 * 4096 * 2
        assert estimate.kv_cache_bytes_per_token == token_bytes
        assert estimate.context_tokens == 4096
        assert estimate.total_with_cache_bytes(1000, batch=3) == estimate.total_bytes + 3000 * token_bytes

    def test_llama_2_7b_orders_the_schemes(self) -> None:
        totals = estimate_memory(LLAMA_2_7B).bytes_by_scheme
        assert totals["none"] > totals["int8"] > totals["nf4"] > totals["nf4-double"]
        assert totals["none"] == 2 * LLAMA_2_7B_PARAMETERS + 512
        assert "gptq" not in totals

    @pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, -1), (3, 32)])
    def test_gptq_as_in_the_checkpoint(self, smollm2: Path, tmp_path: Path, bits: int, group_size: int) -> None:
        """All tensors of a GPTQ checkpoint are held as they are stored; only buffers come on top."""
        make_gptq_checkpoint(smollm2, tmp_path, bits=bits, group_size=group_size, small=True)
        estimate = estimate_memory(str(tmp_path))
        assert estimate.scheme == GPTQ(bits=bits, group_size=group_size, sym=True, desc_act=False)
        assert estimate.bytes_by_scheme == {}
        stored_bytes = (tmp_path / "model.safetensors").stat().st_size
        weights_bytes = estimate.total_bytes - estimate.weights.buffers_bytes
        assert weights_bytes == pytest.approx(stored_bytes, abs=8192)  # the header of the file
        assert estimate.weights.quantized_bytes > 0

    @pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs gptqmodel")
    def test_gptq_as_loaded(self, smollm2: Path, tmp_path: Path) -> None:
        """In a process of its own: importing gptqmodel changes the logging and the environment."""
        make_gptq_checkpoint(smollm2, tmp_path, small=True)
        code = f"""
import json, torch
from transformers import AutoModelForCausalLM
from langchain_quantllm.memory import weights_by_kind
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, device_map="cpu", dtype=torch.float16)
print(json.dumps(weights_by_kind(model).to_dict()))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        loaded = json.loads(done.stdout.splitlines()[-1])
        del loaded["total_bytes"]
        assert_estimated(estimate_memory(str(tmp_path)).weights, WeightBytes(**loaded))

    def test_prequantized_checkpoint_as_loaded(self, tmp_path: Path) -> None:
        plain = save_tiny(tmp_path / "plain")
        load(plain, NF4(double_quantization=True)).save_pretrained(tmp_path / "nf4")
        estimate = estimate_memory(str(tmp_path / "nf4"))
        assert estimate.scheme.name == "nf4"
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map="cpu")
        assert estimate.weights == weights_by_kind(loaded)
        assert estimate_memory(str(tmp_path / "nf4"), "nf4").weights == estimate.weights
        with pytest.raises(CheckpointError, match="already quantized with 'nf4'"):
            estimate_memory(str(tmp_path / "nf4"), "int8")

    def test_leaves_the_config_alone(self) -> None:
        config = LlamaConfig(**TINY, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
        before = config.to_dict()
        assert estimate_memory(config, dtype="float16").scheme.name == "gptq"
        assert config.to_dict() == before

    def test_errors(self, tmp_path: Path) -> None:
        config = LlamaConfig(**TINY)
        with pytest.raises(ModelNotFoundError, match="no-such-model"):
            estimate_memory(str(tmp_path / "no-such-model"))
        with pytest.raises(InvalidOptionError, match="did you mean 'nf4'"):
            estimate_memory(config, "nf44")
        with pytest.raises(InvalidOptionError, match="dtype='int8'"):
            estimate_memory(config, dtype="int8")
        with pytest.raises(UnsupportedError, match="'vit'"):
            estimate_memory(ViTConfig())
        (tmp_path / "config.json").write_text('{"model_type": "not-yet-invented"}')
        with pytest.raises(UnsupportedError, match="not-yet-invented"):
            estimate_memory(str(tmp_path))
        with pytest.raises(UnsupportedError, match="'awq'"):
            estimate_memory(LlamaConfig(**TINY, quantization_config={"quant_method": "awq", "bits": 4}))
        with pytest.raises(CheckpointError, match="4 bits"):
            estimate_memory(LlamaConfig(**TINY, quantization_config={"quant_method": "gptq", "bits": 4}), GPTQ(bits=8))


class TestCache:
    @pytest.mark.parametrize(
        "config",
        [
            LlamaConfig(**TINY),
            GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2, dtype="float32"),
            Gemma3TextConfig(**{**TINY, "num_hidden_layers": 7}, sliding_window=16, sliding_window_pattern=6),
        ],
        ids=lambda c: c.model_type,
    )
    def test_as_filled(self, config: Any) -> None:
        estimate = estimate_memory(config)
        model = AutoModelForCausalLM.from_config(config).eval()
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(input_ids=torch.ones((3, 40), dtype=torch.long), use_cache=True, **{cache_name(model): cache})
        filled_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        # transformers keeps one token less than the window in a sliding layer, until the next token comes
        windows = 3 * estimate.sliding_bytes_per_token
        assert estimate.kv_cache_bytes(40, batch=3) == pytest.approx(filled_bytes, abs=windows)

    def test_numbers_must_not_be_negative(self) -> None:
        with pytest.raises(InvalidOptionError, match="tokens=-1"):
            estimate_memory(LlamaConfig(**TINY)).kv_cache_bytes(-1)


class TestWeights:
    def test_plain_modules_by_arithmetic(self) -> None:
        module = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.BatchNorm1d(20))
        weights = weights_by_kind(module)
        assert weights.unquantized_bytes == 4 * (200 + 20 + 20 + 20)
        assert weights.buffers_bytes == 4 * (20 + 20) + 8
        assert weights.quantized_bytes == 0
        # seven tensors: 800, 80, 80, 80 and 80, 80, 8 bytes, in blocks of 512
        assert weights.cuda_bytes == 8 * 512

    def test_shared_memory_counts_once(self) -> None:
        first, second = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
        second.weight = first.weight
        both = torch.nn.Sequential(first, second)
        assert weights_by_kind(both).total_bytes == 64 * 64 * 4
        whole = torch.zeros(128, 64)
        first.weight, second.weight = torch.nn.Parameter(whole[:64]), torch.nn.Parameter(whole[64:])
        both.register_buffer("whole", whole)
        assert weights_by_kind(both).total_bytes == whole.nbytes

    def test_offloaded_parameters_stand_apart(self) -> None:
        weights = weights_by_kind(torch.nn.Linear(16, 16, device="meta"))
        assert weights.total_bytes == 0
        assert weights.offloaded_bytes == 4 * (16 * 16 + 16)

    @pytest.mark.parametrize("name", ["int8", "nf4-double"])
    def test_state_stays_counted_after_a_forward(self, tmp_path: Path, name: str) -> None:
        """bitsandbytes moves its state from the parameter to the module in the first forward."""
        model = load(save_tiny(tmp_path), SCHEMES[name], "float16")
        before = weights_by_kind(model)
        with torch.no_grad():
            model(input_ids=torch.ones((1, 4), dtype=torch.long))
        after = weights_by_kind(model)
        assert before.quantized_bytes > 0
        # 10%: where the CPU has AVX512-BF16, the first forward repacks 4-bit weights and their scales
        assert after.quantized_bytes == pytest.approx(before.quantized_bytes, rel=0.1)
        assert after.unquantized_bytes == before.unquantized_bytes

    @pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
    def test_torchao(self, tmp_path: Path) -> None:
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
        model = AutoModelForCausalLM.from_pretrained(
            save_tiny(tmp_path), dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
        )
        linears = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
        rows = 2 * (2 * 128 + 2 * 64 + 2 * 256 + 128)
        # int8 weights, and a float32 scale and an int8 zero point for each row
        assert weights_by_kind(model).quantized_bytes == linears + 5 * rows


def resident(size_bytes: int) -> mmap.mmap:
    """Take memory of the system itself: an allocator may have freed blocks, resident already, for a tensor."""
    memory = mmap.mmap(-1, size_bytes)
    for page in range(0, size_bytes, mmap.PAGESIZE):
        memory[page] = 1
    return memory


class TestMeasuring:
    def test_snapshot_of_the_cpu(self) -> None:
        before = take_snapshot().reading("cpu")
        kept = resident(100 * MB)
        after = take_snapshot().reading("cpu")
        kept.close()
        assert before is not None
        assert after is not None
        # 10 MB: what the interpreter and other threads allocate or free meanwhile
        assert after.used_bytes - before.used_bytes == pytest.approx(100 * MB, abs=10 * MB)
        assert after.peak_bytes >= after.used_bytes
        assert 0 < after.available_bytes <= after.total_bytes

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the parts of the resident memory")
    def test_parts_of_the_resident_memory_add_up(self, tmp_path: Path) -> None:
        file = tmp_path / "weights"
        file.write_bytes(bytes(64 * MB))
        before = take_snapshot().reading("cpu")
        own = resident(100 * MB)
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert not any(mapped[:: mmap.PAGESIZE])
            after = take_snapshot().reading("cpu")
        own.close()
        for reading in (before, after):
            parts = (reading.anonymous_bytes, reading.file_bytes, reading.shared_bytes)
            assert sum(parts) == reading.resident_bytes
        shared_bytes = after.shared_bytes - before.shared_bytes
        # Python's anonymous mmap is shared memory, which the kernel counts apart, if not mapped privately.
        assert after.anonymous_bytes - before.anonymous_bytes + shared_bytes == pytest.approx(100 * MB, abs=10 * MB)
        assert after.file_bytes - before.file_bytes == pytest.approx(64 * MB, abs=5 * MB)

    def test_systems_that_do_not_tell_the_parts(self, tmp_path: Path) -> None:
        (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t  1000 kB\n")
        assert _resident_parts(tmp_path / "status") == {}
        assert _resident_parts(tmp_path / "none") == {}
        reading = CpuReading(
            name="CPU", resident_bytes=5 * MB, peak_resident_bytes=5 * MB, available_bytes=1, total_bytes=2
        )
        snapshot = MemorySnapshot(readings=(reading,))
        assert "does not tell apart" in " ".join(memory_notes(snapshot))
        report = MemoryReport(
            model_id="m",
            scheme_name="nf4",
            devices=("cpu",),
            weights=WeightBytes(quantized_bytes=MB, unquantized_bytes=0, buffers_bytes=0),
            before=snapshot,
            after_loading=snapshot,
            after_generating=snapshot,
        )
        assert report.anonymous_growth is None
        assert "anonymous" not in str(report)
        assert "anonymous" not in report._repr_html_()

    def test_growth_is_told_of_what_was_seen_before_it_was_loaded(self) -> None:
        loaded, generated = (
            MemorySnapshot(
                readings=(
                    CpuReading(
                        name="CPU",
                        resident_bytes=size,
                        peak_resident_bytes=size,
                        available_bytes=1,
                        total_bytes=2,
                        anonymous_bytes=size,
                        file_bytes=0,
                    ),
                )
            )
            for size in (5 * MB, 9 * MB)
        )
        report = MemoryReport(
            model_id="m",
            scheme_name="nf4",
            devices=("cpu",),
            weights=WeightBytes(quantized_bytes=MB, unquantized_bytes=0, buffers_bytes=0),
            before=loaded,
            after_loading=loaded,
            after_generating=generated,
            kv_resident_bytes=MB,
        )
        assert report.anonymous_growth == {"kv_cache": MB, "weights": 0, "workspace": 3 * MB, "total": 4 * MB}
        # Of a pipeline of the user's own nobody saw the moment after loading: both are the reading of now.
        handed_in = replace(report, before=None, after_loading=generated)
        assert handed_in.anonymous_growth is None
        assert "since loading" not in str(handed_in)

    def test_tracking_sees_a_peak_that_is_gone_afterwards(self) -> None:
        with track_memory() as tracked:
            assert tracked.after is None
            with track_memory() as inner:
                passing = resident(200 * MB)
                assert inner.before.reading("cpu").used_bytes > 0
                seen_bytes = take_snapshot().reading("cpu").used_bytes
                wait_until(lambda: min(t.peak.get("cpu", 0) for t in (tracked, inner)) > seen_bytes - 20 * MB)
                passing.close()
        assert tracked.after is not None
        for measured in (tracked, inner):
            grown_bytes = measured.peak["cpu"] - measured.before.reading("cpu").used_bytes
            assert grown_bytes == pytest.approx(200 * MB, abs=20 * MB)
            assert measured.after.reading("cpu").used_bytes < measured.peak["cpu"] - 150 * MB
        text = str(tracked)
        assert repr(tracked) == text
        assert "resident, this process" in text
        assert "peak" in text
        json.dumps(tracked.to_dict())

    def test_tracking_ends_with_an_error(self) -> None:
        tracking = track_memory()
        tracked = tracking.__enter__()
        assert not tracking.__exit__(RuntimeError, RuntimeError("from the block"), None)
        assert tracked.after is not None

    def test_available_memory(self) -> None:
        assert 0 < available_memory("cpu") == pytest.approx(available_memory(torch.device("cpu")), abs=500 * MB)
        with pytest.raises(InvalidOptionError, match="'gpu'"):
            available_memory("gpu")
        with pytest.raises(InvalidOptionError, match="'meta'"):
            available_memory("meta")
        with pytest.raises(UnsupportedError, match="cuda:99"):
            available_memory("cuda:99")

    def test_container_limit(self, tmp_path: Path) -> None:
        assert _container_left_bytes(tmp_path) is None
        (tmp_path / "memory.max").write_text("max\n")
        (tmp_path / "memory.current").write_text("600\n")
        (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\n")
        assert _container_left_bytes(tmp_path) is None
        (tmp_path / "memory.max").write_text("1000\n")
        assert _container_left_bytes(tmp_path) == 1000 - 600 + 250

    def test_format_bytes(self) -> None:
        sizes = {0: "0 bytes", 999: "999 bytes", 1500: "1.50 kB", 162_861_952: "163 MB", 4_256_000_000: "4.26 GB"}
        assert {size: format_bytes(size) for size in sizes} == sizes
        assert format_bytes(999_999_999) == "1.00 GB"
        assert format_bytes(-2_000_000) == "-2.00 MB"


class TestFit:
    def test_what_fits_leaves_the_rest(self) -> None:
        estimate = estimate_memory(LlamaConfig(**TINY))
        left_bytes = check_fits(estimate, ["cpu"], max_memory={"cpu": "10MB"}, tokens=100, batch=2)
        assert left_bytes == 10 * MB - estimate.total_with_cache_bytes(100, batch=2)
        assert check_fits(estimate, ["cpu"]) > 0

    def test_names_the_schemes_that_fit(self) -> None:
        with pytest.raises(NotEnoughMemoryError) as caught:
            check_fits(estimate_memory(LLAMA_2_7B), ["cpu"], max_memory={"cpu": "8GB"})
        message = str(caught.value)
        assert "needs 13.5 GB for its weights" in message
        assert "8.00 GB on cpu" in message
        assert "'int8' (7.01 GB) or 'nf4' (4.17 GB)" in message
        assert "'none'" in message.split(";")[0]

    def test_says_what_else_to_do(self) -> None:
        estimate = estimate_memory(LLAMA_2_7B, "nf4")
        with pytest.raises(NotEnoughMemoryError, match=r"take a smaller model\.$"):
            check_fits(estimate, ["cpu"], max_memory={"cpu": "1GB"})
        with pytest.raises(NotEnoughMemoryError, match=r"8 x 4096 tokens.*hold fewer tokens"):
            check_fits(estimate, ["cpu"], max_memory={"cpu": "6GB"}, tokens=4096, batch=8)
        with pytest.raises(InvalidOptionError, match="'much'"):
            check_fits(estimate, ["cpu"], max_memory={"cpu": "much"})


class _Balance(HTMLParser):
    """Counts table rows, and keeps the tags that were not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(smollm2: Path) -> MemoryReport:
    with track_memory() as loading:
        model = load(smollm2, SCHEMES["int8"])
    weights = weights_by_kind(model)
    return MemoryReport(
        model_id="<b>SmolLM2</b>",
        scheme_name="int8",
        devices=("cpu",),
        weights=weights,
        before=loading.before,
        peak_loading=loading.peak,
        after_loading=loading.after,
        bytes_16bit=estimate_memory(str(smollm2)).bytes_16bit,
        kv_cache_bytes=23_040 * 100,
        notes=memory_notes(loading.before, weights),
    )


class TestReport:
    def test_summary(self, report: MemoryReport) -> None:
        assert report.summary() == "cpu: 163 MB weights (int8), 39% less than 16 bits"

    def test_text(self, report: MemoryReport) -> None:
        text = str(report)
        assert repr(report) == text
        first, title = text.splitlines()[:2]
        assert first == report.headline == "163 MB of weights instead of 269 MB in 16 bits: 39% less"
        assert title == "Memory of <b>SmolLM2</b> (int8)"
        for part in ("before", "peak, loading", "loaded", "resident, this process", "KV cache at its largest: 2.30 MB"):
            assert part in text
        assert "generated" not in text
        assert "1 MB = 1,000,000 bytes" in text
        assert max(map(len, text.splitlines())) <= 100
        assert text.isascii()

    @pytest.mark.parametrize(
        ("bytes_16bit", "headline"),
        [
            (None, "10.0 MB of weights"),
            (10 * MB, "10.0 MB of weights, as in 16 bits"),
            (5 * MB, "10.0 MB of weights instead of 5.00 MB in 16 bits: 100% more"),
            (25 * MB, "10.0 MB of weights instead of 25.0 MB in 16 bits: 60% less"),
        ],
    )
    def test_headline(self, report: MemoryReport, bytes_16bit: int | None, headline: str) -> None:
        weights = WeightBytes(quantized_bytes=10 * MB, unquantized_bytes=0, buffers_bytes=0)
        assert replace(report, weights=weights, bytes_16bit=bytes_16bit).headline == headline

    def test_html_is_escaped_and_stands_alone(self, report: MemoryReport) -> None:
        page = replace(report, scheme_name="<i>int8</i>")._repr_html_()
        assert "&lt;b&gt;SmolLM2" in page
        assert "&lt;i&gt;int8" in page
        for markup in ("<b>", "<i>", "<script", "<style", "<link", "<img", "url(", "http", " src=", " on"):
            assert markup not in page, markup
        parser = _Balance()
        parser.feed(page)
        assert parser.open == []
        assert parser.rows == len(report._table().rows) + 1 + len(report._bars().bars)

    def test_html_begins_with_the_headline_and_draws_bars(self, report: MemoryReport) -> None:
        page = report._repr_html_()
        assert page.index(report.headline) < page.index("peak, loading") < page.index("<caption>")
        widths = [float(width) for width in re.findall(r"<div style=.width:([\d.]+)%;background", page)]
        assert len(widths) >= len(report._bars().bars)
        # In 16 bits, what was there before and the weights: as the sizes are to each other.
        before_bytes = report.before.reading("cpu").resident_bytes
        assert widths[-1] / widths[-2] == pytest.approx(report.bytes_16bit / before_bytes, rel=0.01)

    def test_bars_are_the_measurements(self, report: MemoryReport) -> None:
        bars = {bar.label: bar for bar in report._bars().bars}
        assert list(bars) == ["before", "peak, loading", "loaded", "weights, int8", "weights, 16 bits"]
        before_bytes = report.before.reading("cpu").resident_bytes
        assert bars["before"].total_bytes == before_bytes
        assert bars["peak, loading"].total_bytes == report.peak_loading["cpu"]
        assert bars["loaded"].total_bytes == report.after_loading.reading("cpu").resident_bytes
        assert bars["weights, int8"].total_bytes == before_bytes + report.weights.total_bytes
        assert bars["weights, 16 bits"].total_bytes == before_bytes + report.bytes_16bit
        assert ("anonymous" in bars["loaded"].parts) == (sys.platform == "linux")

    def test_bars_without_anything_before_and_on_two_devices(self, report: MemoryReport) -> None:
        handed_in = replace(report, before=None, peak_loading=None, bytes_16bit=None)
        assert [bar.label for bar in handed_in._bars().bars] == ["loaded", "weights, int8"]
        stages = {"before": {"cuda:0": MB, "cuda:1": 2 * MB}, "peak": {"cuda:0": 5 * MB, "cuda:1": 6 * MB}}
        spread = stage_bars({**stages, "half": {"cuda:0": MB}}, ("cuda:0", "cuda:1"), {})
        assert [(bar.label, bar.parts) for bar in spread.bars] == [
            ("before", {"before loading": 3 * MB}),
            ("peak", {"before loading": 3 * MB, "allocated": 8 * MB}),
        ]
        assert Bars(title="none", bars=()).to_html() == ""

    def test_plot(self, report: MemoryReport) -> None:
        figure_module = pytest.importorskip("matplotlib.figure")
        figure = figure_module.Figure()
        given = figure.subplots()
        odd = replace(report, scheme_name="$\\frac$")  # no mathematics
        assert odd.plot(ax=given) is given
        figure.canvas.draw()
        ends = {patch.get_x() + patch.get_width() for patch in given.patches}
        factor = 10**9 if max(bar.total_bytes for bar in report._bars().bars) >= 10**9 else 10**6
        for bar in report._bars().bars:
            assert any(end == pytest.approx(bar.total_bytes / factor) for end in ends), bar.label
        own = report.plot()
        assert own.figure is not figure
        assert [label.get_text() for label in own.get_yticklabels()] == [bar.label for bar in report._bars().bars]
        importlib.import_module("matplotlib.pyplot").close(own.figure)

    def test_plot_without_matplotlib(self, report: MemoryReport, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(MissingPackageError, match=r'pip install "langchain-quantllm\[bench\]"'):
            report.plot()

    def test_dict_is_json(self, report: MemoryReport) -> None:
        read = json.loads(json.dumps(report.to_dict()))
        assert read["weights"]["total_bytes"] == report.weights.total_bytes
        assert read["before"]["cpu"]["resident_bytes"] > 0
        assert read["peak_loading"]["cpu"] >= read["after_loading"]["cpu"]["resident_bytes"]
        assert read["after_generating"] is None

    def test_notes_tell_of_the_cpu_only_what_applies(self, report: MemoryReport) -> None:
        notes = " ".join(report.notes)
        assert "cannot be reset" in notes
        assert ("NVML" in notes) == torch.cuda.is_available()
        offloaded = WeightBytes(quantized_bytes=0, unquantized_bytes=0, buffers_bytes=0, offloaded_bytes=1)
        assert "offloaded" in memory_notes(take_snapshot(), offloaded)[-1]


_FIRST_CALL = """
import gc, json, sys, torch
from langchain_quantllm import QuantizedHuggingFaceLLM

def held():  # bytes of the packed weights, wherever a tensor holds some
    gc.collect()
    octets = [t.untyped_storage() for t in gc.get_objects()
              if issubclass(type(t), torch.Tensor) and t.dtype in (torch.uint8, torch.int32) and t.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in octets}.values())

model_id, engine = sys.argv[1:]
llm = QuantizedHuggingFaceLLM(model_id=model_id, quantization="nf4", max_new_tokens=4, progress=False, engine=engine)
llm.load()
loaded_bytes = held()
llm.invoke("def fib(n):")
report = llm.memory_report().to_dict()
generated_bytes = held()
llm.unload()
from langchain_quantllm import take_snapshot
unloaded = take_snapshot().to_dict()
print(json.dumps({"report": report, "loaded": loaded_bytes, "generated": generated_bytes, "unloaded": unloaded}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the parts of the resident memory")
@pytest.mark.parametrize("engine", slow_but(("fast",), ["fast", "pipeline"]))
def test_what_the_first_call_takes_is_named_and_given_back(smollm2: Path, engine: str) -> None:
    ran = run_python(_FIRST_CALL, smollm2, engine, env={"OMP_NUM_THREADS": "1"}, timeout_s=500)
    found = json.loads(ran.stdout.splitlines()[-1])
    report, unloaded = found["report"], found["unloaded"]["cpu"]
    growth = report["anonymous_growth"]
    loaded, generated = (report[stage]["cpu"]["anonymous_bytes"] for stage in ("after_loading", "after_generating"))
    assert growth["total"] == generated - loaded == growth["kv_cache"] + growth["weights"] + growth["workspace"]
    assert found["generated"] <= 1.05 * found["loaded"]  # no second copy of a weight
    if engine == "fast":
        assert report["kv_cache_bytes"] <= growth["kv_cache"] < report["kv_pool_bytes"] / 4
    assert growth["workspace"] < report["weights"]["quantized_bytes"]
    assert unloaded["anonymous_bytes"] < loaded


def test_importing_loads_no_torch() -> None:
    code = "import sys, langchain_quantllm.memory; sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    @pytest.mark.parametrize("name", ["none", "int8", "nf4", "nf4-double"])
    def test_kinds_sum_to_what_the_allocator_counts(self, tmp_path: Path, name: str) -> None:
        folder = save_tiny(tmp_path, vocab_size=32000, hidden_size=2048, intermediate_size=5632, head_dim=512)
        gc.collect()
        torch.cuda.empty_cache()
        torch.zeros(1, device="cuda")  # the context and its statistics
        start_bytes = torch.cuda.memory_stats()["requested_bytes.all.current"]
        with track_memory(["cuda:0"]) as tracked:
            model = load(folder, SCHEMES[name], device="cuda:0")
            gc.collect()
        requested_bytes = torch.cuda.memory_stats()["requested_bytes.all.current"] - start_bytes
        grown_bytes = tracked.after.reading("cuda:0").used_bytes - tracked.before.reading("cuda:0").used_bytes
        weights = weights_by_kind(model)
        # 1%: tables that bitsandbytes makes once in a process
        assert weights.total_bytes == pytest.approx(requested_bytes, rel=0.01)
        # 3%: an unsplit block wastes up to 1 MB, and the tensors of this small model have a few MB; 0.5% for a 7B
        assert weights.cuda_bytes <= grown_bytes
        assert estimate_memory(str(folder), name).total_bytes == pytest.approx(grown_bytes, rel=0.03)
        assert tracked.peak["cuda:0"] >= tracked.after.reading("cuda:0").used_bytes

    def test_nested_peaks_survive_the_reset(self) -> None:
        with track_memory(["cuda:0"]) as outer:
            big = torch.empty(100 * MB, dtype=torch.uint8, device="cuda")
            del big
            with track_memory(["cuda:0"]) as inner:
                small = torch.empty(10 * MB, dtype=torch.uint8, device="cuda")
                del small
        start_bytes = outer.before.reading("cuda:0").used_bytes
        assert outer.peak["cuda:0"] - start_bytes >= 100 * MB
        assert 10 * MB <= inner.peak["cuda:0"] - start_bytes < 20 * MB
        assert available_memory("cuda") > 0


def test_estimate_takes_a_config_from_a_folder(smollm2: Path) -> None:
    config = AutoConfig.from_pretrained(smollm2)
    assert estimate_memory(config, "fp4").total_bytes == estimate_memory(str(smollm2), "fp4").total_bytes
