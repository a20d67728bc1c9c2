"""transformers' mappings from model types to models and processors, and the parts of a processor."""

from __future__ import annotations

from typing import Any


def has_causal_lm(model_type: str) -> bool:
    """Say whether transformers has a causal language model for a model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def has_image_text_to_text(model_type: str) -> bool:
    """Say whether transformers has a model for a model type that continues texts with images in them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


_HEARING = frozenset({"qwen2_audio"})
"""Types of models that continue texts with sounds in them, read no images, and were tried here."""


def has_audio_text_to_text(model_type: str) -> bool:
    """Say whether transformers has a model for a model type that continues texts with sounds, and reads no images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    return model_type in _HEARING and model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


def has_speech_seq2seq(model_type: str) -> bool:
    """Say whether transformers has a model for a model type that turns speech into text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

    return model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES


def encoder_maker(config: Any, *, is_classifier: bool) -> Any:
    """Return the function that makes an untrained encoder of a config, of the class that sentence-transformers loads.

    Args:
        config: The config of the transformer.
        is_classifier: Whether it has the head of a cross-encoder.

    Returns:
        A function with the arguments of `AutoModel.from_config`.

    Source: `_load_model` of sentence_transformers/base/modules/transformer.py.
    """
    import transformers

    if is_classifier:
        return transformers.AutoModelForSequenceClassification.from_config
    name = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}.get(config.model_type)
    if name is None:
        return transformers.AutoModel.from_config
    made = getattr(transformers, name)
    return lambda config, *, trust_remote_code=False, **options: made._from_config(config, **options)


def load_image_processor(source: str, **options: Any) -> Any:
    """Load the image processor of a checkpoint; `transformers.AutoImageProcessor` would require torchvision."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source, **options)


def processor_class(config_class: type) -> Any:
    """Return the class of the processor for a class of configs; None if there is none."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    return PROCESSOR_MAPPING.get(config_class, None)


def processor_parts(kind: Any) -> tuple[str, ...]:
    """List the names of the parts of a class of processors, such as `tokenizer`."""
    return tuple(kind.get_attributes())


def make_processor(kind: Any, parts: list[Any], source: str, **options: Any) -> Any:
    """Make a processor from loaded parts, some of them None, with the settings of a checkpoint."""

    def check(processor: Any, name: str, part: Any) -> Any:
        return None if part is None else kind.check_argument_for_proper_class(processor, name, part)

    partial: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    settings, _ = kind.get_processor_dict(source, **options)
    return partial.from_args_and_dict(parts, settings)


def without_adapter() -> dict[str, Any]:
    """Return the options of `from_pretrained` with which it applies no adapter that lies beside a model's weights.

    transformers looks for adapter_config.json in a folder that these name, and no checkpoint has. There is no option
    that forbids it. Source: `maybe_load_adapters` in transformers/integrations/peft.py.
    """
    return {"adapter_kwargs": {"subfolder": "no-adapter-is-applied"}}


def has_applied_adapter(model: Any) -> bool:
    """Say whether `from_pretrained` has applied an adapter to a model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "peft_config", None))
