"""Fused steps of a loaded model, in the engine's own forwards only.

Owns which modules are stood in for, when, and that all is put back. Each one was compared with the module that it
stands in for, on a call that the model itself made; what does not match is left alone, with the reason. Outside of the
engine's forwards, in other threads too, every module does what its own code says.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.engine.attention import configs_of, without_gradients
from langchain_quantllm.engine.fusion.linear import ProductStep, put_together
from langchain_quantllm.engine.fusion.patterns import Carried, NormStep, RotaryStep, Step
from langchain_quantllm.engine.fusion.verify import (
    Call,
    angles_step,
    gate_step,
    is_angles,
    is_gated,
    is_layer,
    is_norm,
    is_rotary,
    norm_step,
    residual_step,
    rotary_step,
    tensors_of,
)
from langchain_quantllm.engine.fusion.verify_linear import is_product, product_step
from langchain_quantllm.engine.lora import forward_of
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError

PRODUCT, NORM, GATE, ANGLES, ROTARY, RESIDUAL = "product", "norm", "gate", "angles", "rotary", "residual"

KINDS = (PRODUCT, NORM, GATE, ANGLES, ROTARY, RESIDUAL)
"""What can be fused: products with quantized weights, those of one input together; RMSNorms; the gates of MLPs; the
cosines and sines of positions; rotations by them with the writing of keys and values; additions with the norm behind
them."""

_IS = {
    PRODUCT: is_product,
    NORM: is_norm,
    GATE: is_gated,
    ANGLES: is_angles,
    ROTARY: is_rotary,
    RESIDUAL: is_layer,
}
_PROBE_TOKENS = 7


@dataclass(frozen=True, kw_only=True)
class FusedKind:
    """What became of the modules of one kind.

    Args:
        kind: One of `KINDS`.
        fused: How many are fused.
        left: How many are left alone, by the reason.
    """

    kind: str
    fused: int
    left: Mapping[str, int]


class Fusion:
    """The fused steps of one model."""

    def __init__(
        self, model: Any, *, kernels: Any = None, linear_kernels: Any = None, kinds: Sequence[str] = KINDS
    ) -> None:
        """Find what can be fused, and stand in front of it.

        Args:
            model: A causal language model of transformers.
            kernels: `kernels.fused` or `kernels.reference`; None for the first where it runs, and for no fusion
                elsewhere.
            linear_kernels: `kernels.dispatch` or `kernels.linear_reference`; None likewise.
            kinds: What is fused, of `KINDS`.

        Raises:
            InvalidOptionError: If a kind is unknown.
        """
        if unknown := sorted(set(kinds) - set(KINDS)):
            msg = f"kinds={unknown[0]!r} is none of {', '.join(KINDS)}."
            raise InvalidOptionError(msg)
        self._model = model
        self._kernels = kernels
        self._linear_kernels = linear_kernels
        self._kinds = tuple(kinds)
        self._thread = threading.local()
        self._standing: list[_Standing] = []
        self.steps: dict[int, Step] = {}
        self.unsupported_reason: str | None = None
        """What is against fusing anything at all."""
        self.summary: tuple[FusedKind, ...] = ()
        self.build()

    def build(self) -> None:
        """Find anew what can be fused, as after a change of the model's modules."""
        self.close()
        self.unsupported_reason = None
        home = self._model.get_input_embeddings().weight.device
        try:
            with torch.cuda.device(home) if home.type == "cuda" else contextlib.nullcontext():
                kernels, products = self._kernels, self._linear_kernels
                if kernels is None or products is None:
                    there = _kernels_for(home)
                    kernels, products = kernels or there[0], products or there[1]
                self._fuse(kernels, products, home)
        except UnsupportedError as error:
            self.close()
            self.unsupported_reason = str(error)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Step back: every module's `forward` is as it was."""
        for standing in self._standing:
            standing.step_back()
        self._standing, self.steps, self.summary = [], {}, ()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Run the model in this thread with what is fused."""
        self._thread.carried = Carried()
        try:
            yield
        finally:
            self._thread.carried = None

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Run the model in this thread as it is, but for products that leave out a rounding of the layer's own."""
        home = self._model.get_input_embeddings().weight.device
        self._thread.is_exact = True
        try:
            with torch.cuda.device(home) if home.type == "cuda" else contextlib.nullcontext():  # for Triton
                yield
        finally:
            self._thread.is_exact = False

    @property
    def replaced_ids(self) -> frozenset[int]:
        """Ids of the layers that are never called where steps are applied."""
        return frozenset(key for key, step in self.steps.items() if isinstance(step, ProductStep) and step.is_whole)

    @property
    def carried(self) -> Carried | None:
        """What the forward of this thread carries along; None where nothing is fused."""
        return getattr(self._thread, "carried", None)

    def step_of(self, module_id: int) -> Step | None:
        """Give the step that stands in for a module in what this thread runs; None for the module itself."""
        if self.carried is not None:
            return self.steps.get(module_id)
        if getattr(self._thread, "is_exact", False):
            step = self.steps.get(module_id)
            return step if isinstance(step, ProductStep) and step.is_exact else None
        return None

    @property
    def recording(self) -> dict[int, Call] | None:
        """Where this thread notes the calls of modules; None where it does not."""
        return getattr(self._thread, "recording", None)

    @without_gradients
    def _fuse(self, kernels: Any, products: Any, home: torch.device) -> None:
        candidates = _Candidates(home)
        for module in self._model.modules():
            for kind in KINDS:
                if _IS[kind](module):
                    candidates.add(kind, module)
        wanted = {id(module): module for modules in candidates.modules.values() for module in modules}
        self._standing = [_Standing(self, module) for module in wanted.values()]
        calls = self._record(home)
        try:
            self._verify(candidates, calls, kernels, products)
        finally:
            kept = [standing for standing in self._standing if standing.module_id in self.steps]
            for standing in self._standing:
                if standing not in kept:
                    standing.step_back()
            self._standing = kept
        self.summary = tuple(candidates.result(kind) for kind in self._kinds)

    def _record(self, home: torch.device) -> dict[int, Call]:
        """Let the model run as it is, and note the first call of each candidate."""
        vocab_size = self._model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(1, _PROBE_TOKENS + 1, device=home) * 7919 % vocab_size)[None]
        positions = torch.arange(_PROBE_TOKENS, device=home)[None]
        calls: dict[int, Call] = {}
        self._thread.recording = calls
        try:
            self._model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            msg = f"the model fails on plain token ids: {error!r}"
            raise UnsupportedError(msg) from error
        finally:
            self._thread.recording = None
        return calls

    def _verify(self, candidates: _Candidates, calls: Mapping[int, Call], kernels: Any, products: Any) -> None:
        linear = {}
        if PRODUCT in self._kinds:
            linear = candidates.find(PRODUCT, calls, lambda call: product_step(call, products))
            linear = put_together(linear, {key: (calls[key].module, calls[key].originals[0]) for key in linear})
        norms: dict[int, NormStep] = {}
        if NORM in self._kinds or RESIDUAL in self._kinds:
            runs_alone = NORM in self._kinds
            norms = candidates.find(NORM, calls, lambda call: norm_step(call, kernels, runs_alone=runs_alone))
        gates = candidates.find(GATE, calls, lambda call: gate_step(call, kernels)) if GATE in self._kinds else {}
        angles = (
            candidates.find(ANGLES, calls, lambda call: angles_step(call, kernels)) if ANGLES in self._kinds else {}
        )
        configs, likely = configs_of(self._model), None

        def find_rotary(call: Call) -> RotaryStep:
            nonlocal likely
            likely = rotary_step(call, configs, kernels, likely)
            return likely

        attentions = candidates.find(ROTARY, calls, find_rotary) if ROTARY in self._kinds else {}
        layers = {}
        if RESIDUAL in self._kinds:
            given = {id(call.originals[0]): call for key, call in calls.items() if key in norms}
            layers = candidates.find(
                RESIDUAL, calls, lambda call: residual_step(call, norms, given.get(id(call.originals[1])))
            )
        # Norms stand by themselves, or for what a layer carries to them.
        following = {id(step.following[1]()) for step in layers.values() if step.following is not None}
        used = {key: step for key, step in norms.items() if key in following or (step.runs_alone and not step.centers)}
        candidates.count(NORM, len(used))
        self.steps = {**linear, **used, **gates, **angles, **attentions, **layers}


class _Candidates:
    """Modules that may be fused, and what becomes of them."""

    def __init__(self, home: torch.device) -> None:
        self._home = home
        self.modules: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        self._fused: Counter[str] = Counter()
        self._left: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}

    def add(self, kind: str, module: Any) -> None:
        """Take a module in, unless something is against it from the start."""
        stands_there = module.__dict__.get("forward")
        if stands_there is not None and not isinstance(stands_there, _Standing):
            self._left[kind]["something else stands in front of it"] += 1
        else:
            self.modules[kind].append(module)

    def find(self, kind: str, calls: Mapping[int, Call], find: Callable[[Call], Any]) -> dict[int, Any]:
        """Find the step of each module of a kind, by the module's id."""
        found = {}
        for module in self.modules[kind]:
            call = calls.get(id(module))
            if call is None:
                continue  # of a part for images, say
            if any(
                tensor.device != self._home for tensor in tensors_of(*call.args, *call.kwargs.values(), call.output)
            ):
                self._left[kind][f"it is not on {self._home}"] += 1
                continue
            try:
                found[id(module)] = find(call)
            except torch.OutOfMemoryError:
                raise
            except UnsupportedError as error:
                self._left[kind][str(error)] += 1
            except Exception as error:
                self._left[kind][f"it fails: {error!r}"] += 1
        self.count(kind, len(found))
        return found

    def count(self, kind: str, fused: int) -> None:
        """Note how many of a kind are fused."""
        self._fused[kind] = fused

    def result(self, kind: str) -> FusedKind:
        """Say what became of a kind."""
        return FusedKind(kind=kind, fused=self._fused[kind], left=dict(self._left[kind]))


class _Standing:
    """Stands where a module's `forward` is looked up, and hands on whatever is not fused or not the engine's."""

    def __init__(self, fusion: Fusion, module: Any) -> None:
        # Neither is to live on for this.
        self._fusion = weakref.ref(fusion)
        self._module = weakref.ref(module)
        self.module_id = id(module)
        self._before = module.__dict__.get("forward")
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fusion = self._fusion()
        module: Any = self._module()
        forward = self._before or forward_of(module)
        if fusion is None:
            return forward(*args, **kwargs)
        step = None if module.training else fusion.step_of(self.module_id)
        if step is not None:
            return step.run(module, forward, fusion.carried or Carried(), args, kwargs)
        output = forward(*args, **kwargs)
        calls = fusion.recording
        if calls is not None and self.module_id not in calls:
            calls[self.module_id] = Call.of(module, args, kwargs, output)
        return output

    def step_back(self) -> None:
        """Leave the module's `forward` as it was."""
        module = self._module()
        if module is None or module.__dict__.get("forward") is not self:
            return  # the module is gone, or somebody has stepped in front of this one
        if self._before is None:
            del module.forward
        else:
            module.forward = self._before

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave what is unpickled with its own forward."""
        return forward_of, (self._module(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Leave a copy of the module with its own forward: this one knows the original."""
        twin = memo.get(self.module_id)
        return self if twin is None else forward_of(twin)


def _kernels_for(home: torch.device) -> tuple[Any, Any]:
    """Give the kernels of small steps and of products that run on a device.

    Raises:
        UnsupportedError: If there are none.
    """
    if home.type != "cuda":
        msg = f"there are no kernels for {home.type}"
        raise UnsupportedError(msg)
    try:
        from langchain_quantllm.kernels import norms as fused
        from langchain_quantllm.kernels.linear import dispatch

        fused.rms_norm(torch.ones(1, 16, device=home), torch.ones(16, device=home), 1e-6)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # not installed, or nothing here to compile with
        msg = f"Triton cannot be used ({error!r})"
        raise UnsupportedError(msg) from error
    return fused, dispatch
