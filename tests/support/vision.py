"""Tiny random vision-language checkpoints with their processors, made in code, and pictures to show them.

Sizes are multiples of 64, as bitsandbytes' CPU kernels need them. The weights are wide, so that the text depends on the
picture.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from tests.support.checkpoints import make_tokenizer

TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    # As llava-hf's: takes lists only, and leaves the begin token to the processor.
    "llava": (
        "{% for message in messages %}{{ message['role'] | upper }}: "
        "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}\n"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "qwen2_5_vl": _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    # As Gemma's: writes its begin token, and refuses turns that do not alternate.
    "gemma3": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}"
        "{% set prefix = first if first is string else first[0]['text'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}"
        "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        "{% if loop.first and prefix %}{{ prefix }}\n\n{% endif %}"
        "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
        "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # As SmolVLM's and Idefics3's: takes lists only.
    "idefics3": (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
        "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "internvl": _CHATML.replace("IMAGE", "<IMG_CONTEXT>"),
    "mistral3": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}[/INST]"
        "{% else %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{{ message['content'][0]['text'] }}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
TEMPLATES["qwen3_vl"] = TEMPLATES["qwen3_5"] = TEMPLATES["qwen2_5_vl"]
_SPECIAL = {
    "llava": ["<image>"],
    "qwen2_5_vl": [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ],
    "gemma3": ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"],
    "idefics3": ["<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"],
    "internvl": ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "mistral3": ["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"],
}
_SPECIAL["qwen3_vl"] = _SPECIAL["qwen3_5"] = _SPECIAL["qwen2_5_vl"]
_INTERNVL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_IN_PARTS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "mistral3")
"""Families whose whole processor needs torchvision, for videos: only its parts are saved."""


def _tokenizer(family: str) -> Any:
    """Return the tests' tokenizer with a family's special tokens, and a begin token before every text, as Llama has."""
    from tokenizers.processors import TemplateProcessing

    source = make_tokenizer()
    backend = type(source._tokenizer).from_str(source._tokenizer.to_str())
    if family not in ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "mistral3"):
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    extra = {}
    if family == "gemma3":
        names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        extra = {"extra_special_tokens": names}
    if family == "internvl":
        extra = {"extra_special_tokens": _INTERNVL}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", **extra
    )
    tokenizer.add_tokens(_SPECIAL[family], special_tokens=True)
    return tokenizer


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=64,
        initializer_range=1.0,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer)}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    size = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES["llava"],
    )
    return config, processor


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    vision = transformers.SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    text = {**TEXT, "vocab_size": len(tokenizer), "head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32}
    config = transformers.Gemma3Config(
        vision_config=vision,
        text_config=transformers.Gemma3TextConfig(**text),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    images = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=TEMPLATES["gemma3"])
    return config, processor


def _idefics3(tokenizer: Any) -> tuple[Any, Any]:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.Idefics3Config(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer), "pad_token_id": 1}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=1,
    )
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATES["idefics3"])
    return config, processor


def _qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL["qwen2_5_vl"]}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.3,
        },
        text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 256, "longest_edge": 64 * 64}
    )
    return config, images


def _qwen3_vl(tokenizer: Any) -> tuple[Any, Any]:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL["qwen3_vl"]}
    rope = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_theta": 10000.0}
    config = transformers.Qwen3VLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "depth": 3,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.3,
        },
        text_config={
            **TEXT,
            "num_hidden_layers": 3,
            "head_dim": 32,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 256, "longest_edge": 64 * 64}
    )
    return config, images


def _qwen3_5(tokenizer: Any) -> tuple[Any, Any]:
    """A model whose layers keep a state, beside attention."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL["qwen3_5"]}
    rope = {
        "rope_type": "default",
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    }
    config = transformers.Qwen3_5Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "initializer_range": 0.3,
        },
        text_config={
            **TEXT,
            "num_hidden_layers": 3,
            "head_dim": 32,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return config, _qwen3_vl(tokenizer)[1]


def _internvl(tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    size = {"height": 32, "width": 32}
    return config, transformers.GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=4)


def _mistral3(tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.Mistral3Config(
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 32,
            "image_size": 64,
            "patch_size": 8,
        },
        text_config={
            "model_type": "mistral",
            **TEXT,
            "head_dim": 32,
            "sliding_window": None,
            "vocab_size": len(tokenizer),
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size={"height": 16, "width": 16})
    return config, images


class MistralProcessor(transformers.ProcessorMixin):  # type: ignore[misc]  # transformers is not typed
    """As PixtralProcessor, which cannot be imported without torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = "[IMG]"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        rows, columns = (int(side) // 16 for side in image_inputs["image_sizes"][image_idx])
        return "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"


def mistral_pipeline(folder: Path) -> Any:
    """Make the pipeline of a Mistral 3 checkpoint by hand."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.PixtralImageProcessorPil.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = MistralProcessor(images, tokenizer, chat_template=TEMPLATES["mistral3"])
    return transformers.pipeline("image-text-to-text", model=model, processor=processor)


_BUILDERS = {"llava": _llava, "gemma3": _gemma3, "idefics3": _idefics3, "qwen2_5_vl": _qwen2_5_vl}
_MORE = {"qwen3_vl": _qwen3_vl, "qwen3_5": _qwen3_5, "internvl": _internvl, "mistral3": _mistral3}


def _can_be_built(processor: str) -> bool:
    try:
        getattr(transformers, processor)()
    except ImportError:  # in transformers 5.14 some without torchvision need it all the same
        return False
    return True


MORE_FAMILIES = tuple(_MORE)
FAMILIES = tuple(f for f in _BUILDERS if f != "idefics3" or _can_be_built("Idefics3ImageProcessorPil"))


def make_vision_checkpoint(folder: Path, family: str = "llava", *, seed: int = 0, dtype: str = "float32") -> Path:
    """Write a random vision-language model and its processor into a folder; return the folder."""
    tokenizer = _tokenizer(family)
    config, processor = {**_BUILDERS, **_MORE}[family](tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, 0.3)
    model.generation_config.update(eos_token_id=1, pad_token_id=1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)
    if family in _IN_PARTS:
        tokenizer.chat_template = TEMPLATES[family]
        tokenizer.save_pretrained(folder)
    if family == "internvl":
        settings = {
            "processor_class": "InternVLProcessor",
            "image_seq_length": 4,
            "video_processor": {"video_processor_type": "InternVLVideoProcessor"},
        }
        (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """Draw a picture of random squares."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(colours.numpy(), "RGB").resize(size, Image.Resampling.NEAREST)


def png(image: Image.Image, kind: str = "PNG") -> str:
    """Return a picture's file in base64."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def without(folder: Path, target: Path, *names: str) -> Path:
    """Copy a checkpoint without some of its files."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*names))
    return target
