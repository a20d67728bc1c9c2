"""Which encoder to load and how: the options, checked without looking at the files or the machine.

`EncoderSpec` holds the options and computes the key under which loaded encoders are shared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.loading.sources import folder_of
from langchain_quantllm.loading.spec import ATTENTIONS
from langchain_quantllm.schemes import FLOAT_DTYPES, Scheme, Unquantized

KINDS = ("embedding", "cross_encoder", "late_interaction")
"""Kinds of encoders: one vector a text, one score a pair of texts, one vector a token."""

POOLINGS = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")
"""Values of `pooling`: how the vectors of tokens become the vector of a text."""


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Which encoder to load and how: every option that tells two loaded encoders apart.

    Args:
        model_id: A folder, or the name of a repository on the Hugging Face Hub.
        kind: One of `KINDS`.
        scheme: The scheme of its linear layers; None takes the checkpoint as it is. bitsandbytes' schemes and
            unquantized ones are possible.
        dtype: Dtype of what is not quantized. `"auto"` is the checkpoint's; with a scheme that quantizes, bfloat16
            where the checkpoint's is float32. Pooling and normalization always take place in float32.
        device: Such as `"cpu"` or `"cuda:1"`; None is the first accelerator, else the CPU.
        pooling: One of `POOLINGS`, for a checkpoint that does not say it.
        attn_implementation: One of `ATTENTIONS`; None is the default of transformers, SDPA.
        revision: Branch, tag or commit.
        token: Access token of the Hub.
        cache_dir: Folder in which files of the Hub are kept.
        trust_remote_code: Run Python code that comes with the checkpoint.
        use_safetensors: Refuse weights in pickle files, which can run code.
        local_files_only: True never asks the Hub; None and False do where files are missing here.
        model_kwargs: Further keyword arguments of transformers' `from_pretrained`.
        progress: Show the progress of loading.

    Raises:
        InvalidOptionError: If a value is not allowed.
    """

    model_id: str
    kind: str = "embedding"
    scheme: Scheme | None = None
    dtype: str = "auto"
    device: str | None = None
    pooling: str | None = None
    attn_implementation: str | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    trust_remote_code: bool = False
    use_safetensors: bool = True
    local_files_only: bool | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    progress: bool = True

    def __post_init__(self) -> None:
        """Check everything that needs neither the files nor the machine."""
        if not self.model_id:
            msg = "model_id is empty; give a folder or a repository's name such as 'Qwen/Qwen3-Embedding-0.6B'."
            raise InvalidOptionError(msg)
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("dtype", self.dtype, ("auto", *FLOAT_DTYPES)),
            ("attn_implementation", self.attn_implementation, (None, *ATTENTIONS)),
            ("pooling", self.pooling, (None, *POOLINGS)),
        ):
            if value not in allowed:
                msg = f"{name}={value!r} is not known{nearest(str(value), [known for known in allowed if known])}"
                raise InvalidOptionError(msg)
        if self.scheme is not None and self.scheme.calibrated:
            msg = (
                f"quantization={self.scheme.name!r} cannot be applied to an encoder while it loads; use 'int8', 'nf4', "
                "'fp4' or 'none'."
            )
            raise InvalidOptionError(msg)

    def key(self) -> str:
        """Return a string that is equal for specs that load the same weights onto the same device."""
        scheme = None if self.scheme is None or self.scheme == Unquantized() else self.scheme.to_dict()
        same = ("kind", "dtype", "device", "pooling", "attn_implementation", "revision", "cache_dir")
        return json.dumps(
            {
                **{name: getattr(self, name) for name in (*same, "trust_remote_code", "use_safetensors")},
                "model_id": folder_of(self.model_id) or self.model_id,
                "scheme": scheme,
                "model_kwargs": dict(self.model_kwargs),
            },
            sort_keys=True,
            default=str,
        )
