"""Who imports whom, and the rules of style that a parser can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import langchain_quantllm

PACKAGE = Path(langchain_quantllm.__file__).parent
NAME = PACKAGE.name
LEVELS = {
    "_version": 0,
    "errors": 0,
    "engine": 0,  # the package's own __init__, which imports nothing
    "adapter_names": 1,
    "schemes": 1,
    "output_folder": 1,
    "packages": 1,
    "hub": 1,
    "sources": 1,
    "silence": 1,
    "engine.counterparts": 1,
    "engine.options": 1,
    "engine.request": 1,
    "engine.stopping": 1,
    "engine.pages": 1,
    "checkpoint": 2,
    "compat": 0,
    "compat.accelerate": 2,
    "compat.bitsandbytes": 2,
    "compat.gptqmodel": 2,
    "compat.gptqmodel_import": 2,
    "compat.peft": 2,
    "compat.versions": 1,
    "compat.transformers_attention": 2,
    "compat.transformers_auto": 2,
    "compat.transformers_models": 2,
    "compat.transformers_pipelines": 2,
    "compat.transformers_quantizers": 2,
    "gguf": 2,
    "gptq": 2,
    "memory": 2,
    "memory.bars": 2,
    "memory.budget": 2,
    "memory.estimate": 2,
    "memory.heap": 2,
    "memory.layout": 2,
    "memory.notes": 2,
    "memory.report": 2,
    "memory.snapshot": 2,
    "memory.table": 2,
    "memory.tracking": 2,
    "memory.weights": 2,
    "engine.scheduler": 2,
    "quantization": 0,
    "quantization.packing": 2,
    "quantization.solver": 2,
    "quantization.calibration": 2,
    "quantization.journal": 2,
    "quantization.blocks": 2,
    "quantization.run": 3,
    "quantization.quantizing": 4,
    "kernels": 2,
    "kernels.fused": 2,
    "kernels.fused_reference": 2,
    "kernels.fused_rotary": 2,
    "kernels.drawing": 2,
    "kernels.codebook_ptx": 2,
    "kernels.decoding": 2,
    "kernels.dense_products": 2,
    "kernels.launching": 2,
    "kernels.packed_products": 2,
    "kernels.paged_attention": 2,
    "kernels.reference": 2,
    "kernels.cpu_products": 2,
    "kernels.row_products": 2,
    "kernels.weight_only": 2,
    "kernels.weight_reference": 2,
    "kernels.weights": 2,
    "constraints": 2,
    "constraints.compiler": 2,
    "constraints.kinds": 2,
    "constraints.masks": 2,
    "constraints.merging": 2,
    "constraints.strict": 2,
    "messages": 1,
    "messages.calls": 2,
    "messages.contents": 1,
    "messages.formats": 1,
    "messages.images": 1,
    "messages.literals": 1,
    "messages.parsing": 2,
    "messages.scanning": 1,
    "messages.tagged": 2,
    "messages.template_parsing": 2,
    "messages.templates": 2,
    "messages.turns": 2,
    "adapters": 3,
    "demo_model": 3,
    "loading": 3,
    "pipelines": 3,
    "placement": 3,
    "processors": 3,
    "engine.adapters": 3,
    "engine.attention": 3,
    "engine.batch_sampler": 3,
    "engine.capture": 3,
    "engine.fused_layers": 3,
    "engine.fused_drawing": 3,
    "engine.fused_products": 3,
    "engine.product_checks": 3,
    "engine.fusion": 3,
    "engine.fusion_checks": 3,
    "engine.kv_pool": 3,
    "engine.lora": 3,
    "engine.sampler": 3,
    "engine.fast_engine": 4,
    "engine.pipeline_engine": 4,
    "engine.prefill_graphs": 3,
    "engine.runner": 4,
    "engine.selection": 4,
    "engine.support": 4,
    "engine.trial": 4,
    "engine.worker": 4,
    "merging": 4,
    "answers": 4,
    "base": 5,
    "chat_models": 5,
    "chat_options": 5,
    "descriptions": 5,
    "replies": 5,
    "llms": 5,
    "benchmarks": 0,
    "benchmarks.memory": 6,
    "benchmarks.random_models": 6,
    "benchmarks.speed": 6,
    "benchmarks.calls": 6,
    "benchmarks.machine": 6,
    "benchmarks.overview": 6,
    "benchmarks.overview_calls": 6,
    "benchmarks.overview_results": 6,
    "benchmarks.plain_generation": 6,
    "benchmarks.plots": 6,
    "benchmarks.quality": 6,
    "benchmarks.repetition": 6,
    "benchmarks.training": 6,
    "benchmarks.warming": 6,
    "benchmarks.speed_results": 6,
    "cli": 7,
    "cli.__main__": 7,
    "cli.answering": 7,
    "cli.benches": 7,
    "cli.comparing": 7,
    "cli.console": 7,
    "cli.conversation": 7,
    "cli.diagnosing": 7,
    "cli.last_answer": 7,
    "cli.making": 7,
    "cli.measuring": 7,
    "cli.tables": 7,
    "comparison": 6,
    "prompts": 6,
    "": 8,  # the package's __init__, which offers what is below
}
"""The level of each module, as CONTRIBUTING.md has them. A new module needs one here."""

LIGHT = {
    "",
    "_version",
    "errors",
    "schemes",
    "packages",
    "hub",
    "sources",
    "gguf",
    "engine.counterparts",
    "engine.options",
}
"""What may not import torch or transformers even when it is imported itself, only inside its functions."""

PRINTING = {name for name in LEVELS if name.partition(".")[0] == "cli"}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
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


def test_every_module_has_a_level() -> None:
    assert set(FILES) - set(LEVELS) == set(), "a new module: which level is it on?"
    assert set(LEVELS) - set(FILES) == set(), "a module that is no more"


def test_levels_are_those_of_the_documents() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.+) \|$", text, re.MULTILINE)
    stated = {m.strip("`/").replace("/", "."): int(level) for level, modules in rows for m in modules.split(", ")}
    parts = {name for name in LEVELS if name in ("", "_version", "engine") or name.startswith(("memory.", "cli."))}
    assert stated == {name: level for name, level in LEVELS.items() if name not in parts}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_downwards(name: str) -> None:
    level = LEVELS[name]
    upwards = {other for other in own_modules(imports(TREES[name])) if LEVELS[other] > level}
    assert upwards == set()


def test_imports_have_no_cycle() -> None:
    """Modules of one level may import each other, but not in a circle."""
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


@pytest.mark.parametrize("name", [name for name, level in LEVELS.items() if level < 5])
def test_below_level_5_nobody_knows_langchain(name: str) -> None:
    others = {other for other in names_of_third_parties(imports(TREES[name])) if other.startswith(("lang", "pydantic"))}
    assert others - {NAME} == (others & {"langchain_core"} if name == "messages.turns" else set())


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("engine")])
def test_the_engine_knows_no_loading(name: str) -> None:
    known = own_modules(imports(TREES[name]))
    below = ("engine", "kernels", "errors", "compat", "memory")  # which the KV cache is sized by
    assert all(other.startswith(below) for other in known)


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
    """Only what undoes gptqmodel's import may put the environment back."""
    if name == "compat.gptqmodel_import":
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
    "quantization.run": {"qzeros", "g_idx"},
    "quantization.solver": {"g_idx"},
    "gptq": {"qzeros", "g_idx"},
    # The layer that is public, made for measuring.
    "benchmarks.memory": {"Linear8bitLt"},
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
    tested = {file.stem.removeprefix("test_") for file in (Path(__file__).parent / "compat").glob("test_*.py")}
    assert tested == modules
