"""Importing gptqmodel leaves no side effects."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from langchain_quantllm.compat import gptqmodel_import
from langchain_quantllm.errors import MissingPackageError
from tests.support.gptq_checkpoints import make_gptq_checkpoint

# Not imported here: only `gptqmodel_imported()` imports it.
if importlib.util.find_spec("gptqmodel") is None:
    pytest.skip("gptqmodel is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def four_bit(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One block of SmolLM2 in 4 bits, with quantize_config.json and the old name of the weight file."""
    folder = tmp_path_factory.mktemp("gptq") / "old"
    yield make_gptq_checkpoint(smollm2, folder, layout="old_name", small=True)
    shutil.rmtree(folder)


def test_all_patched_owners_exist() -> None:
    """If a library drops one of these names, gptqmodel may change another one instead, which would stay."""
    with gptqmodel_import.gptqmodel_imported():
        pass
    lost = [path for path in gptqmodel_import._PATCHED_OWNERS if gptqmodel_import._resolve(path) is None]
    assert lost == []


def test_a_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"accelerate", "optimum", "auto_gptq"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in installed else None)
    with pytest.raises(MissingPackageError) as caught, gptqmodel_import.gptqmodel_imported():
        pass
    assert 'pip install "langchain-quantllm[gptq]"' in str(caught.value)
    assert "needs gptqmodel:" in str(caught.value)
    assert "auto-gptq" in str(caught.value)


SIDE_EFFECTS = """
import logging, os, sys, threading, warnings
import accelerate.utils.modeling, safetensors.torch, transformers
import transformers.cache_utils, transformers.generation.utils, transformers.integrations.hub_kernels
import transformers.models.llama.modeling_llama, transformers.quantizers.auto, transformers.quantizers.quantizer_gptq
import torch._dynamo  # loads lazily, and changes torch when it does
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.disable_progress_bar()

def state():
    out = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("transformers", "accelerate", "safetensors", "huggingface_hub", "tokenizers"):
            for key, value in list(vars(module).items()):
                out[name, key] = id(value)
                if isinstance(value, dict):
                    out[name, key, "keys"] = len(value)
                if isinstance(value, type) and value.__module__ == name:
                    out |= {(name, key, k): id(v) for k, v in list(vars(value).items()) if not k.startswith("_abc")}
    return out

def loggers():
    return {n: (l.level, list(l.handlers), list(l.filters), l.propagate, l.disabled)
            for n, l in logging.root.manager.loggerDict.items() if isinstance(l, logging.Logger)}

root = logging.getLogger()
before = state(), dict(os.environ), (root.level, list(root.handlers)), list(warnings.filters), loggers()
stdout = sys.stdout

sys.path.insert(0, %(root)r)
from pathlib import Path
from tests.unit_tests.loading.test_gptq import load
model, _ = load(Path(%(folder)r))
assert "gptqmodel" in sys.modules
model, _ = load(Path(%(folder)r))

assert dict(os.environ) == before[1], set(os.environ.items()) ^ set(before[1].items())
assert (root.level, list(root.handlers)) == before[2]
assert warnings.filters == before[3]
now = loggers()
assert {n: now[n] for n in before[4]} == before[4]
assert sys.stdout is stdout and "causal_conv1d" not in sys.modules
after = state()
changed = sorted(k for k, v in before[0].items() if after.get(k, v) != v)
# Tables that fill by themselves, on any load.
own = ("MAPPING_NAMES", "_CAN_RECORD_REGISTRY", "_cache", "_cached_value", "__slotnames__")
changed = [k for k in changed if not any(part.endswith(own) for part in k[1:])]
assert not changed, changed
added = [k for k in after if k not in before[0] and len(k) == 3 and k[:2] in before[0]]
added = [k for k in added if not any(part.endswith(own) for part in k[1:])]
assert not added, added

from langchain_quantllm.compat import gptqmodel_import
original = accelerate.utils.modeling.clear_device_cache
with gptqmodel_import.gptqmodel_imported():
    assert accelerate.utils.modeling.clear_device_cache is not original
    with gptqmodel_import.gptqmodel_imported():
        pass
    assert accelerate.utils.modeling.clear_device_cache is not original
assert accelerate.utils.modeling.clear_device_cache is original
model.generate(model.dummy_inputs["input_ids"], max_new_tokens=2, do_sample=False)
"""


@pytest.mark.slow
def test_loading_leaves_the_process_as_it_was(four_bit: Path, tmp_path: Path) -> None:
    script = textwrap.dedent(SIDE_EFFECTS) % {"root": os.getcwd(), "folder": str(four_bit)}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTEST", "CUDA_", "PYTORCH_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    # torchao and bitsandbytes may speak, when transformers imports them by itself; gptqmodel may not.
    assert "GPT-QModel" not in done.stderr
    assert "gptqmodel" not in done.stderr.lower()


@pytest.mark.slow
def test_the_thread_that_imports_gptqmodel_never_ends() -> None:
    """Its end crashed the process in about every second run with Python 3.12 and torch 2.11."""
    script = """
    import sys, threading
    from langchain_quantllm.compat import gptqmodel_import

    importing = []
    class Watch:
        def find_spec(self, name, path=None, target=None):
            importing.append(threading.current_thread())
    sys.meta_path.insert(0, Watch())
    with gptqmodel_import.gptqmodel_imported():
        pass
    sys.meta_path.pop(0)
    threads = set(importing)
    assert len(threads) > 1, threads
    assert all(thread.is_alive() and (thread.daemon or thread is threading.main_thread()) for thread in threads)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_failing_block_puts_everything_back() -> None:
    import accelerate.utils.modeling as modeling

    with gptqmodel_import.gptqmodel_imported():
        pass

    @gptqmodel_import.gptqmodel_imported()
    def fail() -> None:
        os.environ["TVM_TARGET"] = "cuda"
        raise ZeroDivisionError

    original, level = modeling.clear_device_cache, logging.getLogger().level
    with pytest.raises(ZeroDivisionError):
        fail()
    assert modeling.clear_device_cache is original
    assert logging.getLogger().level == level
    assert "TVM_TARGET" not in os.environ
