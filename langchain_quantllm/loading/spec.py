"""What to load and how: the options of loading, checked without looking at the checkpoint or the machine.

`LoadSpec` holds the options and computes the key under which loaded models are shared. `AdapterChoice` holds the
adapters' names. Reads no file but a local folder's config.json.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.transformers_quantizers import quantization_config_from
from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.loading.sources import folder_of, stored_quantization
from langchain_quantllm.memory.output_head import check_head_dtype
from langchain_quantllm.options import BASE_ADAPTER
from langchain_quantllm.schemes import (
    BITSANDBYTES_OPTIONS,
    FLOAT_DTYPES,
    Scheme,
    Unquantized,
    scheme_of_config,
)

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Values of `attn_implementation`; transformers chooses SDPA where it is not given."""

TASKS = ("text", "speech")
"""Values of `task`."""

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """What to load and how: every option that tells two loaded models apart.

    Args:
        model_id: A folder, or the name of a repository on the Hugging Face Hub.
        scheme: The scheme asked for; None takes the checkpoint as it is.
        quantization_config: A transformers quantization config, instead of a scheme.
        dtype: `"auto"` (the checkpoint's), or one of `FLOAT_DTYPES`.
        device_map: As transformers takes it; None is the first accelerator, else the CPU.
        max_memory: Most memory per device, such as `{0: "10GiB", "cpu": "30GiB"}`.
        attn_implementation: One of `ATTENTIONS`, or None.
        revision: Branch, tag or commit.
        token: Access token of the Hub.
        cache_dir: Folder in which files of the Hub are kept.
        trust_remote_code: Run Python code that comes with the checkpoint.
        use_safetensors: Refuse weights in pickle files, which can run code.
        local_files_only: True never asks the Hub, False always does; None does where files are missing here.
        progress: Show the progress of loading.
        model_kwargs: Further keyword arguments of `from_pretrained`.
        lm_head_dtype: `"auto"`, or `"int8"` for an output head in 8 bits.
        adapters: Folder or repository of each peft adapter, by its name.
        adapter: Name of the default adapter, or `"base"`; it does not tell models apart.
        kv_cache_dtype: Dtype of the KV cache of the object that loads; it does not tell models apart.
        task: `"text"` for a model that continues text, `"speech"` for one that writes down speech.

    Raises:
        InvalidOptionError: If a value is not allowed or two contradict each other.
    """

    model_id: str
    scheme: Scheme | None = None
    quantization_config: Any = field(default=None, hash=False)
    dtype: str = "auto"
    device_map: Any = field(default=None, hash=False)
    max_memory: Any = field(default=None, hash=False)
    attn_implementation: str | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    trust_remote_code: bool = False
    use_safetensors: bool = True
    local_files_only: bool | None = None
    progress: bool = True
    model_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    lm_head_dtype: str = "auto"
    adapters: Mapping[str, str] = field(default_factory=dict, hash=False)
    adapter: str = field(default=BASE_ADAPTER, compare=False)
    kv_cache_dtype: str = field(default="auto", compare=False)
    task: str = "text"

    def __post_init__(self) -> None:
        """Check everything that needs neither the checkpoint nor the machine."""
        if not self.model_id:
            msg = (
                "model_id is empty; give a folder or a repository's name such as 'HuggingFaceTB/SmolLM2-135M-Instruct'."
            )
            raise InvalidOptionError(msg)
        if self.scheme is not None and self.quantization_config is not None:
            msg = "quantization and quantization_config say the same thing twice; give one of them."
            raise InvalidOptionError(msg)
        for name, value, allowed in (
            ("task", self.task, TASKS),
            ("dtype", self.dtype, ("auto", *FLOAT_DTYPES)),
            ("attn_implementation", self.attn_implementation, (None, *ATTENTIONS)),
        ):
            if value not in allowed:
                msg = f"{name}={value!r} is not known{nearest(str(value), [known for known in allowed if known])}"
                raise InvalidOptionError(msg)
        check_head_dtype(self.lm_head_dtype)
        _check_quantization_config(self.quantization_config)
        if self.max_memory is not None and not isinstance(self.max_memory, Mapping):
            msg = f"max_memory={self.max_memory!r} is not a dict; name the devices, {{0: '10GiB', 'cpu': '30GiB'}}."
            raise InvalidOptionError(msg)
        AdapterChoice.of(self.adapters, self.adapter)

    def key(self) -> str:
        """Return a string that is equal for specs that load the same weights onto the same devices."""
        config = self.quantization_config
        if config is not None:
            config = quantization_config_from(config) if isinstance(config, dict) else config
            config = config.to_dict()
        scheme = self.scheme
        if config is not None and _is_scheme(config):
            scheme, config = scheme_of_config(config), None
        if scheme == Unquantized() and stored_quantization(self.model_id) is None:
            scheme = None
        return json.dumps(
            {
                "model_id": folder_of(self.model_id) or self.model_id,
                "revision": self.revision,
                "scheme": scheme and scheme.to_dict(),
                "quantization_config": config,
                "dtype": self.dtype,
                "device_map": self.device_map,
                "max_memory": self.max_memory and {str(device): size for device, size in self.max_memory.items()},
                "attn_implementation": self.attn_implementation,
                "cache_dir": self.cache_dir,
                "trust_remote_code": self.trust_remote_code,
                "use_safetensors": self.use_safetensors,
                "model_kwargs": dict(self.model_kwargs),
                "lm_head_dtype": self.lm_head_dtype,
                "adapters": {name: folder_of(source) or source for name, source in self.adapters.items()},
                "task": self.task,
            },
            sort_keys=True,
            default=str,
        )


def _check_quantization_config(config: Any) -> None:
    """Check that a quantization config is one, and that transformers would ignore none of its keys."""
    if config is None or (hasattr(config, "to_dict") and not isinstance(config, Scheme)):
        return
    if not isinstance(config, Mapping):
        msg = f"quantization_config={config!r} is not a transformers config; names and schemes go into quantization=."
        raise InvalidOptionError(msg)
    if config.get("quant_method", "bitsandbytes") not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        return
    for name in config:
        if name not in BITSANDBYTES_OPTIONS:
            msg = f"quantization_config has the unknown key {name!r}{nearest(str(name), BITSANDBYTES_OPTIONS)}"
            raise InvalidOptionError(msg)
    if not (config.get("load_in_4bit") or config.get("load_in_8bit")):
        msg = (
            f"quantization_config={dict(config)!r} asks for no scheme: load_in_4bit or load_in_8bit must be True, or "
            "quant_method must name one; the short way is quantization='nf4' or 'int8'."
        )
        raise InvalidOptionError(msg)


def _is_scheme(config: Mapping[str, Any]) -> bool:
    """Say whether a scheme expresses all of a quantization config in its dict form."""
    scheme = scheme_of_config(config)
    again = None if scheme.calibrated else scheme.transformers_config("float32")
    return again is not None and json.dumps(again.to_dict(), default=str) == json.dumps(config, default=str)


@dataclass(frozen=True, kw_only=True)
class AdapterChoice:
    """The adapters of a model, and the default one.

    Args:
        sources: Folder or repository of each adapter, by its name.
        default: A name of `sources`, or `"base"`.
    """

    sources: Mapping[str, str]
    default: str = BASE_ADAPTER

    @classmethod
    def of(cls, adapters: Mapping[str, Any], adapter: Any) -> AdapterChoice:
        """Combine the fields `adapters` and `adapter`.

        Args:
            adapters: Folder or repository of each adapter, by its name.
            adapter: A name of `adapters`, `"base"`, None, or the folder or repository of a further adapter.

        Raises:
            InvalidOptionError: If a name cannot be one or stands for two adapters, or `adapter` is none of these.
        """
        if not isinstance(adapters, Mapping):
            msg = f"adapters={adapters!r} is not a dict; give folders or repositories by name, {{'sql': './sql-lora'}}."
            raise InvalidOptionError(msg)
        sources = {}
        for name, source in adapters.items():
            _check_adapter_name(name)
            if not isinstance(source, str | os.PathLike) or not os.fspath(source):
                msg = f"adapters[{name!r}]={source!r} must be a folder, or a repository's name on the Hub."
                raise InvalidOptionError(msg)
            sources[name] = os.fspath(source)
        if adapter is None or adapter == BASE_ADAPTER:
            return cls(sources=sources)
        if not isinstance(adapter, str | os.PathLike) or not os.fspath(adapter):
            msg = f"adapter={adapter!r} must be a name of adapters, a folder, or a repository's name on the Hub."
            raise InvalidOptionError(msg)
        given = os.fspath(adapter)
        if given in sources:
            return cls(sources=sources, default=given)
        name = _adapter_name(given, sources)
        return cls(sources={**sources, name: given}, default=name)

    def choose(self, name: str | None) -> str | None:
        """Choose the adapter of a call.

        Args:
            name: The call's `adapter`, or None.

        Returns:
            A name of `sources` or `"base"`; None if the model has no adapters.

        Raises:
            InvalidOptionError: If no adapter has this name.
        """
        if name is not None and name != BASE_ADAPTER and name not in self.sources:
            known = {*self.sources, BASE_ADAPTER}
            if not self.sources:
                msg = f"adapter={name!r} is not known: the model was given none; name it in adapters={{...}}."
            else:
                guess = nearest(name, known)
                listed = "" if guess.startswith("; allowed") else f" Known are {', '.join(sorted(known))}."
                msg = f"adapter={name!r} is not known{guess}{listed}"
            raise InvalidOptionError(msg)
        if not self.sources:
            return None
        return self.default if name is None else name


def _check_adapter_name(name: Any) -> None:
    if not isinstance(name, str) or not _ADAPTER_NAME.fullmatch(name):
        msg = f"{name!r} cannot be the name of an adapter; use letters, digits, '_' and '-'."
        raise InvalidOptionError(msg)
    if name == BASE_ADAPTER:
        msg = f"adapters has the name {BASE_ADAPTER!r}, which stands for the model without any; choose another."
        raise InvalidOptionError(msg)


def _adapter_name(given: str, sources: Mapping[str, str]) -> str:
    """Derive an adapter's name from its folder or repository."""
    if "/" not in given and os.sep not in given and not Path(given).expanduser().is_dir():
        known = [*sources, BASE_ADAPTER]
        msg = f"adapter={given!r} is neither a folder, nor a repository such as 'owner/name', nor a name of adapters"
        raise InvalidOptionError(msg + nearest(given, known))
    name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(given).expanduser().resolve().name)  # peft reserves dots
    if name in (*sources, BASE_ADAPTER) or not name:
        what = f"adapters[{name!r}]={sources[name]!r}" if name in sources else f"the reserved name {name!r}"
        msg = (
            f"adapter={given!r} would be called {name!r}, as {what} is; give it a name of its own: "
            f"adapters={{'name': {given!r}}}."
        )
        raise InvalidOptionError(msg)
    return name
