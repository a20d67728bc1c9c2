"""Importing gptqmodel, and undoing its global side effects."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from langchain_quantllm.compat.packages import check_packages
from langchain_quantllm.schemes import GPTQ

_ABSENT = object()
_lock = threading.RLock()

_PATCHED_OWNERS = (
    "accelerate.utils.modeling",
    "safetensors.torch",
    "transformers.cache_utils",
    "transformers.cache_utils:Cache",
    "transformers.cache_utils:DynamicCache",
    "transformers.generation.utils",
    "transformers.generation.utils:GenerationMixin",
    "transformers.integrations",
    "transformers.integrations.hub_kernels",
    "transformers.integrations.hub_kernels:_KERNEL_MODULE_MAPPING",
    "transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS",
    "transformers.modeling_utils",
    "transformers.modeling_utils:PreTrainedModel",
    "transformers.quantizers.auto",
    "transformers.quantizers.auto:AUTO_QUANTIZATION_CONFIG_MAPPING",
    "transformers.quantizers.auto:AUTO_QUANTIZER_MAPPING",
    "transformers.quantizers.quantizer_gptq:GptqHfQuantizer",
    "transformers.utils",
    "transformers.utils.generic",
    "transformers.utils.import_utils",
)
"""Modules, classes and tables that importing gptqmodel 7.6 changes: among others the model class, the choice of the
cache in `generate`, and accelerate's `clear_device_cache`, which then does nothing."""


@dataclass(frozen=True)
class _Patch:
    """One name that gptqmodel changed, with its values before and after; `_ABSENT` for none."""

    owner: Any
    name: str
    original: Any
    patched: Any

    def put(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            if value is _ABSENT:
                self.owner.pop(self.name, None)
            else:
                self.owner[self.name] = value
        elif value is not _ABSENT:
            setattr(self.owner, self.name, value)
        elif self.name in vars(self.owner):
            delattr(self.owner, self.name)


_import: Future[list[_Patch]] | None = None
"""The import and its changes; None before it, and if the user's program imported gptqmodel itself."""

_depth = 0


@contextlib.contextmanager
def gptqmodel_imported() -> Iterator[None]:
    """Import gptqmodel if needed, and undo its global side effects at the end of the block.

    Importing it changes methods of transformers, accelerate and safetensors, environment variables, the root logger and
    warning filters, and prints a banner. Its changes to those libraries are active inside the block only; load models
    there. Generation runs on unchanged transformers, as loaded models do not need the changes. Blocks nest, and exclude
    each other across threads; other threads see the changes while a block is open.

    These effects stay: its modules, its idle threads and the importing thread (daemons), the effects of importing
    torch's compiler, and its logger `logbar` at level ERROR, since that logger writes to stdout. If the user's program
    imported gptqmodel itself, everything stays, and the block only keeps gptqmodel quiet.

    Raises:
        MissingPackageError: If gptqmodel, optimum or accelerate is not installed.
    """
    global _depth, _import
    check_packages(GPTQ())
    with _lock, _kept_environment():
        if _import is None and "gptqmodel" not in sys.modules:
            _import = _start_import()
        try:
            patches = [] if _import is None else _import.result()
        except Exception:
            _import = None
            raise
        if _depth == 0:
            for patch in patches:
                patch.put(patch.patched)
        _depth += 1
        try:
            with _quiet_loading():
                yield
        finally:
            _depth -= 1
            if _depth == 0:
                for patch in reversed(patches):
                    patch.put(patch.original)


def _start_import() -> Future[list[_Patch]]:
    """Start importing gptqmodel in a new thread, which never ends.

    In the caller's thread the imported modules would keep the callers' frames, and through them a loaded model, for as
    long as the process lives. And if the importing thread ended, some of these modules would clean up after it without
    holding Python's lock, which now and then destroys objects in use.
    """
    imported: Future[list[_Patch]] = Future()

    def run() -> None:
        try:
            imported.set_result(_import_gptqmodel())
        except BaseException as error:
            imported.set_exception(error)
        threading.Event().wait()

    threading.Thread(target=run, name="quantllm-gptqmodel", daemon=True).start()
    return imported


def _import_gptqmodel() -> list[_Patch]:
    """Import gptqmodel without output, and list its changes."""
    # First import everything that reads the environment while it is imported, or is changed.
    owners = [owner for path in _PATCHED_OWNERS if (owner := _resolve(path)) is not None]
    before = [dict(vars(owner)) if not isinstance(owner, dict) else dict(owner) for owner in owners]
    modules = set(sys.modules)
    with _kept_environment(_neutral_environment()), _quiet_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):  # the logger writes an empty line when created
            importlib.import_module("logbar").LogBar.shared().setLevel(logging.ERROR)
        importlib.import_module("gptqmodel")
        importlib.import_module("optimum.gptq")
    patches = []
    for owner, old in zip(owners, before, strict=True):
        new = owner if isinstance(owner, dict) else vars(owner)
        for name in [n for n in {**old, **new} if old.get(n, _ABSENT) is not new.get(n, _ABSENT)]:
            value = new.get(name, _ABSENT)
            if isinstance(owner, dict) or not _loaded_lazily(value, old.get(name, _ABSENT)):
                patches.append(_Patch(owner, name, old.get(name, _ABSENT), value))
    if "causal_conv1d" not in modules and "causal_conv1d" in sys.modules:
        # gptqmodel registers a stand-in under the name of another package.
        patches.append(_Patch(sys.modules, "causal_conv1d", _ABSENT, sys.modules["causal_conv1d"]))
    return patches


def _loaded_lazily(value: Any, old: Any) -> bool:
    """Say whether a changed name is not a patch, but was imported at its first use by a module of transformers."""
    if isinstance(value, ModuleType):
        return True
    home = str(getattr(getattr(value, "__func__", value), "__module__", None))
    return old is _ABSENT and home.split(".")[0] in ("transformers", "torch", "huggingface_hub")


def _resolve(path: str) -> Any:
    """Return the module, class or table under `module:name`; None if this version has none."""
    module, _, name = path.partition(":")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    return getattr(owner, name, None) if name else owner


@contextlib.contextmanager
def _kept_environment(overlay: Mapping[str, str] | None = None) -> Iterator[None]:
    """Restore the environment at the end of the block, and set `overlay` inside it."""
    before = dict(os.environ)
    try:
        os.environ.update(overlay or {})
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


def _neutral_environment() -> dict[str, str]:
    """Return the variables that gptqmodel would set, with the values that are the defaults without it.

    It sets only unset variables. Restoring them afterwards is not enough: CUDA or the `datasets` package may read them
    during the import, and keep the values.
    """
    from huggingface_hub import constants

    home = _writable(constants.HF_HOME)
    hub = _writable(constants.HF_HUB_CACHE)
    neutral = {
        "HF_HOME": home,
        "HF_HUB_CACHE": hub,
        "TRANSFORMERS_CACHE": hub,
        "HF_MODULES_CACHE": _writable(os.path.join(home, "modules")),
        "CUDA_DEVICE_ORDER": "FASTEST_FIRST",  # CUDA's own default
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "backend:native",  # torch's default
    }
    return {name: value for name, value in neutral.items() if not os.environ.get(name)}


def _writable(folder: str) -> str:
    """Create the folder and return it; return a temporary one if that is not allowed."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:  # a read-only home: gptqmodel's import would fail on it
        return tempfile.gettempdir()
    return folder


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Drop this thread's log records below ERROR, and keep `logging.basicConfig` from acting."""
    thread = threading.get_ident()

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.ERROR

    root = logging.getLogger()
    placeholder = logging.NullHandler()  # basicConfig does nothing where root has a handler
    root.addHandler(placeholder)
    handlers = [*root.handlers, *logging.getLogger("torch").handlers]
    for handler in handlers:
        handler.addFilter(from_elsewhere)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(from_elsewhere)
        root.removeHandler(placeholder)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Drop the messages of gptqmodel and optimum while a model is loaded, and no others."""
    logbar, models = logging.getLogger("logbar"), logging.getLogger("transformers.modeling_utils")
    level = logbar.level

    def not_about_loss(record: logging.LogRecord) -> bool:
        return "`loss_type=None`" not in record.getMessage()

    logbar.setLevel(logging.ERROR)
    # optimum reads every attribute of every module, also properties that warn.
    models.addFilter(not_about_loss)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        models.removeFilter(not_about_loss)
        logbar.setLevel(level)
