"""What importing the package and making LLMs costs: no torch, no network, no time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import langchain_quantllm
from langchain_quantllm import QuantizedHuggingFaceLLM
from tests.support.checkpoints import run_python

HEAVY = ["torch", "transformers", "bitsandbytes", "accelerate", "gptqmodel", "huggingface_hub", "rich", "typer"]

CODE = """
import json, os, socket, sys, time
asked = []
def refuse(self, address, *_):
    asked.append(str(address)); raise OSError("no network here")
socket.socket.connect = refuse
socket.getaddrinfo = lambda host, *_, **__: refuse(None, host)
report, heavy = {}, json.loads(sys.argv[1])
environ = dict(os.environ)

def note(stage):
    report[stage] = [name for name in heavy if name in sys.modules]

began = time.perf_counter()
import langchain_quantllm
report["import_s"] = time.perf_counter() - began
note("package")
report["langchain"] = "langchain_core" in sys.modules
from langchain_quantllm import NF4, SCHEMES, Int8, QuantizedHuggingFaceLLM
note("class")
import logging
report["handlers"] = len(logging.root.handlers)

began = time.perf_counter()
llms = []
for i in range(10):
    llms.append(QuantizedHuggingFaceLLM(
        model_id=f"acme/tiny{i}", quantization=["int8", NF4(), None, {"name": "fp4"}][i % 4], temperature=0,
        max_tokens=5, stop=["x"], device=-1, dtype="float16", token="hf_secret", attn_implementation="sdpa",
        max_memory={"cpu": "1GB"} if i % 2 else None, local_files_only=bool(i % 2),
    ))
report["ten_s"] = time.perf_counter() - began
note("made")
llms[0].bind(stop=["y"]); repr(llms[0]); llms[0]._identifying_params; llms[0]._get_ls_params(); llms[0].scheme
QuantizedHuggingFaceLLM.from_model_id("acme/x", "text-generation", model_kwargs={"load_in_8bit": True},
                                      pipeline_kwargs={"max_new_tokens": 3})
import copy, pickle
from langchain_core.load import dumpd
pickle.loads(pickle.dumps(llms[1])); copy.deepcopy(llms[2]); dumpd(llms[3])
for llm in llms:
    llm.unload()
    assert not llm.is_loaded
note("used")
import langchain_quantllm.errors, langchain_quantllm.schemes, langchain_quantllm.options
note("light")
report["asked"], report["environ"] = asked, dict(os.environ) == environ
report["threads"] = __import__("threading").active_count()
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = run_python(CODE, json.dumps(HEAVY), env={"LANGSMITH_TRACING": "false"})
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_importing_the_package_is_light(report: dict[str, Any]) -> None:
    assert report["package"] == []
    assert not report["langchain"]
    assert report["import_s"] < 1


def test_importing_the_class_loads_no_torch(report: dict[str, Any]) -> None:
    assert not {"torch", "transformers", "bitsandbytes", "accelerate"} & set(report["class"])


def test_making_llms_loads_nothing_and_takes_no_time(report: dict[str, Any]) -> None:
    assert not {"torch", "transformers", "bitsandbytes", "accelerate", "gptqmodel"} & set(report["made"])
    assert report["ten_s"] < 0.5


def test_settings_are_read_without_loading(report: dict[str, Any]) -> None:
    assert not {"torch", "transformers", "bitsandbytes", "accelerate", "gptqmodel"} & set(report["used"])


def test_nothing_global_happens(report: dict[str, Any]) -> None:
    assert report["asked"] == []
    assert report["environ"]
    assert report["handlers"] == 0
    assert report["threads"] == 1


def test_version() -> None:
    pyproject = (Path(langchain_quantllm.__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    stated = re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)
    assert stated is not None
    assert langchain_quantllm.__version__ == stated[1]
    llm = QuantizedHuggingFaceLLM(model_id="acme/tiny")
    assert llm.metadata is not None
    assert llm.metadata["lc_versions"]["langchain-quantllm"] == stated[1]


def test_the_class_is_found_by_either_path() -> None:
    from langchain_quantllm.llms import QuantizedHuggingFaceLLM as Same

    assert langchain_quantllm.QuantizedHuggingFaceLLM is Same
