"""The options that transformers' pipelines store."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def flat_options(pipeline: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `generate_kwargs`, as image-text-to-text pipelines take them, into the other options.

    Args:
        pipeline: The pipeline; some write their own config into their options (transformers 5.14).
        given: The options.
    """
    flat = {k: v for k, v in given.items() if k != "generate_kwargs"} | dict(given.get("generate_kwargs") or {})
    if flat.get("generation_config", given) is getattr(pipeline, "generation_config", None):
        del flat["generation_config"]
    return flat


def options_of(pipeline: Any) -> dict[str, Any]:
    """Return the options that the user passed to a pipeline when making it.

    The pipeline's own defaults (sampling at 0.7) and those of its checkpoint are not among them.
    """
    given = {
        **getattr(pipeline, "_generate_kwargs", {}),
        **flat_options(pipeline, getattr(pipeline, "_forward_params", {})),
    }
    if (mixed := getattr(pipeline, "generation_config", None)) is not None:
        # transformers 5.14 to 5.17 keeps them in one config, mixed with the pipeline's and its own defaults.
        defaults = (type(pipeline)._default_generation_config.to_dict(), mixed._get_default_generation_params())
        own = {k: v for k, v in mixed.to_diff_dict().items() if not any(v == d.get(k) for d in defaults)}
        own.pop("use_cache", None)
        stored = pipeline.model.generation_config
        if mixed.do_sample and any(own.get(name) not in (None, getattr(stored, name, None)) for name in _SAMPLING):
            own["do_sample"] = True  # also the pipeline's default; but the user passed an option of sampling
        given = {**own, **given}
    if (config := given.pop("generation_config", None)) is not None:
        given = {**config.to_diff_dict(), **given}
    return given


def with_options(pipeline: Any, options: Mapping[str, Any]) -> Any:
    """Copy a pipeline with further options; the copy shares the model.

    Args:
        pipeline: The pipeline.
        options: The options, as a call of the pipeline takes them.
    """
    pipeline = copy.copy(pipeline)
    pipeline._forward_params = {**pipeline._forward_params, **options}
    return pipeline
