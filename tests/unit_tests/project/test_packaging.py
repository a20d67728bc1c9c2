"""What is declared: ranges of versions against what was tried, packages that are imported, lock files, the Makefile."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import langchain_quantllm
from langchain_quantllm.compat.versions import TRIED, Tried
from tests.support.checkpoints import run_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
DECLARED = [Requirement(text) for text in [*PROJECT["project"]["dependencies"], *itertools.chain(*EXTRAS.values())]]

NEEDS_NEWER = [Requirement(text) for text in EXTRAS["gptq"] if text.startswith("torch")]
"""Requirements of an extra that begin later than those of the package itself."""

OPTIONAL_IMPORTS = {"datasets", "flash_attn", "fsspec", "kernels", "torchao", "triton"}
"""Imported only where installed; each use says what is missing, or goes without."""

IMPORT_NAMES = {"nvidia-ml-py": "pynvml", "pillow": "PIL", "huggingface-hub": "huggingface_hub", "pyyaml": "yaml"}


def documented() -> dict[str, Tried]:
    """The table of docs/compatibility.md."""
    text = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z-]+) \| (\d[\d.]*) \| (\d[\d.]*) \|", text, re.MULTILINE)
    return {package: Tried(oldest, newest) for package, oldest, newest in rows}


def upper_bound(requirement: Requirement) -> Version | None:
    bounds = [spec.version for spec in requirement.specifier if spec.operator == "<"]
    return Version(bounds[0]) if bounds else None


MAJOR = {"accelerate", "huggingface-hub", "langchain-core", "optimum"}
"""Packages that keep what they promise until their next major version; of others, the next minor one is not allowed."""


def next_series(package: str, newest: str) -> Version:
    """The first version of a package after the series of one that was tried."""
    release = Version(newest).release[: 1 if package in MAJOR else 2]
    return Version(".".join(map(str, [*release[:-1], release[-1] + 1])))


@pytest.mark.parametrize("requirement", [r for r in DECLARED if r.name in TRIED], ids=str)
def test_a_range_ends_where_nothing_was_tried(requirement: Requirement) -> None:
    bound, tried = upper_bound(requirement), documented()[requirement.name]
    assert bound is not None, f"{requirement.name} has no upper bound"
    assert bound <= next_series(requirement.name, tried.newest), (
        f"pyproject.toml allows {requirement}, but docs/compatibility.md has {tried.newest} as the newest tried: "
        "run make test-newest RECORD=1, and write the result into its table"
    )
    assert Version(tried.newest) in requirement.specifier
    (lowest,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    if requirement in NEEDS_NEWER:
        assert Version(tried.oldest) < Version(lowest) < Version(tried.newest)
    else:
        assert Version(lowest) == Version(tried.oldest), "the range begins with a version that was not tried"


@pytest.mark.parametrize(
    ("package", "newest", "bound", "is_allowed"),
    [
        ("transformers", "5.24.0", "5.25", True),
        ("transformers", "5.24.3", "5.26", False),
        ("transformers", "5.24.0", "6", False),
        ("torch", "2.15.0", "3", False),
        ("accelerate", "1.15.0", "2", True),
        ("accelerate", "1.15.0", "3", False),
    ],
)
def test_the_rule_for_ranges(package: str, newest: str, bound: str, is_allowed: bool) -> None:
    assert (Version(bound) <= next_series(package, newest)) == is_allowed


def test_what_was_tried_is_recorded() -> None:
    text = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    for which in ("newest", "oldest"):
        section = text.split(f"<!-- {which}:")[1].split(f"<!-- end of {which} -->")[0]
        recorded = dict(re.findall(r"^\| ([a-z-]+) \| (\d[\w.+]*) \|$", section, re.MULTILINE))
        left_out = {Requirement(text).name for text in EXTRAS["gptq"]} - {"torch"} if which == "oldest" else set()
        left_out |= {Requirement(text).name for text in EXTRAS["vllm"]}  # make test-vllm tries it
        for package, tried in TRIED.items():
            if package in left_out:  # tools/lock.py says why
                continue
            stated, found = Version(getattr(tried, which)), Version(Version(recorded[package]).public)
            assert stated <= found if which == "newest" else stated == found, f"make test-{which} RECORD=1: {package}"


def test_every_upper_bound_has_its_row() -> None:
    assert {r.name for r in DECLARED if upper_bound(r) is not None} == set(TRIED)


def test_what_changes_results_has_an_upper_bound() -> None:
    bounded = {r.name for r in DECLARED if upper_bound(r) is not None}
    assert {"torch", "transformers", "peft", "bitsandbytes", "gptqmodel"} <= bounded


def test_the_document_says_what_the_package_says() -> None:
    assert documented() == dict(TRIED)


def test_doctor_says_what_is_newer_than_tried(tmp_path: Path) -> None:
    info = tmp_path / "optimum-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: optimum\nVersion: 99.0\n")
    code = "from langchain_quantllm.cli import app; app(['doctor'])"
    done = run_python(code, env={"PYTHONPATH": str(tmp_path), "COLUMNS": "120"})
    (row,) = [line for line in done.stdout.splitlines() if " optimum " in line]
    assert "99.0" in row
    assert "newer than tried" in row
    assert any("peft" in line and TRIED["peft"].newest in line for line in done.stdout.splitlines())


def third_party_imports() -> dict[str, set[str]]:
    """Top-level names of packages that are imported anywhere, with the modules that do."""
    found: dict[str, set[str]] = {}
    package = Path(langchain_quantllm.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top != package.name:
                    found.setdefault(top, set()).add(str(path.relative_to(package)))
    return found


def test_every_package_that_is_imported_is_declared() -> None:
    declared = {IMPORT_NAMES.get(r.name, r.name.replace("-", "_")) for r in DECLARED}
    undeclared = {name: where for name, where in third_party_imports().items() if name not in declared}
    assert set(undeclared) <= OPTIONAL_IMPORTS, undeclared


def test_every_dependency_is_imported() -> None:
    imported = set(third_party_imports())
    required = {
        IMPORT_NAMES.get(r.name, r.name.replace("-", "_")) for r in map(Requirement, PROJECT["project"]["dependencies"])
    }
    assert required <= imported


def locked(name: str) -> dict[str, list[Requirement]]:
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    found: dict[str, list[Requirement]] = {}
    for line in re.findall(r"^[a-z].*?(?= *\\$)", text, re.MULTILINE):
        found.setdefault(Requirement(line).name, []).append(Requirement(line))
    return found


@pytest.mark.parametrize("name", ["demo", "test", "oldest"])
def test_a_lock_holds_every_dependency_within_its_range(name: str) -> None:
    pins = locked(name)
    wanted = PROJECT["project"]["dependencies"] if name == "demo" else map(str, DECLARED)
    extras = {"demo": (), "test": ("notebook", "quality", "vllm"), "oldest": ("notebook", "gptq", "quality", "vllm")}[
        name
    ]
    left_out = {Requirement(text).name for extra in extras for text in EXTRAS[extra]} | {"torch"}  # torch: torch.txt
    for requirement in map(Requirement, wanted):
        if requirement.name in left_out:
            continue
        assert requirement.name in pins, f"make lock: {requirement.name} is not in requirements/{name}.txt"
        for pin in pins[requirement.name]:
            (spec,) = pin.specifier
            assert spec.operator == "=="
            assert requirement.specifier.contains(spec.version), f"make lock: {pin} is outside {requirement}"


def test_locks_draw_no_libraries_for_gpus() -> None:
    for name in ("demo", "test", "oldest"):
        assert not [pin for pin in locked(name) if pin.startswith(("nvidia-cu", "cuda-"))]


def test_every_pin_has_a_hash() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        pins = re.split(r"^(?=[a-z])", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        assert pins
        for pin in pins:
            assert "--hash=sha256:" in pin, f"{path.name}: {pin}"


def test_the_locked_torch_is_in_range() -> None:
    torch = next(r for r in DECLARED if r.name == "torch")
    pins = re.findall(r"^torch==([\w.+]+)", (ROOT / "requirements/torch.txt").read_text(encoding="utf-8"), re.MULTILINE)
    (version,) = {Version(pin).public for pin in pins}
    assert torch.specifier.contains(version)
    oldest = re.findall(r'^OLDEST_TORCH = "(.+)"$', (ROOT / "tools/lock.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert oldest == [TRIED["torch"].oldest]
    described = [table["version"] for table in PROJECT["tool"]["uv"]["dependency-metadata"]]
    assert sorted(described) == sorted([version, *oldest]), "pyproject.toml describes other versions of torch"


def test_help_lists_every_command_of_the_makefile() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)[0].split()
    described = re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)
    assert sorted(described) == sorted(phony)
