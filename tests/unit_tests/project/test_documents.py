"""README and docs/ are true: their code runs, their commands and links exist, their facts are those of the code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import langchain_quantllm
from langchain_quantllm import SCHEMES, QuantizedHuggingFaceLLM, QuantizedWhisperParser, structured
from langchain_quantllm.base import QuantizedModel
from langchain_quantllm.base.encoder_fields import EncoderFields
from langchain_quantllm.cli import app
from langchain_quantllm.compat.versions import TRIED
from langchain_quantllm.errors import InvalidOptionError
from tests.support.adapters import make_adapter
from tests.support.encoder_models import minilm, tiny_clip, tiny_qwen3_embedder
from tests.support.models import tiny_model
from tests.support.rerankers import save_cross_encoder
from tests.support.selection import slow_but
from tests.support.speech_models import whisper_model
from tests.support.vision import make_vision_checkpoint, picture

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "README.ja.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = DECLARED["project"]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
READMES = ["README.md", "README.ja.md"]

STAND_INS = {
    "elyza/ELYZA-japanese-Llama-2-7b": "text",
    "elyza/ELYZA-japanese-Llama-2-7b-instruct": "text",
    "meta-llama/Llama-2-13b-hf": "text",
    "HuggingFaceTB/SmolLM2-1.7B": "text",
    "Qwen/Qwen2.5-7B-Instruct": "text",
    "Qwen/Qwen2.5-0.5B-Instruct": "text",
    "Qwen/Qwen2.5-VL-7B-Instruct": "vision",
    "acme/qwen-support-lora": "sql-lora",
    "Qwen/Qwen3-Embedding-0.6B": "embedder",
    "sentence-transformers/all-MiniLM-L6-v2": "minilm",
    "BAAI/bge-reranker-v2-m3": "cross-encoder",
    "openai/clip-vit-base-patch32": "clip",
    "openai/whisper-large-v3-turbo": "whisper",
}
"""The model of a block, and the folder that stands in for it here; all are made by `workplace` and `shelf`."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    language: str
    line: int
    """Of the document, where the code begins, from 1."""
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(language: str) -> list[Block]:
    """The blocks in a language, of all documents."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(document, found[1], text.count("\n", 0, found.start(2)) + 1, found[2])
        for document, text in TEXTS.items()
        for found in fence.finditer(text)
        if found[1] == language
    ]


def spans() -> Iterator[tuple[str, str]]:
    """The code within the sentences of all documents, each with its document."""
    for document, text in TEXTS.items():
        sentences = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"(?<!`)`([^`\n]+)`", sentences):
            yield document, code


def commands() -> list[tuple[str, list[str]]]:
    """The command lines of all documents, in blocks and within sentences, as words, each with where it stands."""
    found = []
    for block in blocks("bash"):
        text = block.text.replace("\\\n", " ")
        for name, first in re.findall(r"for (\w+) in (\S+)", text):
            text = text.replace(f"${name}", first)
        found += [(str(block), shlex.split(line, comments=True)) for line in text.splitlines()]
    found += [(document, shlex.split(code)) for document, code in spans() if "'" not in code]
    setting = re.compile(r"[A-Z_]+=")
    found = [(where, list(dropwhile(setting.match, words))) for where, words in found]
    return [(where, words) for where, words in found if words]


# Code that runs


@pytest.fixture(scope="module")
def workplace(smollm2: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the blocks take: models of two layers, adapters, a picture, questions."""
    folder = tmp_path_factory.mktemp("documents")
    model = tiny_model(len(tokenizer))
    model.generation_config.max_new_tokens = 32  # where a block does not say
    model.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    make_vision_checkpoint(folder / "vision", "qwen2_5_vl")
    make_adapter(folder / "text", folder / "sql-lora", seed=0)
    for name in ("sql", "mail"):
        shutil.copytree(folder / "sql-lora", folder / "adapters" / name)
    picture().save(folder / "picture.png")
    (folder / "questions.jsonl").write_text('{"text": "How many customers are in Oslo?"}\n' * 8, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the encoders and sounds that the page about retrieval takes."""
    folder = tmp_path_factory.mktemp("shelf")
    tiny_qwen3_embedder(folder / "embedder")
    tiny_clip(folder / "clip")
    save_cross_encoder(folder / "cross-encoder")
    (folder / "minilm").symlink_to(minilm())
    (folder / "whisper").symlink_to(whisper_model())
    shutil.copy(ROOT / "tests" / "data" / "museum_en.ogg", folder)
    return folder


class StandIn(ast.NodeTransformer):
    """Puts the folder that stands in for a model into a block."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        """Replace a model's name."""
        known = isinstance(node.value, str) and node.value in STAND_INS
        return ast.copy_location(ast.Constant(STAND_INS[node.value]), node) if known else node


PYTHON_DOCUMENTS = dict.fromkeys(block.document for block in blocks("python"))
REPEATED = {"README.ja.md", "docs/quantize_adapt_merge.md"}
"""Documents whose code is that of README.md, or nearly so."""


@pytest.mark.parametrize("document", slow_but(PYTHON_DOCUMENTS.keys() - REPEATED, PYTHON_DOCUMENTS))
def test_the_blocks_of_a_document_run_in_their_order(
    document: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("xgrammar")
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    if document == "docs/rag.md":
        shutil.copytree(request.getfixturevalue("shelf"), tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in [block for block in blocks("python") if block.document == document]:
        tree = StandIn().visit(ast.parse("\n" * (block.line - 1) + block.text, document))
        exec(compile(tree, str(ROOT / document), "exec"), names)
    for value in names.values():
        if isinstance(value, QuantizedModel | EncoderFields | QuantizedWhisperParser):
            value.unload()


def test_every_stand_in_stands_in_for_a_model_of_a_block() -> None:
    text = "".join(block.text for block in blocks("python"))
    assert [name for name in STAND_INS if f'"{name}"' not in text] == []


def calls() -> list[tuple[str, ast.Call]]:
    """The calls within sentences, such as `Int8(threshold=6.0)`."""
    found = []
    for document, code in spans():
        try:
            tree = ast.parse(code, mode="eval").body
        except SyntaxError:
            continue
        if isinstance(tree, ast.Call):
            found.append((document, tree))
    return found


def test_arguments_within_sentences_exist() -> None:
    public = {name: getattr(langchain_quantllm, name) for name in langchain_quantllm.__all__} | vars(structured)
    checked, wrong = 0, []
    for document, call in calls():
        target = public.get(ast.unparse(call.func))
        if target is None:
            continue
        checked += 1
        fields = getattr(target, "model_fields", None)
        known = fields if fields is not None else inspect.signature(target).parameters
        aliases = {field.alias for field in (fields or {}).values()} | {"llm", "model", "pipeline"}  # no fields
        wrong += [(document, ast.unparse(call)) for k in call.keywords if k.arg not in known and k.arg not in aliases]
    assert checked > 10
    assert wrong == []


# Commands that exist


def test_commands_of_the_documents_are_ones_that_the_command_line_takes() -> None:
    group: Any = get_command(app)
    found = [(where, words[1:]) for where, words in commands() if words[0] == "langchain-quantllm" and words[1:]]
    assert len(found) > 20
    for where, words in found:
        assert words[0] in group.commands, f"{where}: there is no command {words[0]!r}"
        if len(words) == 1:
            continue  # named, not given whole
        try:
            group.commands[words[0]].make_context(words[0], words[1:])
        except Exception as error:  # typer's or click's; their base differs between versions
            pytest.fail(f"{where}: langchain-quantllm {shlex.join(words)}: {error}")


def test_targets_of_make_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    found = [(where, words[1]) for where, words in commands() if words[0] == "make" and len(words) > 1]
    assert found
    assert [(where, target) for where, target in found if target not in targets] == []


def test_modules_that_the_documents_run_exist_and_have_the_options() -> None:
    found = [(where, words[2:]) for where, words in commands() if words[:2] == ["python", "-m"]]
    assert found
    for where, (module, *words) in found:
        spec = importlib.util.find_spec(module)
        assert spec, f"{where}: there is no module {module}"
        source = Path(str(spec.origin)).read_text(encoding="utf-8")
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], where


def test_scripts_that_the_documents_run_exist() -> None:
    found = [
        (where, words[1]) for where, words in commands() if words[0] == "python" and words[1:2] not in ([], ["-m"])
    ]
    assert found
    assert [(where, script) for where, script in found if not (ROOT / script).is_file()] == []


def test_the_page_of_the_commands_is_what_the_command_line_says() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "commands.py"))["document"]()
    assert TEXTS["docs/commands.md"] == page, "python docs/commands.py writes it anew"


# Facts that are those of the code


def test_the_extras_that_documents_and_notebooks_install_are_those_of_the_project() -> None:
    notebooks = [path.read_text(encoding="utf-8") for path in (ROOT / "cookbook").glob("*.ipynb")]
    text = "".join([*TEXTS.values(), *notebooks])
    named = {name for group in re.findall(r"langchain-quantllm\[([\w,-]+)\]", text) for name in group.split(",")}
    named |= set(re.findall(r"`\[([a-z-]+)\]`", text))
    assert named == set(PROJECT["optional-dependencies"])


def tables(document: str) -> list[list[list[str]]]:
    """The tables of a document: rows of cells, without the line under the heads."""
    found = re.findall(r"(?:^\|.*\|\n)+", TEXTS[document], re.MULTILINE)
    return [[row.strip("|").split("|") for row in table.splitlines() if not row.startswith("|--")] for table in found]


@pytest.mark.parametrize("document", [*READMES, "docs/schemes.md"])
def test_the_table_of_schemes_has_every_scheme(document: str) -> None:
    table = next(table for table in tables(document) if any("`nf4-double`" in row[0] for row in table))
    assert sorted(re.findall(r"`([\w-]+)`", "".join(row[0] for row in table))) == sorted(SCHEMES)


@pytest.mark.parametrize("document", READMES)
def test_the_versions_needed_are_the_lower_bounds_and_what_was_tried(document: str) -> None:
    lower = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    python = re.findall(r"Python (\d\.\d+) (?:or newer|以上)", TEXTS[document])
    assert set(python) == {PROJECT["requires-python"].removeprefix(">=")}
    for name, package in (("PyTorch", "torch"), ("transformers", "transformers")):
        said = re.findall(rf"{name} (\d+\.\d+) (?:to|から) (\d+\.\d+)", TEXTS[document])
        assert said == [(lower[package], ".".join(TRIED[package].newest.split(".")[:2]))]


FIGURE = re.compile(r"\d[\d,]*\.\d+|\d{1,3}(?:,\d{3})+|\d{2,}(?! 億)")


def test_the_japanese_readme_has_no_figures_but_the_english_ones() -> None:
    english = set(FIGURE.findall(TEXTS["README.md"]))
    assert set(FIGURE.findall(TEXTS["README.ja.md"])) - english == set()


def test_both_readmes_have_the_same_figures_in_their_tables() -> None:
    english, japanese = tables("README.md"), tables("README.ja.md")
    assert len(english) == len(japanese)
    for ours, theirs in zip(english, japanese, strict=True):
        assert [FIGURE.findall("|".join(row)) for row in theirs] == [FIGURE.findall("|".join(row)) for row in ours]


class WithoutTexts(ast.NodeTransformer):
    """Takes the texts out of a block, which differ between languages."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        """Replace a text."""
        return ast.Constant("") if isinstance(node.value, str) else node


def test_both_readmes_have_the_same_examples() -> None:
    def examples(document: str, language: str) -> list[str]:
        return [block.text for block in blocks(language) if block.document == document]

    english, japanese = (
        [ast.dump(WithoutTexts().visit(ast.parse(text))) for text in examples(document, "python")]
        for document in READMES
    )
    assert english == japanese
    english, japanese = (
        [str(shlex.split(line, comments=True)) for text in examples(document, "bash") for line in text.splitlines()]
        for document in READMES
    )
    assert english == japanese


def test_both_readmes_have_the_same_sections_and_links() -> None:
    english, japanese = (re.findall(r"^#+ ", TEXTS[document], re.MULTILINE) for document in READMES)
    assert english == japanese
    english, japanese = (
        sorted(link for link in re.findall(r"\]\(([^)#\s]+)", TEXTS[document]) if not link.startswith("README"))
        for document in READMES
    )
    assert english == japanese


@pytest.mark.parametrize("document", READMES)
def test_a_readme_is_short(document: str) -> None:
    assert len(TEXTS[document].splitlines()) <= 180


def test_figures_that_stand_in_the_readme_are_those_of_the_pages() -> None:
    def row(document: str, head: str, *places: int) -> list[str]:
        found = next(row for table in tables(document) for row in table if row[0].strip() == head)
        return [found[place].strip() for place in places]

    for name in ("`none`", "`int8`", "`nf4`, `fp4`", "`nf4-double`, `fp4-double`", "`gptq`"):
        assert row("README.md", name, 1, 2) == row("docs/schemes.md", name, 1, 2)
    same = {head: head for head in ("`nf4`", "`int8`", "`none` (bfloat16)", "vLLM, bitsandbytes nf4", "vLLM, bfloat16")}
    same |= {"`gptq`, 4 bits": "`gptq`, 4 bits (Triton)", "vLLM, GPTQ, 4 bits": "vLLM, GPTQ, 4 bits (Marlin)"}
    same |= {"llama.cpp, Q4_0 (another run)": "llama.cpp, Q4_0 (an earlier run)"}
    speed = next(table for table in tables("README.md") if table[1][1].strip() == "377")
    page = next(table for table in tables("docs/speed.md") if table[1][1].strip() == "377")
    ours, theirs = ({row[0].strip(): [cell.strip() for cell in row[1:5]] for row in table} for table in (speed, page))
    assert {head: ours[head] for head in same} == {head: theirs[other] for head, other in same.items()}


def test_options_of_other_libraries_are_answered_as_the_table_says() -> None:
    table = next(table for table in tables("docs/coming_from.md") if "`num_predict`" in table[1][0])
    checked = 0
    for names, _, ours in table[1:]:
        for name in re.findall(r"`(\w+)`", names):
            with pytest.raises(InvalidOptionError) as raised:
                QuantizedHuggingFaceLLM(model_id="folder", **{name: 1})
            for told in re.findall(r"`([^`]+)`", ours):
                assert told in str(raised.value), name
            checked += 1
    assert checked > 20
    for name, value in (("max_tokens", 1), ("num_return_sequences", 1), ("stop_strings", ["."]), ("top_logprobs", 1)):
        assert f"`{name}`" in TEXTS["docs/coming_from.md"]
        QuantizedHuggingFaceLLM(model_id="folder", **{name: value})


def test_the_layers_are_those_of_import_linter() -> None:
    block = next(block for block in blocks("") if block.document == "CONTRIBUTING.md")
    contract = next(each for each in DECLARED["tool"]["importlinter"]["contracts"] if each["type"] == "layers")
    assert block.text.splitlines() == contract["layers"]


def test_files_that_the_documents_name_exist() -> None:
    """Of the package or the repository: `engine/scheduler.py`, `engine/scheduler` or `kernels/linear/`."""
    named = [
        (document, code)
        for document, code in spans()
        if document in ("CONTRIBUTING.md", "docs/engine.md") and re.fullmatch(r"(\w+/)+(\w+(\.py)?)?|\w+\.py", code)
    ]
    assert len(named) > 40
    found = {code: [base / code for base in (ROOT / "langchain_quantllm", ROOT)] for _, code in named}
    assert [
        (document, code)
        for document, code in named
        if not any(path.exists() or path.with_suffix(".py").exists() for path in found[code])
    ] == []


# The site


def pages(nav: Any) -> list[str]:
    """The pages of a navigation, in their order."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in nav for page in pages(entry if isinstance(entry, str) else next(iter(entry.values())))]


def test_the_navigation_has_every_page() -> None:
    found = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(pages(SITE["nav"])) == found


def test_the_reference_has_every_public_name() -> None:
    text = "".join(TEXTS[document] for document in TEXTS if document.startswith("docs/api/"))
    named = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    wanted = {f"langchain_quantllm.{name}" for name in langchain_quantllm.__all__ if name != "__version__"}
    errors = vars(sys.modules[InvalidOptionError.__module__])
    wanted |= {
        f"langchain_quantllm.errors.{name}"
        for name, value in errors.items()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == "langchain_quantllm.errors"
    }
    kinds = {name for name, value in vars(structured).items() if _is_constraint(value)}
    wanted |= {f"langchain_quantllm.structured.{name}" for name in {*kinds, "UNENFORCED"}}
    assert named == wanted


def _is_constraint(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, structured.Constraint)


def anchors(text: str, *, on_site: bool = False) -> set[str]:
    """The anchors that GitHub, or the site, gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    if on_site:  # Source: slugify in markdown/extensions/toc.py
        return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_the_documents_lead_somewhere() -> None:
    broken, outside = [], []
    ours = re.escape(f"{SITE['repo_url']}/blob/main/")
    for document, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"\w+:", link) and not re.match(ours, link):
                continue
            is_page = document.startswith("docs/")
            name, _, anchor = re.sub(ours, "", link).partition("#")
            base = ROOT if re.match(ours, link) else (ROOT / document).parent
            path = base / name if name else ROOT / document
            if not path.exists():
                broken.append((document, link))
            elif anchor:
                target = path.read_text(encoding="utf-8")
                # A link between two pages has to work on GitHub and on the site.
                known = anchors(target) & anchors(target, on_site=True) if is_page else anchors(target)
                broken += [] if anchor in known else [(document, link)]
            if is_page and base != ROOT and not path.resolve().is_relative_to(ROOT / "docs"):
                outside.append((document, link))
    assert broken == []
    assert outside == [], "a page of the site links to files outside of docs/ by their address on GitHub"
