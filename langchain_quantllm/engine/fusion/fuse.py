"""Fused steps of a loaded model, used in the engine's own forwards only.

The model runs once on some tokens, and every module that looks like a known pattern has its call recorded. A step takes
a module's place if it gives the same output for that call; other modules stay as they are, with the reason.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.compat.peft import adapter_modules, base_layer_of, unsupported_lora_reason
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.attention_interface import configs_of
from langchain_quantllm.engine.forward_context import ForwardContext, Step, forward_context
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.engine.fusion.experts import ExpertsStep, experts_step, is_experts
from langchain_quantllm.engine.fusion.layers import layer_step
from langchain_quantllm.engine.fusion.linear import (
    LinearStep,
    group_shared_input,
    is_float_linear,
    is_quantized_linear,
    linear_step,
)
from langchain_quantllm.engine.fusion.patterns import GatedNormStep, NormStep, RotaryStep
from langchain_quantllm.engine.fusion.recorded_call import RecordedCall, tensors_of
from langchain_quantllm.engine.fusion.verify import (
    cos_sin_step,
    gated_mlp_step,
    is_cos_sin_module,
    is_gated_mlp,
    is_layer,
    is_norm,
    is_rotary,
    norm_step,
    residual_step,
    rotary_step,
)
from langchain_quantllm.engine.stages import Stages, at_stage, is_only_moved
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.kernels.experts.gating import Gating

LINEAR, NORM, GATED_MLP, COS_SIN, ROTARY, RESIDUAL = "linear", "norm", "gated_mlp", "cos_sin", "rotary", "residual"
EXPERTS, LAYER = "experts", "layer"

KINDS = (LINEAR, NORM, GATED_MLP, COS_SIN, ROTARY, RESIDUAL, EXPERTS)
"""Kinds of steps, as `EngineInfo.fused` calls them: linear layers, with quantized weights or for few rows, grouped if
they share an input; RMSNorms; activation times up in MLPs; the cosines and sines of positions; rotation with the
writing of keys and values; addition with the norm after it; experts of mixtures, without the router before them."""

CPU_KINDS = (LINEAR, NORM, GATED_MLP, COS_SIN, ROTARY, RESIDUAL, LAYER)
"""The kinds on a CPU: there whole layers are put together from the others."""

_MAY_BE = {
    LINEAR: is_quantized_linear,
    NORM: is_norm,
    GATED_MLP: is_gated_mlp,
    COS_SIN: is_cos_sin_module,
    ROTARY: is_rotary,
    RESIDUAL: is_layer,
    EXPERTS: is_experts,
    LAYER: is_layer,
}
_CHECKED_TOKENS = 7


@dataclass(frozen=True, kw_only=True)
class FusedKind:
    """The modules of one kind.

    Args:
        kind: One of `KINDS`.
        fused: How many are fused.
        left: How many are not, by the reason.
    """

    kind: str
    fused: int
    left: Mapping[str, int]


class Fusion:
    """The fused steps of one model."""

    def __init__(
        self,
        model: Any,
        *,
        kernels: Any = None,
        linear_kernels: Any = None,
        experts_kernels: Any = None,
        kinds: Sequence[str] = KINDS,
        stages: Stages | None = None,
        names_adapters: bool = False,
    ) -> None:
        """Find the modules that can be fused, and patch them.

        Args:
            model: A causal language model of transformers.
            kernels: `kernels.norms`, `.reference` or `.cpu`; None for the first on a CUDA GPU, and no fusion elsewhere.
            linear_kernels: `kernels.linear.dispatch`, `.cpu` or `.reference`; None likewise.
            experts_kernels: `kernels.experts.dispatch`, `.invariant` or `.reference`; None for the first on a CUDA GPU,
                and experts that stay as they are elsewhere.
            kinds: The kinds to fuse, of `KINDS` or `CPU_KINDS`.
            stages: The stages of a model on several devices; None if it lies on one.
            names_adapters: Whether every request names its adapter: the steps are then found without the active one,
                which another thread may change meanwhile.

        Raises:
            InvalidOptionError: If a kind is unknown.
        """
        if unknown := sorted(set(kinds) - {*KINDS, *CPU_KINDS}):
            msg = f"kinds={unknown[0]!r} is none of {', '.join(dict.fromkeys((*KINDS, *CPU_KINDS)))}."
            raise InvalidOptionError(msg)
        self._model = model
        self._kernels = kernels
        self._linear_kernels = linear_kernels
        self._experts_kernels = experts_kernels
        self._kinds = tuple(kinds)
        self._stages = stages
        self._names_adapters = names_adapters
        self._patches: list[ForwardPatch] = []
        self.steps: dict[int, Step] = {}
        """Steps by the ids of the modules that they replace: for `ForwardContext.steps`."""
        self.unsupported_reason: str | None = None
        """Why nothing at all is fused."""
        self.summary: tuple[FusedKind, ...] = ()
        self.build()

    def build(self) -> None:
        """Find the steps anew, as after a change of the model's modules."""
        self.close()
        self.unsupported_reason = None
        home = self._model.get_input_embeddings().weight.device
        try:
            with at_stage(home):
                given = (self._kernels, self._linear_kernels, self._experts_kernels)
                needed = given[:2] if home.type == "cpu" else given
                ours = _kernels_for(home) if None in needed else given
                self._fuse(_Kernels(*(one or our for one, our in zip(given, ours, strict=True))), home)
        except UnsupportedError as error:
            self.close()
            self.unsupported_reason = str(error)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Restore every module's `forward`."""
        for patch in self._patches:
            patch.close()
        self._patches, self.steps, self.summary = [], {}, ()

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Run the model in this thread as it is, except linear layers whose step omits a rounding of the layer's."""
        steps = {key: step for key, step in self.steps.items() if isinstance(step, LinearStep) and step.skips_rounding}
        with self._running(steps):
            yield

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Run the model in this thread as it is, except its linear layers and experts: these multiply by the kernels.

        Calls may hold several texts, padded, and need no KV blocks.
        """
        with self._running({key: s for key, s in self.steps.items() if isinstance(s, LinearStep | ExpertsStep)}):
            yield

    @contextlib.contextmanager
    def _running(self, steps: Mapping[int, Step]) -> Iterator[None]:
        home = self._model.get_input_embeddings().weight.device
        stages = None if self._stages is None else self._stages.begin()
        with at_stage(home), forward_context(ForwardContext(steps=steps, stages=stages)):
            yield

    @property
    def replaced_ids(self) -> frozenset[int]:
        """Ids of the layers that the engine never calls."""
        return frozenset(
            key for key, step in self.steps.items() if isinstance(step, LinearStep) and step.replaces_layer
        )

    @without_gradients
    def _fuse(self, kernels: _Kernels, home: torch.device) -> None:
        candidates = _Candidates(home, spreads=self._stages is not None)
        replicas = [] if self._stages is None else self._stages.replicas
        for module in (*self._model.modules(), *replicas):
            for kind, may_be in _MAY_BE.items():
                if may_be(module) and (kind != EXPERTS or kernels.experts is not None):
                    candidates.add(kind, module)
            if is_float_linear(module, kernels.linear):
                candidates.add(LINEAR, module)
        wanted = {id(module): module for modules in candidates.modules.values() for module in modules}
        self._patches = [ForwardPatch(module, _run_step) for module in wanted.values()]
        try:
            with self._without_adapters():
                self.steps = self._verify(candidates, self._record(home), kernels)
        finally:
            kept = [patch for patch in self._patches if patch.module_id in self.steps]
            for patch in self._patches:
                if patch not in kept:
                    patch.close()
            self._patches = kept
        self.summary = tuple(candidates.result(kind) for kind in self._kinds)

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """Run the base layers alone in this thread, whichever adapter is active, if requests name theirs."""
        if not self._names_adapters:
            yield
            return
        modules = [m for m in adapter_modules(self._model) if unsupported_lora_reason(m, ()) is None]
        run = _BaseLayersHere()
        patches = [ForwardPatch(module, run) for module in modules]
        try:
            with forward_context(ForwardContext()):
                yield
        finally:
            for patch in patches:
                patch.close()

    def _record(self, home: torch.device) -> dict[int, RecordedCall]:
        """Run the model as it is, and record the first call of each candidate."""
        vocab_size = self._model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(1, _CHECKED_TOKENS + 1, device=home) * 7919 % vocab_size)[None]
        positions = torch.arange(_CHECKED_TOKENS, device=home)[None]
        calls: dict[int, RecordedCall] = {}

        def record(module: Any, *call: Any) -> None:
            if id(module) not in calls:
                calls[id(module)] = RecordedCall.of(module, *call)

        try:
            stages = None if self._stages is None else self._stages.begin()
            with forward_context(ForwardContext(record=record, stages=stages)):
                self._model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            msg = f"the model fails on plain token ids: {error!r}"
            raise UnsupportedError(msg) from error
        return calls

    def _verify(
        self, candidates: _Candidates, calls: Mapping[int, RecordedCall], all_kernels: _Kernels
    ) -> dict[int, Step]:
        """Find the step of each candidate; returns the steps by the modules' ids."""
        kernels = all_kernels.small

        def find(kind: str, make: Callable[[RecordedCall], Any], *, needed: bool = False) -> dict[int, Any]:
            return candidates.find(kind, calls, make) if needed or kind in self._kinds else {}

        linears = group_shared_input(find(LINEAR, lambda call: linear_step(call, all_kernels.linear)), calls)
        runs_alone = NORM in self._kinds
        found = find(NORM, lambda call: norm_step(call, kernels, runs_alone=runs_alone), needed=RESIDUAL in self._kinds)
        norms: dict[int, NormStep] = {key: step for key, step in found.items() if isinstance(step, NormStep)}
        gated = {key: step for key, step in found.items() if isinstance(step, GatedNormStep)}
        mlps = find(GATED_MLP, lambda call: gated_mlp_step(call, kernels))
        cos_sins = find(COS_SIN, lambda call: cos_sin_step(call, kernels))
        configs, likely = configs_of(self._model), None

        def find_rotary(call: RecordedCall) -> RotaryStep:
            nonlocal likely
            likely = rotary_step(call, configs, kernels, likely)
            return likely

        attentions = find(ROTARY, find_rotary)
        gating: Gating | None = None

        def find_experts(call: RecordedCall) -> ExpertsStep:
            nonlocal gating
            step = experts_step(call, all_kernels.experts, gating)
            gating = step.gating
            return step

        experts = find(EXPERTS, find_experts)
        norm_of_input = {id(call.originals[0]): call for key, call in calls.items() if key in norms}
        layers = find(
            RESIDUAL, lambda call: residual_step(call, norms, norm_of_input.get(id(call.originals[1])), calls)
        )
        # A norm is patched if it is fused by itself, or if a layer computes its output.
        following = {id(step.following[1]()) for step in layers.values() if step.following is not None}
        used = {key: step for key, step in norms.items() if key in following or (step.runs_alone and not step.centers)}
        candidates.count(NORM, len(used) + len(gated))
        steps = {**linears, **used, **gated, **mlps, **cos_sins, **attentions, **experts, **layers}
        whole = find(LAYER, lambda call: layer_step(call, steps, norms, configs, all_kernels.linear))
        return {**steps, **whole}


class _Candidates:
    """Modules that may be fused, and how many of each kind are."""

    def __init__(self, home: torch.device, *, spreads: bool) -> None:
        self._home, self._spreads = home, spreads
        self.modules: dict[str, list[Any]] = {kind: [] for kind in _MAY_BE}
        self._fused: Counter[str] = Counter()
        self._left: dict[str, Counter[str]] = {kind: Counter() for kind in _MAY_BE}

    def add(self, kind: str, module: Any) -> None:
        """Add a module, unless other code has replaced its `forward`."""
        forward = module.__dict__.get("forward")
        is_ours = isinstance(forward, ForwardPatch) and forward.replacement is _run_step
        if forward is not None and not is_ours and not (self._spreads and is_only_moved(module, forward)):
            self._left[kind]["other code has replaced its forward"] += 1
        else:
            self.modules[kind].append(module)

    def find(self, kind: str, calls: Mapping[int, RecordedCall], make: Callable[[RecordedCall], Any]) -> dict[int, Any]:
        """Make the step of each module of a kind; returns the steps by the modules' ids."""
        steps = {}
        for module in self.modules[kind]:
            call = calls.get(id(module))
            if call is None:
                continue  # not called for text: a part for images, for example
            tensors = tensors_of(*call.args, *call.kwargs.values(), call.output)
            devices = {tensor.device for tensor in tensors} or {self._home}
            is_apart = len(devices) == 1 and self._spreads and all(d.type == self._home.type for d in devices)
            if devices != {self._home} and not is_apart:
                self._left[kind][f"it is not on {self._home}"] += 1
                continue
            try:
                with at_stage(devices.pop()):
                    steps[id(module)] = make(call)
            except torch.OutOfMemoryError:
                raise
            except UnsupportedError as error:
                self._left[kind][str(error)] += 1
            except Exception as error:
                self._left[kind][f"it fails: {error!r}"] += 1
        self.count(kind, len(steps))
        return steps

    def count(self, kind: str, fused: int) -> None:
        """Set how many of a kind are fused."""
        self._fused[kind] = fused

    def result(self, kind: str) -> FusedKind:
        """Return the counts of a kind."""
        return FusedKind(kind=kind, fused=self._fused[kind], left=dict(self._left[kind]))


def _run_step(
    context: ForwardContext, module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a module's step, if the context has one, and record the call if the context asks for it."""
    step = None if module.training else context.steps.get(id(module))
    if step is not None:
        return step.run(module, forward, context, args, kwargs)
    output = forward(*args, **kwargs)
    if context.record is not None:
        context.record(module, args, kwargs, output)
    return output


class _BaseLayersHere:
    """Runs layers of peft without any adapter, in the thread that made it; see `ForwardPatch`."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __call__(
        self,
        context: ForwardContext,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        del context
        run = base_layer_of(module) if threading.get_ident() == self._thread else forward
        return run(*args, **kwargs)


@dataclass(frozen=True)
class _Kernels:
    """The kernels of small steps, of linear layers, and of experts, which may be None."""

    small: Any
    linear: Any
    experts: Any


def _kernels_for(home: torch.device) -> tuple[Any, Any, Any]:
    """Return the kernels of small steps, of linear layers and of experts for a device.

    Raises:
        UnsupportedError: If there are none.
    """
    if home.type != "cuda":
        msg = f"there are no kernels for {home.type}"
        raise UnsupportedError(msg)
    try:
        from langchain_quantllm.kernels import norms
        from langchain_quantllm.kernels.experts import dispatch as experts_dispatch
        from langchain_quantllm.kernels.linear import dispatch

        weight = torch.ones(16, dtype=torch.float32, device=home)
        norms.rms_norm(weight[None], weight, 1e-6)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # not installed, or no compiler on this machine
        msg = f"Triton cannot be used ({error!r})"
        raise UnsupportedError(msg) from error
    return norms, dispatch, experts_dispatch
