"""The part of transformers' models that reads images: what this package relies on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from langchain_quantllm.compat.transformers_processors import sample_image_prompt
from langchain_quantllm.compat.transformers_vision import (
    deepstack_layers,
    has_rope_index,
    image_features,
    image_token_id,
    looking_ahead,
    remembers_positions,
    rope_positions,
    split_images,
    text_modules,
    token_counts,
    vision_model,
)
from tests.support.image_requests import FAMILIES, LOOK_AHEAD, QUICK, make_chat
from tests.support.selection import slow_but
from tests.support.vision import picture

CPU = torch.device("cpu")
SIZES = [(90, 40), (40, 40), (30, 70)]


@pytest.fixture(scope="module", params=slow_but(QUICK, FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chat = make_chat(tmp_path_factory.mktemp("vision") / family, family)
    yield chat.pipeline
    chat.unload()


def prompt(pipeline: Any, sizes: list[tuple[int, int]]) -> tuple[list[int], dict[str, Any]]:
    processor = pipeline.processor
    token = getattr(processor, "boi_token", None) if "Gemma3" in type(processor).__name__ else processor.image_token
    pictures = [picture(i, size) for i, size in enumerate(sizes)]
    text = "".join(f"{token} and " for _ in sizes)
    inputs = dict(processor(text=[text], images=[pictures], return_tensors="pt"))
    del inputs["attention_mask"]
    return inputs.pop("input_ids")[0].tolist(), inputs


@pytest.mark.compat
def test_images_are_read_one_by_one_as_together(pipeline: Any) -> None:
    """The tower's features of each image are those that the model would put in the place of its tokens."""
    model = pipeline.model
    ids, media = prompt(pipeline, SIZES)
    places = [i for i, token in enumerate(ids) if token == image_token_id(model)]
    images = split_images(media)
    assert len(images) >= len(SIZES)
    with torch.no_grad():
        features = [image_features(model, image, CPU) for image in images]
        inner = vision_model(model)
        names = {"pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "image_position_ids"}
        together = inner.get_image_features(**{name: media[name] for name in names & media.keys()})
    parts = together.pooler_output
    whole = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    assert [len(one.embeddings) for one in features] == token_counts(model, images, places)
    torch.testing.assert_close(torch.cat([one.embeddings for one in features]), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.compat
def test_features_for_decoder_layers(pipeline: Any, family: str) -> None:
    ids, media = sample_image_prompt(pipeline.processor) if family != "gemma3" else prompt(pipeline, SIZES[:1])
    (image, *_) = split_images(media)
    with torch.no_grad():
        features = image_features(pipeline.model, image, CPU)
    assert len(features.deepstack) == (2 if family == "qwen3_vl" else 0)
    assert all(level.shape == features.embeddings.shape for level in features.deepstack)
    assert len(deepstack_layers(pipeline.model)) == pipeline.model.config.get_text_config().num_hidden_layers
    assert image_token_id(pipeline.model) in ids


@pytest.mark.compat
def test_positions_in_three_dimensions(pipeline: Any, family: str) -> None:
    model = pipeline.model
    assert has_rope_index(model) == remembers_positions(model) == family.startswith("qwen")
    if not has_rope_index(model):
        return
    ids, media = prompt(pipeline, SIZES)
    positions, delta = rope_positions(model, ids, media)
    without_kinds = {name: value for name, value in media.items() if name != "mm_token_type_ids"}
    again, same = rope_positions(model, ids, without_kinds)
    assert torch.equal(positions, again)
    assert (positions.shape, delta) == ((3, len(ids)), same)
    assert int(positions.max()) + 1 == len(ids) + delta
    first = ids.index(image_token_id(model))
    assert positions[:, :first].tolist() == [list(range(first))] * 3
    seen: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), **media)
    hook.remove()
    assert torch.equal(seen["position_ids"][-3:, 0], positions)


@pytest.mark.compat
def test_models_that_look_ahead_in_images(pipeline: Any, family: str) -> None:
    assert looking_ahead(pipeline.model) == LOOK_AHEAD.get(family, "nowhere")


def test_the_modules_of_the_text(pipeline: Any) -> None:
    model = pipeline.model
    ids = text_modules(model)
    assert id(model.get_input_embeddings()) in ids
    assert id(model.get_output_embeddings()) in ids
    tower = next(part for name in ("visual", "vision_tower", "vision_model") if (part := getattr(model.model, name, 0)))
    assert not ids & {id(module) for module in tower.modules()}


def test_unknown_tensors_of_a_processor_are_refused() -> None:
    pixels = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="input_features"):
        split_images({"input_features": pixels})
    with pytest.raises(ValueError, match="not one for each image"):
        split_images({"pixel_values": pixels, "num_crops": torch.zeros(3)})
    with pytest.raises(ValueError, match="pixel_values"):
        split_images({"pixel_values": [pixels]})
