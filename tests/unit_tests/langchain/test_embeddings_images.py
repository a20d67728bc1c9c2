"""Pictures and texts in one space, from a tiny random CLIP, in each scheme."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from langchain_quantllm import QuantizedHuggingFaceEmbeddings
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError, UnsupportedError
from tests.support.encoder_models import picture, tiny_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "model")


def make(folder: Path, **fields: Any) -> QuantizedHuggingFaceEmbeddings:
    return QuantizedHuggingFaceEmbeddings(model_id=folder, device="cpu", progress=False, **fields)


def png(seed: int) -> bytes:
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return out.getvalue()


def array(vectors: Any) -> np.ndarray:
    return np.asarray(vectors, dtype=np.float64)


def test_pictures_and_texts_get_the_vectors_of_transformers(folder: Path) -> None:
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=["abc"], images=[picture(0)], return_tensors="pt")
    outputs = model(**inputs)
    source = make(folder, normalize=True)
    assert np.abs(array(source.embed_image(picture(0))) - outputs.image_embeds[0].detach().numpy()).max() < 1e-5
    assert np.abs(array(source.embed_query("abc")) - outputs.text_embeds[0].detach().numpy()).max() < 1e-5


def test_every_form_of_a_picture_gives_the_same_vector(folder: Path, tmp_path: Path) -> None:
    content = png(1)
    file = tmp_path / "picture.png"
    file.write_bytes(content)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    forms: list[Any] = [
        picture(1),
        content,
        bytearray(content),
        file,
        str(file),
        f"file://{file}",
        url,
        io.BytesIO(content),
    ]
    vectors = array(make(folder).embed_images(forms))
    assert np.abs(vectors - vectors[0]).max() < 1e-6
    assert np.abs(array(make(folder).embed_image(picture(2))) - vectors[0]).max() > 1e-2


@pytest.mark.parametrize(("quantization", "least"), [("int8", 0.99), ("nf4", 0.93)])
def test_quantized_pictures_and_texts_stay_near_their_own_vectors(
    folder: Path, quantization: str, least: float
) -> None:
    exact, rounded = make(folder, normalize=True), make(folder, quantization=quantization, normalize=True)
    pictures = [picture(seed) for seed in range(6)]
    cosines = (array(exact.embed_images(pictures)) * array(rounded.embed_images(pictures))).sum(axis=1)
    assert cosines.min() > least
    texts = ["abc", "def ghi"]
    cosines = (array(exact.embed_documents(texts)) * array(rounded.embed_documents(texts))).sum(axis=1)
    assert cosines.min() > least
    assert (rounded.memory_report().saving or 0) > 0.3


async def test_async_pictures_give_what_sync_ones_give(folder: Path) -> None:
    source = make(folder)
    pictures = [picture(seed) for seed in range(5)]
    assert np.abs(array(await source.aembed_images(pictures)) - array(source.embed_images(pictures))).max() < 1e-6
    assert np.abs(array(await source.aembed_image(pictures[0])) - array(source.embed_image(pictures[0]))).max() < 1e-6


def test_chromas_call_with_paths_gives_a_list(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(png(3))
    assert len(make(folder).embed_image(uris=[str(file), str(file)])) == 2


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("https://example.com/picture.png", UnsupportedError, "nothing is fetched"),
        ("missing.png", InvalidOptionError, "cannot be read"),
        (b"no picture", InvalidOptionError, "not an image"),
        (png(0)[:200], InvalidOptionError, "damaged"),
        ("data:image/png,raw", InvalidOptionError, "base64"),
        (3, InvalidOptionError, "int"),
    ],
)
def test_what_is_no_picture_is_named(folder: Path, given: Any, error: type[QuantLLMError], words: str) -> None:
    with pytest.raises(error) as caught:
        make(folder).embed_images([picture(0), given])
    assert words in str(caught.value)
    assert "picture 1" in str(caught.value)


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InvalidOptionError, match="pixels"):
        make(folder).embed_images([png(0)])


def test_one_picture_given_as_the_list_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidOptionError, match="embed_image"):
        make(folder).embed_images(picture(0))
