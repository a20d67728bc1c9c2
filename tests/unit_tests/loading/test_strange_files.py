"""Changed files of a checkpoint or an adapter: everything ends in a model or in one of this package's errors.

Changes are aware of the structure: values of JSON files become ones of another type or size, keys are missing or new,
texts are cut or are no text, and in place of a file there is a folder, a pipe, or a link to itself.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM, estimate_memory
from langchain_quantllm.errors import CheckpointError, QuantLLMError
from tests.support.adapters import make_adapter
from tests.support.checkpoints import edit_json, make_checkpoint, quicken

pytest.importorskip("peft")

MOST_SECONDS, MOST_BYTES = 30.0, 2**30
EVERYDAY, THOROUGH = 100, 1000

MODEL_FILES = (
    "config.json",
    "config.json",  # twice, as it decides most
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_config.json", "adapter_model.safetensors")

Change = Callable[[random.Random, Path], None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file, one in two shards, and an adapter."""
    quicken()
    folder = tmp_path_factory.mktemp("strange")
    single = make_checkpoint(folder / "single", dtype="float32")
    for name, content in (
        ("special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}),
        ("quantize_config.json", {"bits": None, "group_size": 128, "desc_act": False, "sym": True}),
    ):
        (single / name).write_text(json.dumps(content))
    (single / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    edit_json(single / "config.json", rope_scaling={"rope_type": "linear", "factor": 2.0})
    make_adapter(single, folder / "adapter", seed=1, modules_to_save=["lm_head"])
    shutil.copytree(single, folder / "shards")
    split(folder / "shards")
    return folder


def split(folder: Path) -> None:
    """Write a checkpoint's weights as two shards with an index."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[:9], "model-2-of-2.safetensors": names[9:]}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / part, metadata={"format": "pt"})
    weight_map = {name: part for part, own in parts.items() for name in own}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# The changes.

STRANGE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    7.0,
    1e308,
    10**9,
    10**30,
    -(10**9),
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "../../etc/passwd",
    "/dev/zero",
    "x" * 5000,
    "\ud800",
    "\0",
    [],
    [[]],
    [1, "a", None],
    {},
    {"a": {"b": []}},
    {"": None},
]


def strange(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(STRANGE))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in a JSON value with each of its keys."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys)[:200]:
        yield value, key
        yield from places(value[key])


def change_value(chance: random.Random, content: Any) -> Any:
    """Change, remove or add one value of a JSON file, deep inside it as often as at its top."""
    top = [(content, key) for key in content] if isinstance(content, dict) else []
    found = top if chance.random() < 0.6 and top else list(places(content))
    if not found:
        return strange(chance)
    container, key = chance.choice(found)
    kind = chance.random()
    if kind < 0.7:
        container[key] = strange(chance) if kind < 0.67 else nested(chance.choice([20, 400]))
    elif kind < 0.85:
        del container[key]
    elif isinstance(container, dict):
        names = ["auto_map", "quantization_config", "torch_dtype", "text_config", "tokenizer_class", "vocab_file", "x"]
        container[chance.choice(names)] = strange(chance)
    else:
        container.append(strange(chance))
    return content


def change_json(chance: random.Random, file: Path) -> None:
    content = json.loads(file.read_text())
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        content = change_value(chance, content)
    file.write_text(json.dumps(content))


def change_bytes(chance: random.Random, file: Path) -> None:
    content = file.read_bytes()
    at = chance.randrange(len(content))
    file.write_bytes(
        chance.choice(
            [
                lambda: b"",
                lambda: content[:at],
                lambda: content[at:],
                lambda: content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :],
                lambda: content[:at] + chance.randbytes(20) + content[at:],
                lambda: b"\xef\xbb\xbf" + content,
                lambda: b"\xff\xfe" + content,
                lambda: chance.randbytes(200),
                lambda: b"[" * 100_000,
                lambda: b'{"a":' * 50_000,
                lambda: b'{"num_hidden_layers": 1' + b"0" * 10_000 + b"}",
                lambda: content + content,
                lambda: b"null",
                lambda: b'"text"',
            ]
        )()
    )


def change_header(chance: random.Random, file: Path) -> None:
    """Change the header of a safetensors file. Source: safetensors' README, section Format."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if chance.random() < 0.2:
        wrong = chance.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        file.write_bytes(wrong.to_bytes(8, "little") + content[8:])
        return
    header = json.loads(content[8 : 8 + size])
    name = chance.choice([key for key in header if key != "__metadata__"])
    kind = chance.randrange(7)
    if kind == 0:
        header[name]["dtype"] = chance.choice(["F64", "F16", "I8", "F8_E4M3", "BOOL", "X", 3, None])
    elif kind == 1:
        header[name]["shape"] = chance.choice([[], [0], [-1], [2**40, 2**40], [1], ["a"], None, [64, 64, 64]])
    elif kind == 2:
        header[name]["data_offsets"] = chance.choice([[0, 0], [0, 2**60], [5, 1], [-1, 4], [0], None, ["a", "b"]])
    elif kind == 3:
        header[f"{name}{chance.choice(['.x', '.0', '_extra', ''])}"] = header.pop(name)
    elif kind == 4:
        del header[name]
    elif kind == 5:
        header = change_value(chance, header)
    else:
        header["__metadata__"] = chance.choice([{"format": "tf"}, {"format": 1}, [], None, {"a": {}}])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def replace_file(chance: random.Random, file: Path) -> None:
    """Put something in place of a file that is none."""
    file.unlink()
    kind = chance.choice(["missing", "folder", "loop", "dangling", "pipe", "closed", "outside"])
    if kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file)
    elif kind == "dangling":
        file.symlink_to("/no/where")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "closed":
        file.write_text("{}")
        file.chmod(0)
    elif kind == "outside":
        file.symlink_to("/dev/null")


def change(chance: random.Random, folder: Path, name: str) -> str:
    """Change a file of a folder; returns a description."""
    file = folder / name
    changes: list[Change] = [change_bytes, replace_file]
    if name.endswith(".json"):
        changes += [change_json] * 8
    if name.endswith(".safetensors"):
        changes += [change_header] * 4
    chosen = chance.choice(changes)
    chosen(chance, file)
    return f"{chosen.__name__} of {name}"


# The outcomes.


def outcome(action: Callable[[], Any]) -> str:
    """Run an action; returns "done" or the name of this package's error, and fails on any other."""
    began = time.monotonic()
    try:
        action()
        found = "done"
    except QuantLLMError as error:
        assert str(error)  # noqa: PT017
        found = type(error).__name__
    assert time.monotonic() - began < MOST_SECONDS
    return found


def load(model: Path, **fields: Any) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=str(model), progress=False, **fields)
    try:
        llm.load()
    finally:
        with contextlib.suppress(QuantLLMError):
            llm.unload()


def try_change(root: Path, folder: Path, seed: int) -> tuple[str, dict[str, str]]:
    """Change a file of a copy, and use the copy; returns what was changed, and the outcome of each use."""
    chance = random.Random(seed)
    name = chance.choice([*MODEL_FILES, *ADAPTER_FILES])
    source = "adapter" if name in ADAPTER_FILES else "shards" if name.endswith("index.json") else "single"
    changed = Path(shutil.copytree(root / source, folder / str(seed)))
    try:
        did = change(chance, changed, name)
        if source == "adapter":
            single = root / "single"
            return did, {"adapter": outcome(lambda: load(single, adapters={"mine": str(changed)}))}
        return did, {
            "estimate": outcome(lambda: estimate_memory(str(changed))),
            "load": outcome(lambda: load(changed)),
        }
    finally:
        shutil.rmtree(changed)


def check_changes(root: Path, folder: Path, seeds: range) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    raw = []
    for seed in seeds:
        try:
            _, outcomes = try_change(root, folder, seed)
            counts.update(outcomes.items())
        except Exception as error:
            raw.append(f"seed {seed}: {type(error).__name__}: {error}"[:300])
    print({f"{use} {end}": count for (use, end), count in sorted(counts.items())})
    assert not raw, "\n".join([f"{len(raw)} of {len(seeds)}", *raw[:40]])
    assert {use for use, end in counts if end == "done"} == {"adapter", "estimate", "load"}
    assert sum(count for (_, end), count in counts.items() if end == "CheckpointError") > len(seeds) // 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_BYTES


@pytest.mark.slow
def test_changed_files_end_in_a_model_or_an_error(root: Path, tmp_path: Path) -> None:
    check_changes(root, tmp_path, range(EVERYDAY, THOROUGH))


def test_some_changed_files_end_in_a_model_or_an_error(root: Path, tmp_path: Path) -> None:
    check_changes(root, tmp_path, range(EVERYDAY))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, and no model of these files has more than"),
        ({"num_hidden_layers": 1e300}, "num_hidden_layers=1e\\+300"),
        ({"num_hidden_layers": float("nan")}, "num_hidden_layers=nan"),
        ({"num_hidden_layers": 2000}, "num_hidden_layers=2000, and no model of these files has more than 128"),
        pytest.param({"num_hidden_layers": 100}, "its files hold", marks=pytest.mark.slow),
        ({"text_config": {"n_layer": 10**7}}, "n_layer=10000000"),
        ({"hidden_size": 10**9}, "parameters, but its files hold"),
        ({"vocab_size": 10**10}, "parameters, but its files hold"),
        ({"intermediate_size": 10**9}, "parameters, but its files hold"),
        ({"num_attention_heads": 10**7, "num_key_value_heads": 10**7, "head_dim": 64}, "hidden size .* not a multiple"),
    ],
    ids=str,
)
def test_sizes_that_no_file_holds(root: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    changed = Path(shutil.copytree(root / "single", tmp_path / "copy"))
    edit_json(changed / "config.json", **changes)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for action in (lambda: estimate_memory(str(changed)), lambda: load(changed)):
        with pytest.raises(CheckpointError, match=words) as caught:
            action()
        assert "\n" not in str(caught.value)
    assert time.monotonic() - began < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


@pytest.mark.parametrize("changes", [{"r": 10**7}, {"rank_pattern": {"q_proj": 10**9}}, {"r": 1e300}], ids=str)
def test_ranks_that_no_file_holds(root: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    changed = Path(shutil.copytree(root / "adapter", tmp_path / "copy"))
    edit_json(changed / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match="says r=1.*largest tensor has 512"):
        load(root / "single", adapters={"mine": str(changed)})
