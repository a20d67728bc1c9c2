"""Checkpoints that are quantized already, and loading from folders in a new process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_quantllm import FP4, NF4, Int8, Scheme
from langchain_quantllm.schemes import Prequantized
from tests.support.checkpoints import make_checkpoint, run_python
from tests.support.loading import PROMPT, make_llm

STORED: dict[str, Scheme] = {
    "int8": Int8(),
    "nf4": NF4(),
    "nf4-double": NF4(double_quantization=True),
    "fp4": FP4(),
}


@pytest.fixture(scope="module")
def stored(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoint in each scheme, saved before the first forward, which repacks 4-bit weights on CPUs."""
    folders = {}
    for name in STORED:
        folders[name] = tmp_path_factory.mktemp("stored") / name
        llm = make_llm(tiny, quantization=name).load()
        llm.pipeline.save_pretrained(folders[name])
        llm.unload()
    return folders


@pytest.fixture(scope="module")
def clean_run(
    tiny: Path, stored: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """A new process that loads from folders, with the package `kernels` installed and no Hub.

    Returns its report, and its output to the terminal.
    """
    root = tmp_path_factory.mktemp("clean")
    (root / "kernels.py").write_text(
        "import pathlib\ndef get_kernel(*_, **__):\n    pathlib.Path(__file__).with_name('asked').touch()\n"
    )
    code = """
import json, logging, os, socket, sys, threading
asked = []
def refuse(self, address, *_):
    asked.append(str(address)); raise OSError("no network here")
socket.socket.connect = refuse
socket.getaddrinfo = lambda host, *_, **__: refuse(None, host)
import torch, transformers, huggingface_hub
from transformers import LlamaForCausalLM  # which imports `kernels`, before anything of ours could hide it
from langchain_quantllm import QuantizedHuggingFaceLLM
def state():
    return {
        "environ": dict(os.environ), "dtype": str(torch.get_default_dtype()), "cwd": os.getcwd(),
        "root": [logging.root.level, len(logging.root.handlers)],
        "transformers": [logging.getLogger("transformers").level, len(logging.getLogger("transformers").handlers)],
        "bitsandbytes": [logging.getLogger("bitsandbytes").level, len(logging.getLogger("bitsandbytes").handlers)],
        "bars": [transformers.utils.logging.is_progress_bar_enabled(),
                 huggingface_hub.utils.are_progress_bars_disabled()],
        "argv": sys.argv, "hook": sys.excepthook is sys.__excepthook__, "threads": torch.get_num_threads(),
    }
before = state()
report = {"texts": {}, "schemes": {}}
for name, folder in json.loads(sys.argv[1]).items():
    llm = QuantizedHuggingFaceLLM(model_id=folder, progress=False, max_new_tokens=8,
                                  quantization="nf4" if name == "fresh" else None)
    report["texts"][name] = llm.invoke("The capital of France")
    report["schemes"][name] = llm.scheme.to_dict()
after = state()
report |= {"changed": {k: [before[k], after[k]] for k in before if before[k] != after[k]}, "asked": asked}
open(sys.argv[2], "w").write(json.dumps(report))
"""
    folders = json.dumps({"fresh": str(tiny), **{name: str(folder) for name, folder in stored.items()}})
    env = {"PYTHONPATH": str(root), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(root / "hf")}
    done = run_python(code, folders, root / "report.json", env=env)
    report = json.loads((root / "report.json").read_text())
    report["kernels"] = (root / "asked").exists()
    # torchao, where it is installed, complains while transformers imports it about kernels for other GPUs.
    said = [line for line in (done.stdout + done.stderr).splitlines() if "torchao" not in line and "pytree" not in line]
    return report, "\n".join(said)


@pytest.mark.parametrize("name", STORED)
def test_stored_scheme_is_recognized(tiny: Path, stored: dict[str, Path], name: str) -> None:
    llm = make_llm(stored[name]).load()
    scheme = llm.scheme
    assert type(scheme) is type(STORED[name])
    assert getattr(scheme, "double_quantization", False) == getattr(STORED[name], "double_quantization", False)
    layer = llm.pipeline.model.model.layers[0].self_attn.q_proj
    assert type(layer) is (bnb.nn.Linear8bitLt if name == "int8" else bnb.nn.Linear4bit)
    if name != "int8":
        assert layer.weight.quant_type == name.removesuffix("-double")
        assert layer.weight.quant_state.nested == name.endswith("double")
    assert llm.invoke(PROMPT) == make_llm(tiny, quantization=name).invoke(PROMPT)


@pytest.mark.parametrize("name", STORED)
def test_scheme_of_a_stored_checkpoint_is_known_before_loading(stored: dict[str, Path], name: str) -> None:
    """`scheme` is the scheme of the weights after loading, not `Unquantized`."""
    assert type(make_llm(stored[name]).scheme) is type(STORED[name])


@pytest.mark.parametrize("name", STORED)
def test_stored_scheme_may_be_asked_for(stored: dict[str, Path], name: str) -> None:
    llm = make_llm(stored[name], quantization=name)
    assert type(llm.load().scheme) is type(STORED[name])
    assert llm.invoke(PROMPT) == make_llm(stored[name]).invoke(PROMPT)


def test_stored_schemes_in_a_new_process(clean_run: tuple[dict[str, Any], str], tiny: Path) -> None:
    report, _ = clean_run
    for name in STORED:
        assert report["schemes"][name]["name"] == STORED[name].name
        assert report["texts"][name] == make_llm(tiny, quantization=name).invoke(PROMPT)
    assert report["texts"]["fresh"] == report["texts"]["nf4"]


def test_torchao_checkpoint(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    from transformers import TorchAoConfig

    source = make_checkpoint(tmp_path / "source")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map={"": "cpu"})
    folder = tmp_path / "torchao"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    llm = make_llm(folder).load()
    assert isinstance(llm.scheme, Prequantized)
    assert llm.scheme.method == "torchao"
    assert type(llm.pipeline.model.model.layers[0].self_attn.q_proj.weight).__module__.startswith("torchao")
    ids = AutoTokenizer.from_pretrained(source)(PROMPT, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert llm.invoke(PROMPT) == AutoTokenizer.from_pretrained(source).decode(expected, skip_special_tokens=True)


def test_loading_a_local_folder_sends_no_request(clean_run: tuple[dict[str, Any], str]) -> None:
    report, _ = clean_run
    assert report["asked"] == []
    assert report["kernels"] is False  # bitsandbytes would have asked the Hub through it


def test_loading_prints_nothing_without_progress(clean_run: tuple[dict[str, Any], str]) -> None:
    assert clean_run[1] == ""


def test_loading_changes_nothing_global(clean_run: tuple[dict[str, Any], str]) -> None:
    assert clean_run[0]["changed"] == {}
