"""The counts and times of a server, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from langchain_quantllm.engine.stream import Usage
from langchain_quantllm.server.served import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

OUTCOMES = ("ok", "cancelled", "invalid", "refused", "failed")
"""The ends of a request: answered; given up by its client, or as the server closed; wrong; not taken, as the queue is
full or the server not ready; failed inside."""

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The metrics of one server."""

    def __init__(self, served: ServedModel) -> None:
        """Begin at zero."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "quantllm_requests", "Requests that have ended.", ("endpoint", "outcome"), registry=self._registry
        )
        self.in_flight = Gauge(
            "quantllm_requests_in_flight", "Requests that are being answered.", registry=self._registry
        )
        self._prompt_tokens = Counter("quantllm_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self._cached_tokens = Counter(
            "quantllm_prompt_tokens_cached", "Tokens of prompts found in the KV cache.", registry=self._registry
        )
        self._generation_tokens = Counter("quantllm_generation_tokens", "Generated tokens.", registry=self._registry)
        self._first_token_s = Histogram(
            "quantllm_time_to_first_token_seconds",
            "Seconds from a sequence's arrival to its first token.",
            buckets=_FIRST_TOKEN_S,
            registry=self._registry,
        )
        self._token_s = Histogram(
            "quantllm_time_per_output_token_seconds",
            "Mean seconds of a sequence's tokens after the first.",
            buckets=_TOKEN_S,
            registry=self._registry,
        )
        self._registry.register(_EngineMetrics(served))

    def count(self, usage: Usage) -> None:
        """Add a sequence that has ended."""
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._cached_tokens.inc(usage.cached_tokens)
        self._generation_tokens.inc(usage.completion_tokens)
        self._first_token_s.observe(usage.first_token_s)
        if usage.completion_tokens > 1:
            self._token_s.observe((usage.total_s - usage.first_token_s) / (usage.completion_tokens - 1))

    def text(self) -> bytes:
        """Write all metrics."""
        return generate_latest(self._registry)


class _EngineMetrics:
    """What the engine and the devices say when they are asked."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    def describe(self) -> list[GaugeMetricFamily]:
        """Say nothing before the first scrape: asking would load the model."""
        return []

    def collect(self) -> list[GaugeMetricFamily]:
        """Read the engine's sequences, its KV cache, and the memory of the GPUs."""
        found = []
        load = self._served.load_now
        if load is not None:
            found += [
                GaugeMetricFamily("quantllm_requests_running", "Sequences in the batch.", load.running),
                GaugeMetricFamily("quantllm_requests_waiting", "Sequences that wait for a place.", load.waiting),
            ]
            if load.cache_tokens is not None:
                held = "Tokens' places in the KV cache that sequences hold."
                found.append(GaugeMetricFamily("quantllm_kv_cache_tokens_used", held, load.cache_tokens))
            if (capacity := self._served.engine.info.kv_cache_tokens) is not None:
                found.append(GaugeMetricFamily("quantllm_kv_cache_tokens", "Tokens that the KV cache holds.", capacity))
            found += _gpu_memory()
        return found


def _gpu_memory() -> list[GaugeMetricFamily]:
    import torch

    used = GaugeMetricFamily("quantllm_gpu_memory_used_bytes", "Bytes in use, by any process.", labels=("device",))
    total = GaugeMetricFamily("quantllm_gpu_memory_bytes", "Bytes of a GPU's memory.", labels=("device",))
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    for i in range(count):
        free_bytes, total_bytes = torch.cuda.mem_get_info(i)
        used.add_metric((f"cuda:{i}",), total_bytes - free_bytes)
        total.add_metric((f"cuda:{i}",), total_bytes)
    return [used, total] if count else []
