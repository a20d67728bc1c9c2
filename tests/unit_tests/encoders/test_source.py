"""Models of another kind, without pooling or with weights in pickle files, are refused before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm.encoders.source import find_source, own_pooling
from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    ModelNotFoundError,
    QuantLLMError,
    UnsupportedError,
)
from tests.support.encoder_models import edit_json, plain_bert, tiny_clip, tiny_embedder, tiny_qwen3_embedder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "embedder": tiny_embedder(root / "embedder", dense=16),
        "qwen3": tiny_qwen3_embedder(root / "qwen3"),
        "bert": plain_bert(root / "bert"),
        "classifier": plain_bert(root / "classifier", architecture="BertForSequenceClassification"),
        "clip": tiny_clip(root / "clip"),
        "writer": plain_bert(root / "writer"),
    }
    edit_json(made["writer"] / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
    for name, kind in (("cross", "CrossEncoder"), ("colbert", "MultiVectorEncoder"), ("splade", "SparseEncoder")):
        made[name] = root / name
        shutil.copytree(made["embedder"], made[name])
        edit_json(made[name] / "config_sentence_transformers.json", model_type=kind)
    return made


def error_of(folder: Path | str, **options: Any) -> QuantLLMError:
    with pytest.raises(QuantLLMError) as caught:
        find_source(EncoderSpec(model_id=str(folder), **options))
    return caught.value


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("writer", "embedding", "ChatQuantizedHuggingFace"),
        ("classifier", "embedding", "QuantizedCrossEncoder"),
        ("cross", "embedding", "QuantizedReranker"),
        ("colbert", "embedding", "LateInteractionReranker"),
        ("splade", "embedding", "sparse"),
        ("embedder", "cross_encoder", "QuantizedHuggingFaceEmbeddings"),
        ("bert", "cross_encoder", "random"),
        ("bert", "late_interaction", "random"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_class_for_it(
    folders: dict[str, Path], name: str, kind: str, words: str
) -> None:
    error = error_of(folders[name], kind=kind)
    assert isinstance(error, UnsupportedError)
    assert words in str(error)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedder", "embedding"),
        ("qwen3", "embedding"),
        ("clip", "embedding"),
        ("classifier", "cross_encoder"),
        ("cross", "cross_encoder"),
        ("colbert", "late_interaction"),
    ],
)
def test_a_model_of_the_right_kind_is_found(folders: dict[str, Path], name: str, kind: str) -> None:
    assert find_source(EncoderSpec(model_id=str(folders[name]), kind=kind)).folder == folders[name]


def test_a_folder_that_names_no_pooling_needs_one(folders: dict[str, Path]) -> None:
    error = error_of(folders["bert"])
    assert isinstance(error, InvalidOptionError)
    assert "pooling='mean'" in str(error)
    assert find_source(EncoderSpec(model_id=str(folders["bert"]), pooling="cls")).modules is None


def test_a_pooling_that_contradicts_the_models_own_is_refused(folders: dict[str, Path]) -> None:
    assert "'mean'" in str(error_of(folders["embedder"], pooling="cls"))
    assert own_pooling(find_source(EncoderSpec(model_id=str(folders["embedder"]), pooling="mean"))) == "mean"
    assert own_pooling(find_source(EncoderSpec(model_id=str(folders["qwen3"])))) == "lasttoken"
    assert "leave it out" in str(error_of(folders["clip"], pooling="mean"))
    assert "leave it out" in str(error_of(folders["classifier"], pooling="mean", kind="cross_encoder"))


def test_pooling_is_read_from_the_form_of_older_models_too(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["embedder"], tmp_path / "old")
    flags = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "old" / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    assert own_pooling(find_source(EncoderSpec(model_id=str(tmp_path / "old")))) == "cls"


@pytest.mark.parametrize("part", ["", "2_Dense"])
def test_weights_in_pickle_files_alone_are_refused_unless_allowed(
    folders: dict[str, Path], tmp_path: Path, part: str
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(folders["embedder"], folder)
    weights = folder / part / "model.safetensors"
    torch.save({}, folder / part / "pytorch_model.bin")
    assert find_source(EncoderSpec(model_id=str(folder)))
    weights.unlink()
    error = error_of(folder)
    assert isinstance(error, CheckpointError)
    assert "pytorch_model.bin" in str(error)
    assert find_source(EncoderSpec(model_id=str(folder), use_safetensors=False))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("modules.json", {"type": "modeling_own.Pooling"}),
        ("2_Dense/config.json", {"activation_function": "own_code.Activation"}),
        ("2_Dense/config.json", {"activation_function": "torch.hub.list"}),
        ("config_sentence_transformers.json", {"activation_fn": "os.getcwd"}),
    ],
)
def test_code_of_the_models_own_is_refused_unless_trusted(
    folders: dict[str, Path], tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(folders["embedder"], folder)
    content = json.loads((folder / file).read_text("utf-8"))
    (content[1] if isinstance(content, list) else content).update(changes)
    (folder / file).write_text(json.dumps(content), "utf-8")
    error = error_of(folder)
    assert isinstance(error, CheckpointError)
    assert "trust_remote_code=True" in str(error)
    assert next(iter(changes.values())) in str(error)
    assert find_source(EncoderSpec(model_id=str(folder), trust_remote_code=True))


def test_a_config_with_code_for_its_attention_or_endless_layers_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for number, changes in enumerate(({"_attn_implementation": "some/kernel"}, {"num_hidden_layers": 10**9})):
        folder = tmp_path / str(number)
        shutil.copytree(folders["embedder"], folder)
        edit_json(folder / "config.json", **changes)
        assert isinstance(error_of(folder), CheckpointError)


def test_a_wrong_folder_or_file_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    assert isinstance(error_of(tmp_path / "none"), ModelNotFoundError)
    assert isinstance(error_of(tmp_path), ModelNotFoundError)
    assert "write model_id=" in str(error_of(folders["embedder"].parent))
    assert "folder" in str(error_of(folders["embedder"] / "modules.json"))


@pytest.mark.parametrize("content", ["{", "{}", "[]", "[1]", '[{"path": "../elsewhere", "type": "x"}]'])
def test_a_damaged_list_of_modules_is_an_error_of_the_checkpoint(
    folders: dict[str, Path], tmp_path: Path, content: str
) -> None:
    shutil.copytree(folders["embedder"], tmp_path / "damaged")
    (tmp_path / "damaged" / "modules.json").write_text(content)
    assert isinstance(error_of(tmp_path / "damaged"), CheckpointError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "embeding"}, "did you mean 'embedding'"),
        ({"dtype": "half"}, "dtype='half'"),
        ({"pooling": "last"}, "lasttoken"),
        ({"attn_implementation": "flash"}, "attn_implementation"),
        ({"model_id": ""}, "model_id is empty"),
    ],
)
def test_wrong_options_are_refused_with_the_allowed_ones(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        EncoderSpec(**{"model_id": "some/model", **options})
    assert words in str(caught.value)
