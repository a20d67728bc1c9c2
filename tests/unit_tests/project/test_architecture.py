"""Import cycles, heavy imports and rules of style. Layers are import-linter's contract in pyproject.toml."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import langchain_quantllm

PACKAGE = Path(langchain_quantllm.__file__).parent
NAME = PACKAGE.name
LIGHT = {
    "",
    "_version",
    "errors",
    "schemes",
    "schemes.bitsandbytes",
    "schemes.config",
    "schemes.gptq",
    "schemes.scheme",
    "schemes.table",
    "options",
    "data.counterparts",
    "compat.packages",
    "loading.hub",
    "loading.sources",
    "quantization.gguf",
}
"""What may not import torch or transformers even when it is imported itself, only inside its functions."""


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
PRINTING = {name for name in FILES if name.partition(".")[0] == "cli"}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def imports(tree: ast.AST) -> list[str]:
    """Every module that is imported, in functions and under TYPE_CHECKING too, by its full name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "relative imports hide who is meant"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [str(given.value) for given in node.args[:1] if isinstance(given, ast.Constant)]
    return found


def imports_at_import(tree: ast.Module) -> list[str]:
    """Modules that are imported when this one is."""

    def walk(body: list[ast.stmt]) -> list[str]:
        found = []
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                found += walk(node.orelse)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found += imports(node)
            else:
                for field in ("body", "orelse", "finalbody", "handlers"):
                    found += walk(getattr(node, field, []))
        return found

    return walk(tree.body)


def own_modules(names: list[str]) -> set[str]:
    """The modules of this package among the imported names, without what is imported from them."""
    found = set()
    for name in names:
        if name == NAME or name.startswith(f"{NAME}."):
            path = name.removeprefix(NAME).removeprefix(".")
            while path not in FILES:
                path = path.rpartition(".")[0]
            found.add(path)
    return found


def names_of_third_parties(names: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_imports_have_no_cycle() -> None:
    """Import cycles within a layer, which the layers contract of pyproject.toml does not see."""
    graph = {name: own_modules(imports(tree)) - {name} for name, tree in TREES.items()}
    # A package's __init__ and its parts know each other; the package's own offers everything.
    graph = {name: {o for o in others if not name.startswith(f"{o}.") and o} for name, others in graph.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_modules_import_no_torch(name: str) -> None:
    heavy = {"torch", "transformers", "bitsandbytes", "accelerate", "gptqmodel", "langchain_huggingface", "pandas"}
    assert names_of_third_parties(imports_at_import(TREES[name])) & heavy == set()


@pytest.mark.parametrize("name", FILES)
def test_gptqmodel_is_never_imported_with_a_module(name: str) -> None:
    """Importing it changes the process, so it happens where it is contained."""
    assert names_of_third_parties(imports_at_import(TREES[name])) & {"gptqmodel", "optimum", "auto_gptq"} == set()


@pytest.mark.parametrize("name", FILES)
def test_imports_are_absolute(name: str) -> None:
    relative = [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.level]
    assert relative == []


@pytest.mark.parametrize("name", [name for name in FILES if name not in PRINTING])
def test_nobody_prints(name: str) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    talkers = {"print", "pprint", "logging.basicConfig", "sys.stdout.write", "sys.stderr.write", "input"}
    assert set(calls) & talkers == set()
    assert "typer" not in names_of_third_parties(imports(TREES[name]))


@pytest.mark.parametrize("name", FILES)
def test_nobody_sets_an_environment_variable(name: str) -> None:
    """Only what undoes gptqmodel's import, and what vLLM sets while it starts, may put the environment back."""
    if name in ("compat.gptqmodel_import", "compat.vllm"):
        return
    written = [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and ast.unparse(node.value) == "os.environ"
    ]
    assert written == []
    calls = {ast.unparse(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)}
    assert calls & {"os.putenv", "os.unsetenv", "os.environ.update", "os.environ.setdefault", "os.environ.pop"} == set()


def public_definitions(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and the public methods of its public classes."""
    found: list[tuple[str, ast.AST]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                found += [
                    (f"{node.name}.{part.name}", part)
                    for part in node.body
                    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and not part.name.startswith("_")
                ]
    return found


@pytest.mark.parametrize("name", FILES)
def test_docstrings(name: str) -> None:
    assert ast.get_docstring(TREES[name]), "what does the module own, and what must it not know?"
    missing = [label for label, node in public_definitions(TREES[name]) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert missing == []


@pytest.mark.parametrize("name", FILES)
def test_module_names_are_nouns(name: str) -> None:
    assert not set(name.split(".")) & {"utils", "util", "helpers", "helper", "manager", "common", "misc"}


def test_public_names_are_there() -> None:
    for name in langchain_quantllm.__all__:
        assert getattr(langchain_quantllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        langchain_quantllm.Nothing  # noqa: B018
    assert (PACKAGE / "py.typed").is_file()


PROMISED: dict[str, tuple[str, ...] | None] = {
    "transformers": ("transformers.utils.logging",),
    "peft": ("peft.functional",),
    "accelerate": (),
    "bitsandbytes": (),
    "gptqmodel": None,
    "optimum": None,
}
"""What libraries promise: the names of the package itself, and these modules; None where not even those."""

UNPROMISED_NAMES = {
    *("hf_device_map", "_hf_hook", "_no_split_modules"),
    *("hf_quantizer", "quantization_method", "_weight_conversions"),
    *("_generate_kwargs", "_forward_params", "_default_generation_config", "_get_default_generation_params"),
    *("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
    *("_attn_implementation", "eager_attention_forward", "past_key_values", "cache_params"),
    *("quant_state", "SCB", "CB", "Linear8bitLt", "Params4bit", "Int8Params", "QuantState", "packing_format_for_cpu"),
    *("QUANT_TYPE", "SUPPORTS_TRAINING", "qzeros", "g_idx", "dequantize_weight"),
    *("lora_A", "lora_B", "lora_variant", "base_layer", "merged_adapters", "active_adapters", "disable_adapters"),
}
"""Attributes and arguments that they do not, whether read by name or by `getattr`."""

FORMATS = {
    # Tensors and layers of a checkpoint's files, which is what these write, size or name.
    "memory.weights": {"qzeros"},
    "quantization.packing": {"qzeros", "g_idx"},
    "quantization.formats": {"qzeros", "g_idx"},
    "quantization.solver": {"g_idx"},
    "loading.gptq": {"qzeros", "g_idx"},
    "loading.expert_tensors": {"qzeros", "g_idx"},
    "loading.expert_stacks": {"qzeros", "g_idx"},
    "experts.gptq": {"qzeros", "g_idx"},
    # The layer that is public, made for measuring.
    "bench.memory": {"Linear8bitLt"},
}

OUTSIDE = [name for name in FILES if not name.startswith("compat")]


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_not_promised_is_imported_in_compat_alone(name: str) -> None:
    theirs = [imported for imported in imports(TREES[name]) if imported.partition(".")[0] in PROMISED]
    assert [imported for imported in theirs if not _is_promised(imported)] == []


def _is_promised(imported: str) -> bool:
    """Whether it is a package, a name out of it, or one of the modules or out of those."""
    modules = PROMISED[imported.partition(".")[0]]
    if modules is None:
        return False
    return imported.count(".") <= 1 or any(imported == m or imported.startswith(f"{m}.") for m in modules)


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_not_promised_is_read_in_compat_alone(name: str) -> None:
    found = set()
    docs = {id(node.value) for node in ast.walk(TREES[name]) if isinstance(node, ast.Expr)}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword):
            found.add(str(node.arg))
        elif isinstance(node, ast.Constant) and id(node) not in docs:
            found.add(str(node.value))
    assert found & UNPROMISED_NAMES <= FORMATS.get(name, set())
    assert "torch.ops.bitsandbytes" not in ast.unparse(TREES[name])


def test_every_module_of_compat_has_its_test() -> None:
    modules = {name.partition(".")[2] for name in FILES if name.startswith("compat.")}
    tested = {file.stem.removeprefix("test_") for file in (Path(__file__).parents[1] / "compat").glob("test_*.py")}
    assert tested == modules


FACTORIES = {"zeros", "ones", "empty", "rand", "randn", "linspace", "logspace", "eye"}
"""Functions of torch that make tensors of the default dtype, which programs change for the whole process."""


def test_no_tensor_has_the_default_dtype() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {f"torch.{factory}" for factory in FACTORIES}
        and not {"dtype", None} & {keyword.arg for keyword in node.keywords}
    ]
    assert not found
