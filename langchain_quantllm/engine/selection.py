"""Which engine runs what: the fast one where it can, the plain one for the rest.

Owns the engines over one loaded pipeline, each made when it is first needed. Knows no loading.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.request import Engine
from langchain_quantllm.errors import InvalidOptionError, NotEnoughMemoryError, UnsupportedError
from langchain_quantllm.options import GenerationOptions, needs_generate

if TYPE_CHECKING:
    from langchain_quantllm.engine.fusion.fuse import Fusion

ENGINES = ("auto", "fast", "pipeline")
"""Values of `engine`."""


class Engines:
    """The engines over one pipeline. Safe from many threads."""

    def __init__(self, pipeline: Any, adapters: Sequence[str] = ()) -> None:
        """Make none yet; the pipeline is not changed.

        Args:
            pipeline: The loaded pipeline.
            adapters: Names of the adapters on its model that requests choose from; without any it runs as it is.
        """
        self._pipeline = pipeline
        self._switch = AdapterSwitch(pipeline.model, adapters) if adapters else None
        self._lock = threading.RLock()
        self._fast: Any = None
        self._fusion: Fusion | None = None
        self._plain: Any = None
        self._why_not_fast: str | None = None

    @property
    def peak_cache_tokens(self) -> int:
        """Most tokens that the KV caches have held at once."""
        return sum(engine.peak_cache_tokens for engine in (self._fast, self._plain) if engine is not None)

    @property
    def kv_cache_bytes(self) -> int | None:
        """Bytes set aside for the fast engine's KV cache; None without one."""
        fast = self._fast
        return None if fast is None else fast.info.kv_cache_bytes

    @property
    def kv_resident_bytes(self) -> int | None:
        """Bytes of these that lie in main memory; None without a fast engine, or where the system does not tell."""
        fast = self._fast
        return None if fast is None else fast.kv_resident_bytes

    def choose(
        self,
        engine: str,
        kv_cache_memory: Any = None,
        options: GenerationOptions | None = None,
        *,
        has_media: bool = False,
        fuse: bool = True,
    ) -> Engine:
        """Give the engine for a call, made now if this is the first one.

        Args:
            engine: One of `ENGINES`.
            kv_cache_memory: Memory of the fast engine's KV cache; counts where it is not yet made.
            options: The call's options; None asks for the engine of ordinary calls.
            has_media: Whether the model is given images beside the ids.
            fuse: Whether the fast engine may use fused steps; counts where it is not yet made.

        Raises:
            UnsupportedError: If the fast engine is asked for and cannot drive the model.
            InvalidOptionError: If it is asked for with images, or options that only transformers' `generate` carries
                out.
        """
        option = None if options is None else needs_generate(options)
        with self._lock:
            if engine == "pipeline":
                return self._pipeline_engine("asked for")
            if has_media:
                if engine == "auto":
                    return self._pipeline_engine("images are read by transformers' own generate")
                msg = "images are read by the pipeline engine only; use engine='auto' or 'pipeline'."
                raise InvalidOptionError(msg)
            if option is not None:
                if engine == "auto":
                    return self._pipeline_engine(f"{option} is transformers' own")
                msg = f"{option} is carried out by the pipeline engine only; use engine='auto' or 'pipeline'."
                raise InvalidOptionError(msg)
            if self._fast is None and self._why_not_fast is None:
                self._make_fast(kv_cache_memory, fuse=fuse)
            if self._fast is not None:
                return self._fast  # type: ignore[no-any-return]
            if engine == "fast":
                msg = f"the fast engine cannot drive this model: {self._why_not_fast}; use engine='auto' or 'pipeline'."
                raise UnsupportedError(msg)
            return self._pipeline_engine(f"the fast engine cannot drive this model: {self._why_not_fast}")

    def _make_fast(self, kv_cache_memory: Any, *, fuse: bool) -> None:
        from langchain_quantllm.engine.continuous import ContinuousEngine

        fusion, why_not_fused = self._fuse() if fuse else (None, None)
        options = {"kv_cache_memory": kv_cache_memory, "adapters": self._switch}
        try:
            try:
                self._fast = ContinuousEngine(self._pipeline, fusion=fusion, why_not_fused=why_not_fused, **options)
                self._fusion = fusion
            except UnsupportedError as error:
                if fusion is None:
                    raise
                fusion.close()
                self._fast = ContinuousEngine(self._pipeline, why_not_fused=str(error), **options)
        except UnsupportedError as error:
            self._why_not_fast = str(error)
        except NotEnoughMemoryError as error:
            if fusion is not None:
                fusion.close()
            if kv_cache_memory is not None:  # what was asked for is not there
                raise
            self._why_not_fast = str(error)
        except BaseException:
            if fusion is not None:
                fusion.close()
            raise

    def _fuse(self) -> tuple[Fusion | None, str | None]:
        """Find the model's fused steps; gives None where there are none, with the reason where that is of interest."""
        from langchain_quantllm.compat.bitsandbytes import is_quantized
        from langchain_quantllm.engine.fusion.fuse import PRODUCT, Fusion
        from langchain_quantllm.engine.model_check import unsupported_reason
        from langchain_quantllm.kernels import norms_reference as fused_reference
        from langchain_quantllm.kernels.linear import cpu as cpu_products

        model = self._pipeline.model
        options: dict[str, Any] = {}
        if unsupported_reason(model) is not None:
            return None, None  # the engine says it
        if model.get_input_embeddings().weight.device.type == "cpu":
            # There, only products of bitsandbytes' weights are worth it.
            if not any(map(is_quantized, model.parameters())):
                return None, None
            options = {"kernels": fused_reference, "products": cpu_products, "kinds": (PRODUCT,)}
        try:
            fusion = Fusion(model, **options)
        except Exception as error:  # memory, say: the model runs without
            return None, f"looking for them failed: {error!r}"
        if fusion.steps:
            return fusion, None
        fusion.close()
        return None, fusion.why_none

    def _pipeline_engine(self, reason: str) -> Engine:
        if self._plain is None:
            from langchain_quantllm.engine.generate import GenerateEngine

            self._plain = GenerateEngine(self._pipeline, reason, self._switch)
        return self._plain  # type: ignore[no-any-return]

    def close(self) -> None:
        """Cancel what runs and let go of the model."""
        with self._lock:
            engines, fusion = (self._fast, self._plain), self._fusion
            self._fast = self._plain = self._pipeline = self._switch = self._fusion = None
        for engine in engines:
            if engine is not None:
                engine.close()
        if fusion is not None:
            fusion.close()
