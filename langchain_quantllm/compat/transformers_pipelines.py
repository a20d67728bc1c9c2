"""What transformers' pipelines keep of the options that they were made with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def flat_options(pipeline: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the options that an image-text-to-text pipeline takes in a dict of their own to the others.

    Args:
        pipeline: The pipeline; some write their own config into the options that they are given (transformers 5.14).
        given: The options.
    """
    flat = {k: v for k, v in given.items() if k != "generate_kwargs"} | dict(given.get("generate_kwargs") or {})
    if flat.get("generation_config", given) is getattr(pipeline, "generation_config", None):
        del flat["generation_config"]
    return flat


def options_of(pipeline: Any) -> dict[str, Any]:
    """Read the options that were given to a pipeline when it was made.

    The pipeline's own defaults (sampling at 0.7) are none of them, nor are those of its checkpoint.
    """
    given = {
        **getattr(pipeline, "_generate_kwargs", {}),
        **flat_options(pipeline, getattr(pipeline, "_forward_params", {})),
    }
    if (mixed := getattr(pipeline, "generation_config", None)) is not None:
        # Older pipelines (transformers 5.14 to 5.17) keep them in one config with their own and transformers' defaults.
        defaults = (type(pipeline)._default_generation_config.to_dict(), mixed._get_default_generation_params())
        own = {k: v for k, v in mixed.to_diff_dict().items() if not any(v == d.get(k) for d in defaults)}
        own.pop("use_cache", None)
        stored = pipeline.model.generation_config
        if mixed.do_sample and any(own.get(name) not in (None, getattr(stored, name, None)) for name in _SAMPLING):
            own["do_sample"] = True  # which is the pipeline's default, too: an option of sampling was given beside it
        given = {**own, **given}
    if (config := given.pop("generation_config", None)) is not None:
        given = {**config.to_diff_dict(), **given}
    return given


def with_options(pipeline: Any, options: Mapping[str, Any]) -> Any:
    """Copy a pipeline, its model shared, as if it had been made with further options.

    Args:
        pipeline: The pipeline.
        options: The options, as a call of it takes them.
    """
    pipeline = copy.copy(pipeline)
    pipeline._forward_params = {**pipeline._forward_params, **options}
    return pipeline
