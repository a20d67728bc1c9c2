"""The packages that schemes need, compared with those of transformers, and the commands that install them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from langchain_quantllm.compat import packages
from langchain_quantllm.compat.packages import check_packages, is_installed, label_of
from langchain_quantllm.errors import MissingPackageError
from langchain_quantllm.schemes import GPTQ, NF4, Int8, Prequantized, Scheme, Unquantized


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that seem to be installed: those added to this set, and no others."""
    names: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object() if name in names else None)
    return names


@pytest.mark.parametrize(
    ("scheme", "label"),
    [(Int8(), "int8"), (NF4(double_quantization=True), "nf4"), (Prequantized(method="awq"), "awq")],
)
def test_a_label_is_the_scheme_s_name_or_the_checkpoint_s_format(scheme: Scheme, label: str) -> None:
    assert label_of(scheme) == label


def test_schemes_without_packages_need_none(installed: set[str]) -> None:
    assert installed == set()
    check_packages(None)
    check_packages(Unquantized())
    check_packages(Prequantized(method="of-tomorrow"))


@pytest.mark.parametrize(
    ("scheme", "needed", "command"),
    [
        (Int8(), ["bitsandbytes", "accelerate"], "pip install bitsandbytes"),
        (NF4(), ["bitsandbytes", "accelerate"], "pip install bitsandbytes"),
        (GPTQ(), ["gptqmodel", "optimum", "accelerate"], 'pip install "langchain-quantllm[gptq]"'),
        (Prequantized(method="gptq"), ["gptqmodel", "optimum"], 'pip install "langchain-quantllm[gptq]"'),
        (Prequantized(method="awq"), ["gptqmodel"], 'pip install "langchain-quantllm[gptq]"'),
        (Prequantized(method="torchao"), ["torchao"], "pip install torchao"),
        (
            Prequantized(method="compressed-tensors"),
            ["compressed_tensors"],
            "pip install compressed-tensors",
        ),
    ],
    ids=lambda value: label_of(value) if isinstance(value, Scheme) else "",
)
def test_each_missing_package_is_named_with_its_command(
    installed: set[str], scheme: Scheme, needed: list[str], command: str
) -> None:
    with pytest.raises(MissingPackageError) as caught:
        check_packages(scheme)
    assert all(name in str(caught.value) for name in needed)
    assert command in str(caught.value)
    installed.update(needed[1:])
    with pytest.raises(MissingPackageError, match=f"needs {needed[0]}: "):
        check_packages(scheme)
    installed.add(needed[0])
    check_packages(scheme)


def test_auto_gptq_does_not_replace_gptqmodel(installed: set[str]) -> None:
    installed.add("auto_gptq")
    with pytest.raises(MissingPackageError, match="auto-gptq is there, but it cannot run with transformers 5"):
        check_packages(GPTQ())


@pytest.mark.parametrize("method", packages._PACKAGES_OF_METHOD)
def test_transformers_knows_the_formats(method: str) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    assert method in AUTO_QUANTIZATION_CONFIG_MAPPING


@pytest.mark.parametrize("module", ["torchao", "compressed_tensors", "gptqmodel", "optimum"])
def test_transformers_looks_for_the_same_modules(module: str) -> None:
    from transformers.utils import import_utils

    check: Any = getattr(import_utils, f"is_{module}_available")
    assert bool(check()) == is_installed(module)


def test_a_package_is_found_without_importing_it() -> None:
    assert is_installed("torch")
    assert not is_installed("no_such_package")
