"""Which models and processors transformers has for a config: its mappings by model type, and parts of a processor."""

from __future__ import annotations

from typing import Any


def has_causal_lm(model_type: str) -> bool:
    """Say whether transformers has a causal language model of a type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def has_image_text_to_text(model_type: str) -> bool:
    """Say whether transformers has a model of a type that continues texts with images in them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_image_processor(source: str, **options: Any) -> Any:
    """Load the image processor of a checkpoint, where `transformers.AutoImageProcessor` would ask for torchvision."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source, **options)


def processor_class(config_class: type) -> Any:
    """Return the class of the processor that belongs to a class of configs; None where there is none."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    return PROCESSOR_MAPPING.get(config_class, None)


def processor_parts(kind: Any) -> tuple[str, ...]:
    """Name the parts that a class of processors is made of, such as `tokenizer`."""
    return tuple(kind.get_attributes())


def make_processor(kind: Any, parts: list[Any], source: str, **options: Any) -> Any:
    """Make a processor of parts that are loaded, some of them None, with the settings of a checkpoint."""

    def check(processor: Any, name: str, part: Any) -> Any:
        return None if part is None else kind.check_argument_for_proper_class(processor, name, part)

    partial: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    settings, _ = kind.get_processor_dict(source, **options)
    return partial.from_args_and_dict(parts, settings)
