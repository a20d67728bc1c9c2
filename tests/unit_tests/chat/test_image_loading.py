"""Loading models that read images: pipelines, processors, missing files and packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    UnsupportedError,
)
from tests.support.chat_images import ask, chat_of, plain, transformers_answer
from tests.support.checkpoints import FakeHub, edit_json, make_cached, run_python
from tests.support.vision import without

# --- pipelines ---


def test_a_pipeline_of_ones_own(folders: Any) -> None:
    folder = folders["llava"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor, max_new_tokens=5)
    chat = ChatQuantizedHuggingFace(pipeline=pipe)
    answer = chat.invoke([ask(0)])
    assert answer.content == transformers_answer(chat, [plain("user", 0, "What is this?")], 5)[0]
    assert answer.usage_metadata["output_tokens"] == 5
    assert QuantizedHuggingFaceLLM(pipeline=pipe).invoke("The quick")
    tokenizer = processor.tokenizer
    text_only = ChatQuantizedHuggingFace(
        pipeline=transformers.pipeline("text-generation", model=model, tokenizer=tokenizer), max_tokens=4
    )
    assert text_only.invoke("Hello.").usage_metadata["output_tokens"] <= 4
    with pytest.raises(UnsupportedError, match="message 0 holds an image.*for the task 'image-text-to-text'"):
        text_only.invoke([ask(0)])
    with pytest.raises(InvalidOptionError, match="image-text-to-text"):
        ChatQuantizedHuggingFace(pipeline=transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer))


def test_to_and_from_hugging_face_pipeline(folders: Any, chats: Any) -> None:
    pytest.importorskip("langchain_huggingface")
    llm = QuantizedHuggingFaceLLM(model_id=str(folders["llava"]), device="cpu", max_new_tokens=8, progress=False)
    there = llm.to_huggingface_pipeline()
    assert there.invoke("The quick") == "The quick" + llm.invoke("The quick")
    back = QuantizedHuggingFaceLLM.from_huggingface_pipeline(there)
    assert back.max_new_tokens == 8
    assert back.invoke("The quick") == llm.invoke("The quick")


def test_the_engine_of_calls_with_images(folders: Any, chat: Any) -> None:
    assert chat_of(folders["llava"], engine="fast").invoke([ask(0)]).content == chat.invoke([ask(0)]).content
    choose, images = chat._loaded().engines.choose, frozenset({"images"})
    chosen = {name: choose(name, media=images).info.name for name in ("fast", "auto", "pipeline")}
    assert chosen == {"fast": "fast", "auto": "fast", "pipeline": "pipeline"}
    with pytest.raises(InvalidOptionError, match="images and sounds are read by the pipeline engine only"):
        choose("auto", media=images, batch_invariant=True)
    sounds = frozenset({"sounds"})
    assert choose("auto", media=sounds).info.reason == "sounds are read by transformers' own generate"
    with pytest.raises(InvalidOptionError, match="sounds are read by transformers' own generate; use engine='auto'"):
        choose("fast", media=sounds)


# --- loading ---


def test_a_model_without_its_processor(folders: Any, tmp_path: Path) -> None:
    """A model that transformers loads for text alone stays one of text; another cannot be loaded."""
    gemma = chat_of(without(folders["gemma3"], tmp_path / "gemma", "processor_config.json"))
    assert gemma.pipeline.task == "text-generation"
    assert gemma.invoke("Hello.").content
    with pytest.raises(UnsupportedError, match="message 0 holds an image.*preprocessor_config.json"):
        gemma.invoke([ask(0)])
    gemma.unload()
    llava = without(folders["llava"], tmp_path / "llava", "processor_config.json")
    with pytest.raises(CheckpointError, match="'llava' model.*has no image processor.*preprocessor_config.json"):
        chat_of(llava).load()


def test_processors_that_cannot_be_read(folders: Any, tmp_path: Path) -> None:
    broken = without(folders["llava"], tmp_path / "broken", "processor_config.json")
    (broken / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="the processor of .* cannot be read"):
        chat_of(broken).load()
    bare = without(folders["llava"], tmp_path / "bare", "tokenizer*")
    with pytest.raises(CheckpointError, match="has no tokenizer that can be read"):
        chat_of(bare).load()
    if not transformers.utils.is_torchvision_available():
        modern = without(folders["qwen2_5_vl"], tmp_path / "modern")
        edit_json(modern / "preprocessor_config.json", image_processor_type="Cohere2VisionImageProcessor")
        with pytest.raises(MissingPackageError, match=r'needs torchvision: pip install "torchvision==0\.\d+\.\*"'):
            chat_of(modern).load()


def test_weights_that_are_missing(folders: Any, tmp_path: Path) -> None:
    folder = without(folders["llava"], tmp_path / "deeper")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vision_config.num_hidden_layers = 3
    config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="lacks matching weights for .*vision"):
        chat_of(folder).load()


def test_a_missing_pillow_names_the_command(folders: Any) -> None:
    code = """
import importlib.machinery, importlib.util, sys
class NoPillow:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "PIL" else found(name, package)
sys.meta_path.insert(0, NoPillow())
from langchain_quantllm import ChatQuantizedHuggingFace
image = {"type": "image", "base64": "aGVsbG8=", "mime_type": "image/png"}
options = {"device": "cpu", "max_tokens": 3, "progress": False}
chat = ChatQuantizedHuggingFace(model=sys.argv[1], **options)
assert not chat.profile["image_inputs"]
print(len(chat.invoke("Hello.").content))
for call in (lambda: chat.invoke([("human", [image])]), ChatQuantizedHuggingFace(model=sys.argv[2], **options).load):
    try:
        call()
    except ImportError as error:
        print(type(error).__name__, error)
"""
    said = run_python(code, folders["gemma3"], folders["llava"]).stdout.splitlines()
    assert int(said[0]) > 0
    assert said[1].startswith(
        'MissingPackageError message 0 holds an image, which needs pillow: pip install "langchain-'
    )
    assert "'llava' model" in said[2]
    assert 'needs pillow: pip install "langchain-quantllm[vision]"' in said[2]


@pytest.mark.enable_socket
def test_a_snapshot_that_was_fetched_for_its_text(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the processor needs is asked of the Hub where its cache has the weights and the tokenizer only."""
    cache = tmp_path / "hub"
    # A folder of the cache itself, as what is fetched is linked into it.
    snapshot = make_cached(cache, folders["gemma3"], "acme/seer", commit="c" * 40)
    snapshot.unlink()
    without(folders["gemma3"], snapshot, "processor_config.json", "chat_template.jinja")
    fields = {"model": "acme/seer", "cache_dir": str(cache)}
    with FakeHub({"acme/seer": folders["gemma3"]}) as hub:
        FakeHub.point_to(hub.url, monkeypatch)
        chat = chat_of(Path(), **fields)
        expected = transformers_answer(chat, [plain("user", 0, "What is this?")])[0]
        assert chat.invoke([ask(0)]).content == expected
        assert not [path for path in hub.asked if path.startswith("GET") and path.endswith("safetensors")]
        chat.unload()
        offline = chat_of(Path(), **fields, local_files_only=True)
        assert offline.invoke([ask(0)]).content == expected
        offline.unload()
