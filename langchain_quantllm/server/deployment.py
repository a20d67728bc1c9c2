"""How other engines' servers are started with a checkpoint: a command, or a manifest for a cluster.

Owns which checkpoints vLLM reads and how they may be divided, and the words of the manifests. Starts nothing, and knows
no engine of this package.

Sources: vllm/engine/arg_utils.py and docs/deployment/k8s.md of vLLM 0.32; `LLMConfig` of Ray Serve LLM 2.60.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_quantllm.errors import CheckpointError, InvalidOptionError, UnsupportedError, nearest

FORMATS = ("command", "ray", "kubernetes")
ENGINES = ("vllm",)
IMAGE = "vllm/vllm-openai:v0.32.0"
"""The image of the release that the flags were read in."""

PORT = 8000
_READ = frozenset({"gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "modelopt"})
"""Quantization methods of configs that vLLM reads itself."""

_MODEL_FOLDER = "/models/model"
_ADAPTER_FOLDER = "/models/adapters"
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank`."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A checkpoint on the servers of another engine.

    Args:
        source: Folder, or repository on the Hub.
        config: Its config.json.
        quantization: The quantization config in it; None for an unquantized checkpoint.
        name: The model's name in requests.
        replicas: Copies of the model.
        tensor_parallel: GPUs that share each layer.
        pipeline_parallel: Groups of these, each with a part of the layers.
        context_tokens: Most tokens of prompt and completion; None is the checkpoint's context.
        adapters: Folders of LoRA adapters, by name.
        image: The container image of a Kubernetes manifest.
        revision: Branch, tag or commit of a repository.
        trust_remote_code: Let the engine run code of the checkpoint.

    Raises:
        UnsupportedError: If vLLM does not read the checkpoint.
        InvalidOptionError: If the model cannot be divided so, or a value is not possible.
        CheckpointError: If an adapter cannot be read.
    """

    source: str
    config: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    name: str
    replicas: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_tokens: int | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    image: str = IMAGE
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check what the engine would refuse after it was started on every machine."""
        counts = {"replicas": self.replicas, "tensor-parallel": self.tensor_parallel}
        counts |= {"pipeline-parallel": self.pipeline_parallel, "context": self.context_tokens or 1}
        for option, value in counts.items():
            if value < 1:
                msg = f"--{option} {value} is not allowed; it must be at least 1."
                raise InvalidOptionError(msg)
        _check_method(self.source, self.quantization)
        text = self.config.get("text_config") or self.config
        _check_division(text, self.quantization or {}, self.tensor_parallel, self.pipeline_parallel)
        context = text.get("max_position_embeddings")
        if self.context_tokens and context and self.context_tokens > context:
            msg = f"--context {self.context_tokens} is more than the checkpoint's context of {context}; ask for less."
            raise InvalidOptionError(msg)
        if not re.fullmatch(r"[\w./:@+-]+", self.name):
            msg = f"--name {self.name!r} is not possible; use letters, digits and ._-/:."
            raise InvalidOptionError(msg)

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.tensor_parallel * self.pipeline_parallel

    def arguments(self, source: str, adapters: Mapping[str, str], *, host: str | None = None) -> list[str]:
        """Return the words of one server's command after `vllm`, without replicas.

        Args:
            source: The checkpoint, where the server sees it.
            adapters: The adapters' folders there.
            host: The address to listen on; None for loopback.
        """
        words = ["serve", source, "--served-model-name", self.name, "--host", host or "127.0.0.1", "--port", str(PORT)]
        sizes = {
            "--tensor-parallel-size": self.tensor_parallel,
            "--pipeline-parallel-size": self.pipeline_parallel,
            "--max-model-len": self.context_tokens or 1,
        }
        for flag, value in sizes.items():
            words += [flag, str(value)] if value > 1 else []
        words += ["--revision", self.revision] if self.revision else []
        words += ["--trust-remote-code"] if self.trust_remote_code else []
        if adapters:
            rank = max(map(adapter_rank, self.adapters.values()))
            words += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(rank)]
            words += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
        return words

    def command(self) -> str:
        """Write the command for one machine; replicas are its own data parallel ones."""
        words = ["vllm", *self.arguments(self.source, self.adapters)]
        replicas = ["--data-parallel-size", str(self.replicas)] if self.replicas > 1 else []
        at = words.index("--port") + 2  # before --lora-modules, which takes all words that follow
        return shlex.join([*words[:at], *replicas, *words[at:]])

    def ray(self) -> str:
        """Write the YAML that `serve deploy` of Ray takes, for requests from the machine itself.

        Raises:
            InvalidOptionError: If there are adapters, which Ray fetches from a bucket of its own.
        """
        if self.adapters:
            msg = (
                "--adapter is not possible with --format ray, whose adapters come from a bucket (lora_config); use "
                "--format command or kubernetes, or `merge` the adapter."
            )
            raise InvalidOptionError(msg)
        engine: dict[str, Any] = {
            "tensor_parallel_size": self.tensor_parallel,
            "pipeline_parallel_size": self.pipeline_parallel,
        }
        if self.context_tokens:
            engine["max_model_len"] = self.context_tokens
        engine |= {"revision": self.revision} if self.revision else {}
        engine |= {"trust_remote_code": True} if self.trust_remote_code else {}
        model = {
            "model_loading_config": {"model_id": self.name, "model_source": self.source},
            "engine_kwargs": engine,
            "deployment_config": {
                "autoscaling_config": {"min_replicas": self.replicas, "max_replicas": self.replicas},
            },
        }
        application = {
            "name": _label(self.name),
            "route_prefix": "/",
            "import_path": "ray.serve.llm:build_openai_app",
            "args": {"llm_configs": [model]},
        }
        # Ray listens on all addresses unless it is told otherwise, and asks for no key.
        return yaml_text({"http_options": {"host": "127.0.0.1", "port": PORT}, "applications": [application]})

    def kubernetes(self) -> str:
        """Write a Deployment and a Service; local folders come from a claim of a volume, the key from a secret."""
        label = _label(self.name)
        is_folder = Path(self.source).exists()
        source = _MODEL_FOLDER if is_folder else self.source
        adapters = {name: f"{_ADAPTER_FOLDER}/{_label(name)}" for name in self.adapters}
        mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108  (in a container)
        volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
        if is_folder or adapters:
            mounts.append({"name": "models", "mountPath": "/models", "readOnly": True})
            claim = {"claimName": f"{label}-models", "readOnly": True}
            volumes.append({"name": "models", "persistentVolumeClaim": claim})

        def secret(name: str, key: str, *, optional: bool) -> dict[str, Any]:
            reference = {"name": label, "key": key, "optional": optional}
            return {"name": name, "valueFrom": {"secretKeyRef": reference}}

        probe = {"httpGet": {"path": "/health", "port": PORT}, "timeoutSeconds": 5}
        container = {
            "name": "vllm",
            "image": self.image,
            "command": ["vllm"],
            "args": self.arguments(source, adapters, host="0.0.0.0"),  # noqa: S104  (behind a Service, with a key)
            "env": [secret("VLLM_API_KEY", "api-key", optional=False), secret("HF_TOKEN", "hf-token", optional=True)],
            "ports": [{"containerPort": PORT}],
            "resources": {"limits": {"nvidia.com/gpu": self.gpus}},
            # Half an hour for the weights; the other probes begin afterwards.
            "startupProbe": {**probe, "periodSeconds": 10, "failureThreshold": 180},
            "readinessProbe": {**probe, "periodSeconds": 5},
            "livenessProbe": {**probe, "periodSeconds": 10, "failureThreshold": 3},
            "volumeMounts": mounts,
        }
        labels = {"app.kubernetes.io/name": label}
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": label, "labels": labels},
            "spec": {
                "replicas": self.replicas,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [container], "volumes": volumes},
                },
            },
        }
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": label, "labels": labels},
            "spec": {"selector": labels, "ports": [{"port": PORT, "targetPort": PORT}]},
        }
        return f"{yaml_text(deployment)}---\n{yaml_text(service)}"

    def text(self, kind: str) -> str:
        """Write one of `FORMATS`.

        Raises:
            InvalidOptionError: If it is none of them, or not possible with these adapters.
        """
        if kind not in FORMATS:
            msg = f"--format {kind!r} is not known{nearest(kind, FORMATS)}"
            raise InvalidOptionError(msg)
        return {"command": self.command, "ray": self.ray, "kubernetes": self.kubernetes}[kind]()


def _check_method(source: str, quantization: Mapping[str, Any] | None) -> None:
    if quantization is None:
        return
    method = str(quantization.get("quant_method", "bitsandbytes" if quantization.get("load_in_4bit") else ""))
    remedy = f"quantize to GPTQ: langchain-quantllm quantize {shlex.quote(source)} -s gptq"
    if method == "bitsandbytes":
        msg = (
            "vLLM reads bitsandbytes checkpoints with its plugin vllm-bnb-plugin only, and not with tensor "
            "parallelism; "
            f"{remedy.replace(shlex.quote(source), 'UNQUANTIZED_MODEL')}."
        )
        raise UnsupportedError(msg)
    if method not in _READ:
        msg = f"vLLM does not read the quantization {method!r} of {source}; {remedy}, from the unquantized model."
        raise UnsupportedError(msg)
    rules = [own or {} for own in (quantization.get("dynamic") or {}).values()]
    settings = [quantization, *({**quantization, **own} for own in rules)]
    wrong = (own for own in settings if own.get("bits") not in (4, 8) or own.get("sym") is False)
    if method == "gptq" and (own := next(wrong, None)) is not None:
        what = f"{own.get('bits')} bits, {'symmetric' if own.get('sym', True) else 'asymmetric'}"
        msg = f"vLLM reads GPTQ of 4 and 8 bits, symmetric, and {source} has {what}; quantize it so."
        raise UnsupportedError(msg)


def _check_division(text: Mapping[str, Any], quantization: Mapping[str, Any], tensor: int, pipeline: int) -> None:
    """Check that heads, groups and layers can be divided.

    Raises:
        InvalidOptionError: If not.
    """
    heads, layers = text.get("num_attention_heads"), text.get("num_hidden_layers")
    if heads and heads % tensor:
        msg = f"--tensor-parallel {tensor} does not divide the model's {heads} attention heads; give a divisor of them."
        raise InvalidOptionError(msg)
    group, width = quantization.get("group_size"), text.get("intermediate_size")
    if group and group > 0 and width and tensor > 1 and width % (tensor * group):
        msg = (
            f"--tensor-parallel {tensor} cuts the {width} inputs of its layers within groups of {group}; give fewer, "
            "or quantize with a smaller --group-size."
        )
        raise InvalidOptionError(msg)
    if layers and pipeline > layers:
        msg = f"--pipeline-parallel {pipeline} is more than the model's {layers} layers; give fewer."
        raise InvalidOptionError(msg)


def adapter_rank(folder: str) -> int:
    """Return the least value of `--max-lora-rank` that holds an adapter.

    Raises:
        CheckpointError: If the folder holds no LoRA adapter, or one of a rank that vLLM does not take.
    """
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{folder} holds no LoRA adapter of peft that can be read: {error}; name its folder."
        raise CheckpointError(msg) from error
    if rank > _LORA_RANKS[-1]:
        msg = f"the adapter in {folder} has rank {rank}, and vLLM takes {_LORA_RANKS[-1]} at most; `merge` it."
        raise CheckpointError(msg)
    return next(known for known in _LORA_RANKS if known >= rank)


def _label(name: str) -> str:
    """Write a name as Kubernetes takes it (RFC 1123)."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].strip("-") or "model"


def yaml_text(value: Any) -> str:
    """Write dicts, lists, texts and numbers as YAML, in blocks."""
    return "".join(f"{line}\n" for line in _yaml_lines(value))


def _yaml_lines(value: Any) -> list[str]:
    lines: list[str] = []
    pairs = value.items() if isinstance(value, Mapping) else ((None, inner) for inner in value)
    for name, inner in pairs:
        head = "-" if name is None else f"{_scalar(name)}:"
        if not isinstance(inner, Mapping | list) or not inner:
            lines.append(f"{head} {_scalar(inner)}")
            continue
        nested = _yaml_lines(inner)
        if name is None:
            lines += [f"- {nested[0]}", *(f"  {line}" for line in nested[1:])]
        else:
            lines += [head, *(f"  {line}" for line in nested)]
    return lines


def _scalar(value: Any) -> str:
    """Write a value that needs no lines of its own; a text as JSON, unless it is plainly a word."""
    is_word = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./-]*", value) is not None
    is_other = is_word and value.lower() in ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
    return str(value) if is_word and not is_other else json.dumps(value, ensure_ascii=True)
