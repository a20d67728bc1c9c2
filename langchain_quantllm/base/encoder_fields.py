"""The fields that LangChain's classes over an encoder share, and the encoder that is loaded for them."""

from __future__ import annotations

from typing import Any, ClassVar

from langchain_quantllm.base.local_model import LocalModel
from langchain_quantllm.encoders.registry import LoadedEncoder, get_or_load
from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.loading.arguments import device_name
from langchain_quantllm.schemes import scheme_from

_SPEC_FIELDS = (
    "model_id",
    "dtype",
    "attn_implementation",
    "revision",
    "cache_dir",
    "trust_remote_code",
    "use_safetensors",
    "local_files_only",
    "model_kwargs",
    "progress",
)
"""Fields that `EncoderSpec` has by the same name."""

LOADING_FIELDS = frozenset({*_SPEC_FIELDS, "quantization", "token", "device", "pooling"} - {"progress"})
"""Fields that say what is loaded."""


class EncoderFields(LocalModel):
    """The fields of an encoder. What is not quantized is pooled and normalized in float32."""

    device: int | str | list[int | str] | None = None
    """Such as `"cpu"`, `"cuda:1"`, or a number as in HuggingFacePipeline; None is the first accelerator, else the
    CPU."""

    _kind: ClassVar[str] = "embedding"
    """The kind of model, one of `encoders.spec.KINDS`."""
    _several_devices: ClassVar[bool] = False
    """Whether `device` may be a list."""
    _loading_fields: ClassVar[frozenset[str]] = LOADING_FIELDS

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        if (folder := values.pop("cache_folder", None)) is not None:
            values.setdefault("cache_dir", folder)
        if values.get("dtype") is not None:
            values["dtype"] = str(values["dtype"]).removeprefix("torch.")
        return super()._translate(values)

    def _check_fields(self) -> None:
        if isinstance(self.device, list) and (not self._several_devices or not self.device):
            msg = f"device={self.device!r} is not possible for {type(self).__name__}; give one, such as 'cuda:0'."
            raise InvalidOptionError(msg)

    def _spec(self) -> EncoderSpec:
        """Return the specification of what is loaded for the fields."""
        return EncoderSpec(
            kind=self._kind,
            scheme=scheme_from(self.quantization),
            device=next(iter(self._devices()), None),
            token=self.token.get_secret_value() if self.token else None,
            pooling=getattr(self, "pooling", None),
            **{name: getattr(self, name) for name in _SPEC_FIELDS},
        )

    def _devices(self) -> list[str]:
        """List the names of the devices that are asked for; empty if none is."""
        given = self.device if isinstance(self.device, list) else [self.device]
        return [device_name(device) for device in given if device is not None]

    def _get_or_load(self, spec: EncoderSpec) -> LoadedEncoder:
        return get_or_load(spec)

    def _loaded(self) -> LoadedEncoder:
        encoder: LoadedEncoder = super()._loaded()
        return encoder
