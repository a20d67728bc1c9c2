"""The choice of a call's engine: the continuous engine if it can run the call, `generate` for the rest.

Owns the engines over one loaded pipeline, each made when it is first needed. Knows no loading.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.engine.process import check_process
from langchain_quantllm.engine.request import Engine
from langchain_quantllm.engine.worker import UNLOADED
from langchain_quantllm.errors import GenerationError, InvalidOptionError, NotEnoughMemoryError, UnsupportedError
from langchain_quantllm.options import GenerationOptions, needs_generate

if TYPE_CHECKING:
    from langchain_quantllm.engine.continuous import ContinuousEngine
    from langchain_quantllm.engine.fusion.fuse import Fusion
    from langchain_quantllm.engine.generate import GenerateEngine
    from langchain_quantllm.engine.speculation.draft_model import DraftModel
    from langchain_quantllm.engine.stages import Stages

_log = logging.getLogger(__name__)

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
        # Of each kind of fast engine: ordinary ones and batch-invariant ones, with a KV cache of each dtype.
        self._fast: dict[tuple[bool, str], ContinuousEngine] = {}
        self._fusions: dict[tuple[bool, str], Fusion] = {}
        self._no_fast_reasons: dict[tuple[bool, str], str] = {}
        self._stages: list[Stages] = []  # of these engines, if the model lies on several GPUs
        self._plain: GenerateEngine | None = None
        self._drafts: weakref.WeakSet[DraftModel] = weakref.WeakSet()  # over this pipeline, for engines of others

    @property
    def peak_cache_tokens(self) -> int:
        """Most tokens that the KV caches have held at once."""
        engines: list[Engine | None] = [*self._fast.values(), self._plain]
        return sum(engine.peak_cache_tokens for engine in engines if engine is not None)

    def peak_cache_bytes(self, token_bytes: int) -> int:
        """Compute the bytes of these tokens.

        Args:
            token_bytes: Bytes of one in the model's dtype.
        """
        in_8bit = {kind: fast for kind, fast in self._fast.items() if kind[1] != "auto"}
        others = self.peak_cache_tokens - sum(fast.peak_cache_tokens for fast in in_8bit.values())
        return others * token_bytes + sum(fast.peak_cache_tokens * fast.token_bytes for fast in in_8bit.values())

    @property
    def kv_cache_bytes(self) -> int | None:
        """Bytes allocated for the KV caches and states of fast engines; None without such an engine."""
        infos = [fast.info for fast in self._fast.values()]
        return _sum([None if i.kv_cache_bytes is None else i.kv_cache_bytes + (i.state_bytes or 0) for i in infos])

    @property
    def kv_resident_bytes(self) -> int | None:
        """Bytes of these in main memory; None without such an engine, and on systems that do not tell."""
        return _sum([fast.kv_resident_bytes for fast in self._fast.values()])

    @property
    def drafts(self) -> list[DraftModel]:
        """The draft models that propose to the fast engines."""
        return [draft for fast in self._fast.values() for draft in fast.drafts]

    @in_clean_thread
    def make_draft(self, name: str, most_tokens: int, vocab_size: int, *, fuse: bool, source: Any) -> DraftModel:
        """Make a draft model over this pipeline, for a fast engine over another one; see `DraftModel`.

        Raises:
            UnsupportedError: If its model cannot run so.
            NotEnoughMemoryError: If there is no room for its KV cache.
            GenerationError: If the model was unloaded, or is meanwhile.
        """
        from langchain_quantllm.engine.speculation.draft_model import DraftModel

        check_process()
        pipeline = self._pipeline
        if pipeline is None:
            raise GenerationError(UNLOADED)
        fusion, reason = self._fuse(False, None, fuse=True) if fuse else (None, None)
        given: dict[str, Any] = {"most_tokens": most_tokens, "vocab_size": vocab_size, "source": source}
        with contextlib.ExitStack() as unused:
            if fusion is not None:
                unused.callback(fusion.close)
            try:
                draft = DraftModel(pipeline, name, fusion=fusion, no_fusion_reason=reason, **given)
            except UnsupportedError as error:
                if fusion is None:
                    raise
                fusion.close()
                return self._kept(DraftModel(pipeline, name, no_fusion_reason=str(error), **given))
            unused.pop_all()
        return self._kept(draft)

    def _kept(self, draft: DraftModel) -> DraftModel:
        with self._lock:
            self._drafts.add(draft)
            is_unloaded = self._pipeline is None
        if is_unloaded:
            draft.close()
            raise GenerationError(UNLOADED)
        return draft

    def choose(
        self,
        engine: str,
        kv_cache_memory: Any = None,
        options: GenerationOptions | None = None,
        *,
        media: frozenset[str] = frozenset(),
        fuse: bool = True,
        batch_invariant: bool = False,
        kv_cache_dtype: str = "auto",
    ) -> Engine:
        """Choose the engine of a call, and make it if this is the first one.

        Args:
            engine: One of `ENGINES`.
            kv_cache_memory: Memory of the fast engine's KV cache; ignored once that engine is made.
            options: The call's options; None asks for the engine of ordinary calls.
            media: What the model is given beside the ids: `"images"`, `"sounds"`.
            fuse: Whether the fast engine may use fused steps; ignored once that engine is made.
            batch_invariant: Whether the call's texts must not depend on the calls beside it: takes a fast engine of its
                own, with a KV cache of its own, over the same weights.
            kv_cache_dtype: Dtype of the KV cache, one of `memory.CACHE_DTYPES`; another than `"auto"` takes such an
                engine as well.

        Raises:
            UnsupportedError: If the fast engine is asked for, or one that `generate` does not replace, and it cannot
                run the model.
            InvalidOptionError: If it is asked for with images or sounds that it does not read, or with options of
                `generate` only.
        """
        check_process()
        option = None if options is None else needs_generate(options)
        with self._lock:
            if engine == "pipeline":
                return self._pipeline_engine("asked for")
            kind = (batch_invariant, kv_cache_dtype)
            needs, remedy = _needs_of(*kind)
            if option is not None or (media and batch_invariant):
                if engine == "auto" and not needs:
                    return self._pipeline_engine(f"{option} is transformers' own")
                what = "images and sounds are read" if option is None else f"{option} is carried out"
                msg = f"{what} by the pipeline engine only; use engine='auto' or 'pipeline'"
                raise InvalidOptionError(f"{msg}, and {remedy}." if needs else f"{msg}.")
            if kind not in self._fast and kind not in self._no_fast_reasons:
                options_of_kind: dict[str, Any] = {"batch_invariant": batch_invariant, "kv_cache_dtype": kv_cache_dtype}
                fast, fusion, reason = self._make_fast(kv_cache_memory, fuse=fuse, **options_of_kind)
                if fusion is not None:
                    self._fusions[kind] = fusion
                if fast is None:
                    self._no_fast_reasons[kind] = reason or "no reason is known"
                else:
                    self._fast[kind] = fast
            if kind in self._fast:
                no_media_reason = self._no_media_reason(self._fast[kind], media)
                if no_media_reason is None:
                    return self._fast[kind]
                if engine == "fast" or needs:
                    msg = f"{no_media_reason}; use engine='auto' or 'pipeline'"
                    raise InvalidOptionError(f"{msg}, and {remedy}." if needs else f"{msg}.")
                return self._pipeline_engine(no_media_reason)
            reason = f"the fast engine cannot drive this model: {self._no_fast_reasons[kind]}"
            if needs:
                msg = f"with {needs} {reason}; use {remedy}."
                raise UnsupportedError(msg)
            if engine == "fast":
                msg = f"{reason}; use engine='auto' or 'pipeline'."
                raise UnsupportedError(msg)
            return self._pipeline_engine(reason)

    def _no_media_reason(self, fast: ContinuousEngine, media: frozenset[str]) -> str | None:
        """Find the reason why images and sounds are read by the pipeline engine; None if the fast one reads them."""
        if "sounds" in media:
            return "sounds are read by transformers' own generate"
        reason = fast.read_images(getattr(self._pipeline, "processor", None)) if media else None
        return None if reason is None else f"images are read by transformers' own generate: {reason}"

    @in_clean_thread
    def _make_fast(
        self, kv_cache_memory: Any, *, fuse: bool, batch_invariant: bool, kv_cache_dtype: str
    ) -> tuple[ContinuousEngine | None, Fusion | None, str | None]:
        """Make a fast engine; returns it with the fused steps that it uses, or the reason why there is none."""
        from langchain_quantllm.engine.model_probe import unsupported_reason
        from langchain_quantllm.engine.stages import find_stages

        model = self._pipeline.model
        options: dict[str, Any] = {"fuse": fuse, "batch_invariant": batch_invariant, "kv_cache_dtype": kv_cache_dtype}
        reason = None
        with contextlib.ExitStack() as unused:
            try:
                stages = None if unsupported_reason(model) is not None else find_stages(model)
            except UnsupportedError as error:
                stages, reason = None, str(error)
            if stages is not None:
                unused.callback(stages.close)
                made = self._make_fast_in(stages, kv_cache_memory, **options)
                if made[0] is not None:
                    self._stages.append(stages)
                    unused.pop_all()
                    return made
                reason = made[2]
        if reason is not None:
            _log.warning("the model runs on its devices by accelerate's hooks, which is slow: %s", reason)
        return self._make_fast_in(None, kv_cache_memory, no_stages_reason=reason, **options)

    def _make_fast_in(
        self,
        stages: Stages | None,
        kv_cache_memory: Any,
        *,
        fuse: bool,
        batch_invariant: bool,
        kv_cache_dtype: str,
        no_stages_reason: str | None = None,
    ) -> tuple[ContinuousEngine | None, Fusion | None, str | None]:
        """Make a fast engine that runs the model in some stages; None runs it by its own hooks."""
        from langchain_quantllm.engine.continuous import ContinuousEngine

        found: tuple[Fusion | None, str | None] = (None, None)
        if fuse or batch_invariant:
            found = self._fuse(batch_invariant, stages, fuse=fuse, names_adapters=self._switch is not None)
        fusion, reason = found
        given: dict[str, Any] = {"kv_cache_memory": kv_cache_memory, "adapters": self._switch, "stages": stages}
        given |= {"batch_invariant": batch_invariant, "no_stages_reason": no_stages_reason}
        given["kv_cache_dtype"] = kv_cache_dtype
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

    def _fuse(
        self, batch_invariant: bool, stages: Stages | None, *, fuse: bool, names_adapters: bool = False
    ) -> tuple[Fusion | None, str | None]:
        """Find the model's fused steps; returns None if there are none, with the reason if users should know it."""
        from langchain_quantllm.compat.bitsandbytes import is_quantized
        from langchain_quantllm.engine.fusion.fuse import CPU_KINDS, EXPERTS, LAYER, LINEAR, Fusion
        from langchain_quantllm.engine.model_probe import unsupported_reason
        from langchain_quantllm.kernels import cpu as cpu_kernels
        from langchain_quantllm.kernels.experts import invariant as invariant_experts
        from langchain_quantllm.kernels.linear import cpu as cpu_linear
        from langchain_quantllm.kernels.linear import invariant as invariant_linear

        model = self._pipeline.model
        options: dict[str, Any] = {}
        if unsupported_reason(model) is not None:
            return None, None  # the engine raises it
        if model.get_input_embeddings().weight.device.type == "cpu":
            runs_whole = stages is None and not names_adapters  # else a layer never runs as one function
            kinds = tuple(kind for kind in CPU_KINDS if runs_whole or kind != LAYER)
            options = {"kernels": cpu_kernels, "linear_kernels": cpu_linear, "kinds": kinds}
            if batch_invariant:
                if not any(map(is_quantized, model.parameters())):
                    return None, None
                options["kinds"] = (LINEAR,)
        if batch_invariant:
            options["linear_kernels"] = invariant_linear
            if "kinds" not in options:
                options["experts_kernels"] = invariant_experts
                options |= {} if fuse else {"kinds": (LINEAR, EXPERTS)}
        try:
            fusion = Fusion(model, stages=stages, names_adapters=names_adapters, **options)
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
        return self._plain if self._plain.info.reason == reason else _ForReason(self._plain, reason)

    def close(self) -> None:
        """Cancel all requests and release the model.

        Raises:
            UnsupportedError: If this process was forked off the one that loaded it.
        """
        check_process()
        with self._lock:
            engines = [*self._fast.values(), self._plain]
            drafts, self._drafts = list(self._drafts), weakref.WeakSet()
            patches: list[Fusion | Stages] = [*self._fusions.values(), *self._stages]
            self._fast, self._fusions, self._stages = {}, {}, []
            self._plain = self._pipeline = self._switch = None
        for engine in (*engines, *drafts):
            if engine is not None:
                engine.close()
        for patch in patches:
            patch.close()


class _ForReason:
    """The pipeline engine, chosen for another reason than that it was made for."""

    def __init__(self, engine: GenerateEngine, reason: str) -> None:
        self._engine = engine
        self.info = replace(engine.info, reason=reason)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _needs_of(batch_invariant: bool, kv_cache_dtype: str) -> tuple[str, str]:
    """Say what `generate` cannot carry out, and what to use in its place; two empty texts if it can all."""
    asked = {"batch_invariant=True": batch_invariant, f"kv_cache_dtype={kv_cache_dtype!r}": kv_cache_dtype != "auto"}
    remedies = ("batch_invariant=False", "kv_cache_dtype='auto'")
    pairs = [pair for pair, is_asked in zip(zip(asked, remedies, strict=True), asked.values(), strict=True) if is_asked]
    return " and ".join(name for name, _ in pairs), " and ".join(remedy for _, remedy in pairs)


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
