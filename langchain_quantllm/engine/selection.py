"""The choice of a call's engine: the continuous engine if it can run the call, `generate` for the rest.

Owns the engines over one loaded pipeline, each made when it is first needed. Knows no loading.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.engine.process import check_process
from langchain_quantllm.engine.request import Engine
from langchain_quantllm.errors import InvalidOptionError, NotEnoughMemoryError, UnsupportedError
from langchain_quantllm.options import GenerationOptions, needs_generate

if TYPE_CHECKING:
    from langchain_quantllm.engine.continuous import ContinuousEngine
    from langchain_quantllm.engine.fusion.fuse import Fusion
    from langchain_quantllm.engine.generate import GenerateEngine

ENGINES = ("auto", "fast", "pipeline")
"""Values of `engine`."""


class Engines:
    """The engines over one pipeline. Safe from many threads."""

    def __init__(self, pipeline: Any, adapters: Sequence[str] = ()) -> None:
        """Make no engine yet; the pipeline is not changed.

        Args:
            pipeline: The loaded pipeline.
            adapters: Names of the adapters on its model that requests choose from; without any it runs as it is.
        """
        self._pipeline = pipeline
        self._switch = AdapterSwitch(pipeline.model, adapters) if adapters else None
        self._lock = threading.RLock()
        self._fast: ContinuousEngine | None = None
        self._fusion: Fusion | None = None
        self._plain: GenerateEngine | None = None
        self._no_fast_reason: str | None = None

    @property
    def peak_cache_tokens(self) -> int:
        """Most tokens that the KV caches have held at once."""
        engines: list[Engine | None] = [self._fast, self._plain]
        return sum(engine.peak_cache_tokens for engine in engines if engine is not None)

    @property
    def kv_cache_bytes(self) -> int | None:
        """Bytes allocated for the fast engine's KV cache; None without that engine."""
        fast = self._fast
        return None if fast is None else fast.info.kv_cache_bytes

    @property
    def kv_resident_bytes(self) -> int | None:
        """Bytes of these in main memory; None without that engine, and on systems that do not tell."""
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
        """Choose the engine of a call, and make it if this is the first one.

        Args:
            engine: One of `ENGINES`.
            kv_cache_memory: Memory of the fast engine's KV cache; ignored once that engine is made.
            options: The call's options; None asks for the engine of ordinary calls.
            has_media: Whether the model is given images beside the ids.
            fuse: Whether the fast engine may use fused steps; ignored once that engine is made.

        Raises:
            UnsupportedError: If the fast engine is asked for and cannot run the model.
            InvalidOptionError: If it is asked for with images, or with options of transformers' `generate` only.
        """
        check_process()
        option = None if options is None else needs_generate(options)
        with self._lock:
            if engine == "pipeline":
                return self._pipeline_engine("asked for")
            if has_media or option is not None:
                if engine == "auto":
                    own = "images are read by transformers' own generate"
                    return self._pipeline_engine(own if has_media else f"{option} is transformers' own")
                what = "images are read" if has_media else f"{option} is carried out"
                msg = f"{what} by the pipeline engine only; use engine='auto' or 'pipeline'."
                raise InvalidOptionError(msg)
            if self._fast is None and self._no_fast_reason is None:
                self._fast, self._fusion, self._no_fast_reason = self._make_fast(kv_cache_memory, fuse=fuse)
            if self._fast is not None:
                return self._fast
            reason = f"the fast engine cannot drive this model: {self._no_fast_reason}"
            if engine == "fast":
                msg = f"{reason}; use engine='auto' or 'pipeline'."
                raise UnsupportedError(msg)
            return self._pipeline_engine(reason)

    @in_clean_thread
    def _make_fast(
        self, kv_cache_memory: Any, *, fuse: bool
    ) -> tuple[ContinuousEngine | None, Fusion | None, str | None]:
        """Make the fast engine; returns it with the fused steps that it uses, or the reason why there is none."""
        from langchain_quantllm.engine.continuous import ContinuousEngine

        fusion, reason = self._fuse() if fuse else (None, None)
        given = {"kv_cache_memory": kv_cache_memory, "adapters": self._switch}
        with contextlib.ExitStack() as unused:
            if fusion is not None:
                unused.callback(fusion.close)
            try:
                try:
                    fast = ContinuousEngine(self._pipeline, fusion=fusion, no_fusion_reason=reason, **given)
                except UnsupportedError as error:
                    if fusion is None:
                        raise
                    fusion.close()
                    return ContinuousEngine(self._pipeline, no_fusion_reason=str(error), **given), None, None
            except UnsupportedError as error:
                return None, None, str(error)
            except NotEnoughMemoryError as error:
                if kv_cache_memory is not None:  # the user's own size is not there
                    raise
                return None, None, str(error)
            unused.pop_all()
            return fast, fusion, None

    def _fuse(self) -> tuple[Fusion | None, str | None]:
        """Find the model's fused steps; returns None if there are none, with the reason if users should know it."""
        from langchain_quantllm.compat.bitsandbytes import is_quantized
        from langchain_quantllm.engine.fusion.fuse import LINEAR, Fusion
        from langchain_quantllm.engine.model_check import unsupported_reason
        from langchain_quantllm.kernels import reference
        from langchain_quantllm.kernels.linear import cpu as cpu_linear

        model = self._pipeline.model
        options: dict[str, Any] = {}
        if unsupported_reason(model) is not None:
            return None, None  # the engine raises it
        if model.get_input_embeddings().weight.device.type == "cpu":
            # On a CPU, only linear layers with bitsandbytes' weights are faster.
            if not any(map(is_quantized, model.parameters())):
                return None, None
            options = {"kernels": reference, "linear_kernels": cpu_linear, "kinds": (LINEAR,)}
        try:
            fusion = Fusion(model, **options)
        except Exception as error:  # memory, say: the model runs without
            return None, f"looking for them failed: {error!r}"
        if fusion.steps:
            return fusion, None
        fusion.close()
        return None, fusion.unsupported_reason

    def _pipeline_engine(self, reason: str) -> Engine:
        if self._plain is None:
            from langchain_quantllm.engine.generate import GenerateEngine

            self._plain = GenerateEngine(self._pipeline, reason, self._switch)
        return self._plain

    def close(self) -> None:
        """Cancel all requests and release the model.

        Raises:
            UnsupportedError: If this process was forked off the one that loaded it.
        """
        check_process()
        with self._lock:
            engines, fusion = (self._fast, self._plain), self._fusion
            self._fast = self._plain = self._pipeline = self._switch = self._fusion = None
        for engine in engines:
            if engine is not None:
                engine.close()
        if fusion is not None:
            fusion.close()
