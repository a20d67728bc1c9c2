"""Tiny random checkpoints of models that hear, with their processors, made in code, and sounds for them.

Sizes are multiples of 64, as bitsandbytes' CPU kernels need them. The weights are wide, so that the text depends on the
sound.
"""

from __future__ import annotations

import base64
import io
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


_BUILDERS = {"qwen2_audio": _qwen2_audio}
FAMILIES = tuple(_BUILDERS)


def make_hearing_checkpoint(folder: Path, family: str = "qwen2_audio", *, seed: int = 0) -> Path:
    """Write a random model that hears and its processor into a folder; return the folder."""
    config, processor = _BUILDERS[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForMultimodalLM.from_config(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, 0.3)
    model.generation_config.update(eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder)
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
