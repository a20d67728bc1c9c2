"""The parts of a model beside its weights, as everything above the engine uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Tokenizer, processor and configs of a model, whether its weights are in this process or not.

    Args:
        tokenizer: The tokenizer of transformers.
        processor: The processor of a model that takes images or sounds; None for others.
        config: The config of the model.
        generation_config: Its generation config.
        pipeline: The transformers pipeline with the weights; None if another engine holds them.
    """

    tokenizer: Any
    processor: Any
    config: Any
    generation_config: Any
    pipeline: Any = None

    @classmethod
    def of(cls, pipeline: Any) -> ModelParts:
        """Return the parts of a transformers pipeline."""
        model = pipeline.model
        return cls(
            tokenizer=pipeline.tokenizer,
            processor=getattr(pipeline, "processor", None),
            config=model.config,
            generation_config=model.generation_config,
            pipeline=pipeline,
        )

    @property
    def has_own_adapters(self) -> bool:
        """Whether adapters of peft are on the model that requests do not choose from."""
        return self.pipeline is not None and bool(getattr(self.pipeline.model, "peft_config", None))
