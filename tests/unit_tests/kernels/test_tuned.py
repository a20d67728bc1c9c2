"""The table of tuned configs: its file, which config a product takes from it, and what `bench --tune` writes into it.

The kernels run in Triton's interpreter where there is no GPU, and the processor stands for a kind of GPU.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm.bench.tune import Tuner
from langchain_quantllm.errors import InvalidOptionError, OutputError
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.kernels.linear import tuned
from langchain_quantllm.kernels.linear.config import LinearConfig, chip, config_for
from langchain_quantllm.kernels.linear.tuned import (
    Entry,
    Gpu,
    Product,
    TunedTable,
    product_of,
    read_table,
    table_file,
    write_table,
)
from langchain_quantllm.kernels.linear.weights import GPTQWeight, weight_of
from tests.support.interpreter import report_cases
from tests.unit_tests.kernels.test_linear import Case, layer, on

GPU = Gpu("Some GPU (80 GB)", 108)
PRODUCT = Product("nf4-64", 128, 64, "float32")
SPLIT = LinearConfig(regime="vector", outputs=8, words=8, splits=2, warps=1)
TILE = LinearConfig(regime="tile", outputs=16, words=16, decode="table", stages=2)
MATRIX = LinearConfig(regime="matrix", outputs=64, words=16, decode="permute", tile_rows=64)


def entry(rows: int, config: LinearConfig | None, product: Product = PRODUCT) -> Entry:
    return Entry(product=product, rows=rows, config=config, rule_us=12.5, best_us=10.0)


def test_what_is_written_is_read_again(tuned_folder: Path) -> None:
    entries = [entry(1, SPLIT), entry(8, None), replace(entry(64, TILE), rule_us=None)]
    file = write_table(GPU, entries[:2])
    assert file == tuned_folder / "some-gpu-80-gb.json"
    half = entry(128, MATRIX, Product("gptq4-128-asymmetric", 4096, 1024, "bfloat16"))
    write_table(GPU, [*entries[2:], half])  # beside the others
    table = read_table(GPU)
    assert table is not None
    assert list(table.entries.values()) == [*entries, half]
    assert len(table) == 2
    assert [path.name for path in tuned_folder.iterdir()] == [file.name]
    document = json.loads(file.read_text())
    assert (document["device"], document["multiprocessors"], document["version"]) == (*GPU, 1)
    assert {"package", "triton"} <= set(document)
    assert read_table(Gpu("Another GPU", 108)) is None


def test_a_table_lies_in_the_packages_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QUANTLLM_TUNED", raising=False)
    monkeypatch.setenv("QUANTLLM_CACHE", str(tmp_path))
    assert table_file(Gpu("../../Ünnamed\n", 1)) == tmp_path / "tuned" / "nnamed.json"
    assert table_file(Gpu("///", 1)) == tmp_path / "tuned" / "gpu.json"


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUANTLLM_TUNED", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written: .*name another folder in QUANTLLM_TUNED"):
        write_table(GPU, [entry(1, SPLIT)])


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    """Change the document."""
    return lambda document: {**document, **values}


def row(**values: Any) -> Callable[[dict[str, Any]], Any]:
    """Change its first entry."""
    return lambda document: {**document, "entries": [{**document["entries"][0], **values}]}


def option(**values: Any) -> Callable[[dict[str, Any]], Any]:
    """Change the config of its first entry."""
    return lambda document: row(config={**document["entries"][0]["config"], **values})(document)


STRANGE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda _: [], "it is no table of tuned products"),
    (changed(kind="bench"), "it is no table of tuned products"),
    (changed(version=2), "its version is 2, not 1"),
    (changed(version=True), "its version is True, not 1"),
    (changed(device="Another"), "its device is 'Another', not 'Some GPU"),
    (changed(device=["x" * 10**6]), "its device is"),
    (changed(multiprocessors=46), "its multiprocessors is 46, not 108"),
    (changed(triton="1.0.0"), "it was measured with Triton '1.0.0', and "),
    (changed(triton=None), "it was measured with Triton None"),
    (changed(entries={}), "its entries are no list"),
    (changed(entries=[None] * 10_001), "its entries are no list of up to 10000"),
    (changed(entries=[None]), "its entry 0 cannot be used: it has not just format"),
    (row(extra=1), "it has not just format"),
    (row(rows=0), "rows 0 is not possible"),
    (row(rows=True), "its rows is True"),
    (row(rows=10**300), "is not possible"),
    (row(in_features=-1), "in_features -1 is not possible"),
    (row(format="nf4"), "there is no product of 'nf4'"),
    (row(dtype="float64"), "there is no product of 'nf4-64' with 'float64'"),
    (row(best_us=-1), "-1 is no time"),
    (row(best_us=float("nan")), "nan is no time"),
    (row(best_us=10**400), "its entry 0 cannot be used"),
    (row(rule_us="fast"), "its rule_us is 'fast'"),
    (row(config=[]), r"its config is \[\]"),
    (row(rows=5), "the regime 'vector' takes up to 4 rows, not 5"),
    (option(threads=1), "it has not just regime"),
    (option(regime="scalar"), "no regime 'scalar'"),
    (option(outputs=24), "outputs 24 is not possible"),
    (option(outputs=8.0), "its outputs is 8.0"),
    (option(outputs=512, words=1024), "a tile of 512 times 1024 words is too large"),
    (option(splits=10**9), "splits 1000000000 is not possible"),
    (option(warps=64), "warps 64 is not possible"),
    (option(stages=0), "stages 0 is not possible"),
    (option(registers=1), "registers 1 is not possible"),
    (option(tile_rows=16), "the regime 'vector' has no tile_rows 16"),
    (option(regime="tile", decode="table"), "the regime 'tile' has no outputs 8"),
    (option(regime="tile", decode="shuffle", outputs=16, words=16), "float32 is not decoded by 'shuffle'"),
    (option(regime="matrix", decode="permute"), "takes float16 and bfloat16, not float32"),
    (
        row(format="gptq4-act-order", dtype="float16", config=asdict(MATRIX)),
        "the regime 'matrix' takes no weights with act-order",
    ),
]


@pytest.mark.parametrize(("change", "why"), STRANGE)
def test_a_strange_table_is_refused_by_a_sentence(change: Any, why: str, tuned_folder: Path) -> None:
    file = write_table(GPU, [entry(1, SPLIT)])
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InvalidOptionError, match=why) as raised:
        read_table(GPU)
    text = str(raised.value)
    assert text.startswith(f"the table of tuned products {file} is not used: ")
    assert text.endswith("; tune again with `langchain-quantllm bench FOLDER --tune`, or delete it.")
    assert len(text) < 1000
    write_table(GPU, [entry(2, None)])  # tuning again replaces it
    table = read_table(GPU)
    assert table is not None
    assert [found.rows for found in table.entries.values()] == [2]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is no JSON that can be read"),
        (b"\xff\xfe\xfa", "it is no JSON that can be read"),
        (b'{"kind": ', "it is no JSON that can be read"),
        (b"[" * 200_000, "it is no JSON that can be read"),
        (b"[" + b"9" * 5000 + b"]", "it is no"),
        (b" " * (4 * 2**20 + 1), "it has more than 4194304 bytes"),
        (None, "it is no file"),
    ],
)
def test_a_damaged_table_is_refused_by_a_sentence(content: bytes | None, why: str, tuned_folder: Path) -> None:
    file = table_file(GPU)
    if content is None:
        os.mkfifo(file) if hasattr(os, "mkfifo") else file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(InvalidOptionError, match=f"is not used: {why}.*tune again"):
        read_table(GPU)


def test_a_table_that_is_not_used_is_said_once(
    tuned_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuned, "gpu_of", lambda device: GPU)
    table_file(GPU).write_text("{")
    device = torch.device("cpu")
    with caplog.at_level(logging.WARNING):
        assert [tuned.table_for(device) for _ in range(3)] == [None] * 3
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"the table of tuned products {table_file(GPU)} is not used"
    ]
    assert tuned.describe(device) is None
    assert tuned.state_of(device).startswith("no: the table of tuned products")
    write_table(GPU, [entry(1, SPLIT)])
    assert tuned.state_of(device) == "1 products"
    assert tuned.describe(device) == "1 products that were measured on this kind of GPU"


def test_the_next_larger_number_of_rows_counts() -> None:
    table = TunedTable([entry(16, TILE), entry(1, SPLIT), entry(4, None)])
    found = {rows: table.config(PRODUCT, rows) for rows in (1, 2, 4, 5, 16, 17)}
    assert found == {1: SPLIT, 2: None, 4: None, 5: TILE, 16: TILE, 17: None}
    assert table.config(PRODUCT._replace(dtype="bfloat16"), 1) is None
    assert table.config(PRODUCT._replace(out_features=128), 1) is None


def test_products_are_named_after_what_their_kernels_are_compiled_for() -> None:
    def name(**fields: Any) -> str:
        weight = weight_of(layer(Case(name="", **fields), 32, 0))
        assert weight is not None
        product = product_of(weight, 96, torch.bfloat16)
        assert product is not None
        assert tuple(product)[1:] == (128, 96, "bfloat16")
        with pytest.MonkeyPatch.context() as patch:  # and a table may have it
            patch.setattr(tuned, "cache_folder", lambda: Path("/nowhere"))
            entry(1, None, product).check()
        return product.format

    assert name(kind="fp4") == "fp4-64"
    assert name(kind="nf4", nested=True, block=128) == "nf4-128-nested"
    assert name(kind="int8") == "int8"
    assert name(kind="gptq4", symmetric=True, block=32) == "gptq4-32"
    assert name(kind="gptq3") == "gptq3-64-asymmetric"
    assert name(kind="gptq8", symmetric=True, act_order=True, block=32) == "gptq8-act-order"


# In Triton's interpreter, or on a GPU.


@contextmanager
def empty_table(gpu: Gpu = GPU) -> Iterator[None]:
    """Take every device for a kind of GPU that has no table yet."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTLLM_TUNED", scratch)
        patch.setattr(tuned, "gpu_of", lambda device: gpu)
        tuned.table_for.cache_clear()
        yield
    tuned.table_for.cache_clear()


def weights_on(device: str, kind: str = "nf4", inputs: int = 128) -> list[Any]:
    case = Case(name="", kind=kind, symmetric=True, inputs=inputs)
    return [on(weight_of(layer(case, 32, seed)), device) for seed in (0, 1)]  # type: ignore[arg-type]


def run_used(device: str) -> dict[str, Any]:
    """Multiply by the rule, by a table, and by the table's configs themselves."""
    from langchain_quantllm.kernels.linear import dispatch

    report = {}
    for kind in ("nf4", "gptq4"):
        weights = weights_on(device, kind, inputs=512)
        product = product_of(weights[0], 64, torch.float32)
        assert product is not None
        x = torch.randn(16, 512, generator=torch.Generator().manual_seed(2)).to(device)
        # Other sums than the rule's, and so other roundings.
        one, many = replace(SPLIT, outputs=32, splits=3), replace(TILE, splits=3)
        with empty_table():
            by_rule = {rows: dispatch.grouped_linear(x[:rows], weights) for rows in (1, 3, 16)}
            tiled = dispatch.tiled_linear(x, weights, None, tile_rows=64)
            alone = dispatch.quantized_linear(x[:1], weights[0])
            write_table(GPU, [entry(1, one, product), entry(2, None, product), entry(8, many, product)])
            found = {rows: dispatch.grouped_linear(x[:rows], weights) for rows in (1, 3, 16)}
            asked = {
                rows: dispatch.grouped_linear(x[:rows], weights, config=config)
                for rows, config in ((1, one), (3, many))
            }
            tiled_again = dispatch.tiled_linear(x, weights, None, tile_rows=64)
            alone_again = dispatch.quantized_linear(x[:1], weights[0])  # another product
        without = dispatch.grouped_linear(x[:1], weights)

        def same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
            return all(map(torch.equal, left, right))

        right = linear_reference.grouped_linear(x, weights)
        error = max(
            float((one - expected[: len(one)]).abs().max())
            for outputs in found.values()
            for one, expected in zip(outputs, right, strict=True)
        )
        report[kind] = {
            "as asked": same(found[1], asked[1]) and same(found[3], asked[3]),
            "as the rule": [same(found[rows], by_rule[rows]) for rows in (1, 3, 16)],
            "tiled": same(tiled, tiled_again),
            "without": same(without, by_rule[1]) and torch.equal(alone, alone_again),
            "error": error,
        }
    return report


def run_tuner(device: str) -> dict[str, Any]:
    """Tune with times that are made up, so that the best is known."""
    weights = weights_on(device)[:1]
    product = product_of(weights[0], 32, torch.float32)
    assert product is not None
    rule = config_for(weights[0], 1, chip(weights[0].words.device)[0], dtype=torch.float32, out_features=32)

    def tuned_by(
        time_us: Callable[[LinearConfig], float], rows: Sequence[int] = (1,), until: float = float("inf")
    ) -> Any:
        lines: list[str] = []
        with empty_table():
            tuner = Tuner(
                GPU, report=lines.append, rows=rows, time_us=lambda calls: time_us(calls[0].keywords["config"])
            )  # type: ignore[attr-defined]
            tuner.until = until
            try:
                tuner.run({product: [weights]})
                stopped = False
            except KeyboardInterrupt:
                stopped = True
            table = read_table(GPU)
        entries = [] if table is None else list(table.entries.values())
        return {
            "configs": [None if one.config is None else asdict(one.config) for one in entries],
            "times": [(one.rule_us, one.best_us) for one in entries],
            "lines": lines,
            "left_out": tuner.left_out,
            "stopped": stopped,
        }

    measured: list[LinearConfig] = []

    def stop(config: LinearConfig) -> float:
        measured.append(config)
        if config.regime == "tile":
            raise KeyboardInterrupt
        return 4.0 if config.warps == 2 * rule.warps else 8.0

    def fails_by_rule(config: LinearConfig) -> float:
        if config == rule:
            raise RuntimeError("out of resource: shared memory")
        return 8.0

    return {
        "splits": tuned_by(lambda config: 9.0 if config.splits == 8 else 10.0),
        "little": tuned_by(lambda config: 10.0 if config == rule else 9.8),
        "rule fails": tuned_by(fails_by_rule),
        "stopped": tuned_by(stop, rows=(1, 16)),
        "late": tuned_by(lambda config: 1.0, rows=(1, 2, 128), until=0.0),  # 128 are multiplied by cuBLAS
        "rule": asdict(rule),
        "measured": len(set(measured)),
    }


OTHERS = {"used": run_used, "tuner": run_tuner}


def run(name: str, device: str) -> dict[str, Any]:
    return OTHERS[name](device)


def test_tuned_configs_are_used_and_give_the_right_results(found: Any) -> None:
    for kind, report in found("used").items():
        assert report["as asked"], kind
        assert report["as the rule"] == [False, False, True], kind  # 16 rows were not tuned
        assert report["tiled"], kind
        assert report["without"], kind
        assert report["error"] < 1e-4, kind


def test_the_tuner_writes_what_is_faster_than_the_rule(found: Any) -> None:
    report = found("tuner")
    rule = report["rule"]
    [config] = report["splits"]["configs"]
    assert config == {**rule, "splits": 8}
    assert report["splits"]["times"] == [[10.0, 9.0]] or report["splits"]["times"] == [(10.0, 9.0)]
    assert "rule 10.00 µs, best 9.00 µs v" in report["splits"]["lines"][0]
    assert report["little"]["configs"] == [None]  # 2% are no gain
    [config] = report["rule fails"]["configs"]
    assert config not in (None, rule)
    assert [list(times) for times in report["rule fails"]["times"]] == [[None, 8.0]]
    assert "rule does not run here" in report["rule fails"]["lines"][0]


def test_what_was_measured_is_kept_when_tuning_is_stopped(found: Any) -> None:
    report = found("tuner")
    stopped, late = report["stopped"], report["late"]
    assert stopped["stopped"]
    [config] = stopped["configs"]
    assert config == {**report["rule"], "warps": 2 * report["rule"]["warps"]}
    assert report["measured"] > 8
    assert (late["configs"], late["left_out"], late["stopped"]) == ([], 2, False)


def test_act_order_has_a_format_of_its_own() -> None:
    weight = weight_of(layer(Case(name="", kind="gptq4", act_order=True, block=32), 32, 0))
    assert isinstance(weight, GPTQWeight)
    assert weight.group_size == 0


if __name__ == "__main__":
    report_cases(lambda name: run(name, "cpu"))
