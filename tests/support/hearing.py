"""Tiny random checkpoints of models that hear, with their processors, made in code, and sounds for them.

Sizes are multiples of 64, as bitsandbytes' CPU kernels need them. The weights are wide, so that the text depends on the
sound.
"""

from __future__ import annotations

import base64
import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.support.checkpoints import make_tokenizer
from tests.support.vision import TEXT

RATE = 16_000
_TEMPLATES = {
    # As Qwen2-Audio's.
    "qwen2_audio": (
        "{% set count = namespace(value=0) %}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
        "{% else %}{% for content in message['content'] %}"
        "{% if 'audio' in content or 'audio_url' in content or content['type'] == 'audio' %}"
        "{% set count.value = count.value + 1 %}Audio {{ count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # As Gemma 4's.
    "gemma4": (
        "{{ bos_token }}{% for message in messages %}"
        "<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] | trim }}"
        "{% elif item['type'] == 'image' %}\n\n<|image|>\n\n{% elif item['type'] == 'audio' %}<|audio|>{% endif %}"
        "{% endfor %}{% endif %}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
    ),
}


_GEMMA = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
}


def _tokenizer(special: list[str], **extra: str) -> Any:
    source = make_tokenizer()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(source._tokenizer).from_str(source._tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        **({"extra_special_tokens": extra} if extra else {}),
    )
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def _qwen2_audio() -> tuple[Any, Any]:
    tokenizer = _tokenizer(["<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])
    config = transformers.Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 80,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 64,
            "max_source_positions": 1500,
        },
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer), "max_position_embeddings": 2048},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    features = transformers.WhisperFeatureExtractor(feature_size=80)
    return config, transformers.Qwen2AudioProcessor(features, tokenizer, chat_template=_TEMPLATES["qwen2_audio"])


def _gemma4() -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        ["<|turn>", "<turn|>", *_GEMMA.values()],
        **_GEMMA,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _GEMMA.items()}
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma4Config(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "head_dim": 32,
            "sliding_window": 64,
            "layer_types": layers,
            "vocab_size_per_layer_input": len(tokenizer),
            "hidden_size_per_layer_input": 64,
            "max_position_embeddings": 2048,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        audio_config={
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [128, 4],
            "output_proj_dims": 64,
            "use_clipped_linears": False,
        },
        boi_token_id=ids["boi_token"],
        eoi_token_id=ids["eoi_token"],
        image_token_id=ids["image_token"],
        boa_token_id=ids["boa_token"],
        eoa_token_index=ids["eoa_token"],
        audio_token_id=ids["audio_token"],
        video_token_id=len(tokenizer) - 1,
        tie_word_embeddings=False,
    )
    return config, tokenizer


def _save_gemma4_processor(folder: Path, tokenizer: Any) -> None:
    """Save the parts of a processor as its own `save_pretrained` does; the whole one needs torchvision, for videos."""
    images = transformers.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2)
    parts = {
        "feature_extractor": json.loads(transformers.Gemma4AudioFeatureExtractor().to_json_string()),
        "image_processor": json.loads(images.to_json_string()),
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor"},
        "processor_class": "Gemma4Processor",
    }
    (folder / "processor_config.json").write_text(json.dumps(parts), encoding="utf-8")
    tokenizer.chat_template = _TEMPLATES["gemma4"]
    tokenizer.save_pretrained(folder)


_BUILDERS = {"qwen2_audio": _qwen2_audio, "gemma4": _gemma4}
FAMILIES = tuple(_BUILDERS)


def make_hearing_checkpoint(folder: Path, family: str = "qwen2_audio", *, seed: int = 2) -> Path:
    """Write a random model that hears and its processor into a folder; return the folder."""
    config, processor = _BUILDERS[family]()  # of Gemma 4 the tokenizer alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForMultimodalLM.from_config(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, 0.3)
    model.generation_config.update(eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder)
    if family == "gemma4":
        _save_gemma4_processor(folder, processor)
    else:
        processor.save_pretrained(folder)
    return folder


def samples(seed: int = 0, seconds: float = 1.5, rate: int = RATE) -> np.ndarray:
    """Make a sound of a few tones, each for a tenth of a second: float32 of shape `(samples,)`, exact in 16 bits."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    tones = generator.uniform(150, 3000, size=int(seconds * 10) + 1)
    sound = 0.4 * np.sin(2 * np.pi * tones[(time * 10).astype(int)] * time)
    return (np.round(sound * 32768) / 32768).astype(np.float32)


def wav(sound: np.ndarray, *, rate: int = RATE, channels: int = 1) -> bytes:
    """Write samples as a WAV file of 16 bits."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(np.round(sound * 32768).clip(-32768, 32767).astype("<i2"), channels).tobytes())
    return stream.getvalue()


def sound_block(seed: int = 0, seconds: float = 1.5) -> dict[str, Any]:
    """Make LangChain's content block of a sound."""
    return {"type": "audio", "base64": base64.b64encode(wav(samples(seed, seconds))).decode(), "mime_type": "audio/wav"}
