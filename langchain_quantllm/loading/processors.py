"""Processors, which turn a prompt, its images and its sounds into a model's inputs: finding, loading, calling them."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.compat.transformers_auto import (
    load_image_processor,
    make_processor,
    processor_class,
    processor_parts,
)
from langchain_quantllm.compat.transformers_processors import with_encoder
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    ModelNotFoundError,
    QuantLLMError,
    UnsupportedError,
    first_line,
    pip_install,
)
from langchain_quantllm.loading.checkpoint import (
    PROCESSOR_FILES,
    Checkpoint,
    explain,
    has_feature_extractor,
    has_image_processor,
    hears_sounds,
    reads_images,
    reads_text,
)
from langchain_quantllm.loading.hub import Repository, hub_options
from langchain_quantllm.loading.parts import ModelParts
from langchain_quantllm.loading.pieces import piece_ids
from langchain_quantllm.loading.spec import LoadSpec

_PILLOW = "langchain-quantllm[vision]"


class Media(NamedTuple):
    """What a prompt holds beside its text: Pillow images, and samples of sounds, in the order of their placeholders."""

    images: tuple[Any, ...] = ()
    sounds: tuple[Any, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.images or self.sounds)


NO_MEDIA = Media()


def load_processor(spec: LoadSpec, checkpoint: Checkpoint) -> Any:
    """Load the processor of a checkpoint that reads images or hears sounds.

    Args:
        spec: The options of loading.
        checkpoint: The checkpoint.

    Returns:
        A transformers processor; None if the checkpoint is loaded for text only: because it takes nothing else, or
        because images cannot be read here.

    Raises:
        CheckpointError: If the processor is missing where the model needs one, or cannot be read.
        MissingPackageError: If it needs a package that is not installed.
    """
    if not reads_images(checkpoint.config):
        return _load_hearing(spec, checkpoint) if hears_sounds(checkpoint.config) else None
    if not is_installed("PIL"):
        if reads_text(checkpoint.config):
            return None
        msg = f"{_described(spec, checkpoint)} needs pillow: {pip_install(_PILLOW)}"
        raise MissingPackageError(msg)
    place = _find(spec, checkpoint)
    if place is None:
        if reads_text(checkpoint.config):
            return None
        msg = (
            f"{_described(spec, checkpoint)} has no image processor ({' or '.join(PROCESSOR_FILES)}); copy these files "
            "from where the model comes from."
        )
        raise CheckpointError(msg)
    from transformers import AutoProcessor

    source, hub = place
    with _processor_errors(spec):
        try:
            return AutoProcessor.from_pretrained(source, **hub)
        except ImportError as error:
            kind = processor_class(type(checkpoint.config))
            is_torchvision = "torchvision" in str(error).lower() and not is_installed("torchvision")
            if not is_torchvision or kind is None or not _works_without_videos(kind):
                raise
            loaded = [load and load(source, **hub) for load in map(_part_loaders().get, processor_parts(kind))]
            return make_processor(kind, loaded, source, **hub)


def _load_hearing(spec: LoadSpec, checkpoint: Checkpoint) -> Any:
    """Load the processor of a checkpoint that hears sounds and reads no images."""
    from transformers import AutoProcessor

    place = _find(spec, checkpoint)
    if place is None:
        msg = (
            f"{_described(spec, checkpoint)} has no feature extractor ({' or '.join(PROCESSOR_FILES)}); copy these "
            "files from where the model comes from."
        )
        raise CheckpointError(msg)
    source, hub = place
    with _processor_errors(spec):
        return AutoProcessor.from_pretrained(source, **hub)


def _described(spec: LoadSpec, checkpoint: Checkpoint) -> str:
    return f"{spec.model_id}, a {checkpoint.config.model_type!r} model, which reads text through its processor,"


def _find(spec: LoadSpec, checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """Find the files of a processor: returns their source, and the Hub's options for it."""
    from huggingface_hub.constants import is_offline_mode

    if checkpoint.local:
        folder = Path(checkpoint.source)
        if has_image_processor(folder) or (hears_sounds(checkpoint.config) and has_feature_extractor(folder)):
            return checkpoint.source, hub_options(spec, checkpoint.source)
        if spec.local_files_only or is_offline_mode() or Path(spec.model_id).expanduser().is_dir():
            return None
    # The cached copy of a commit may lack these files, if the model was loaded for text before.
    revision = Path(checkpoint.source).name if checkpoint.local else spec.revision
    for name in PROCESSOR_FILES:
        with contextlib.suppress(ModelNotFoundError):
            Repository.of(spec, revision=revision).fetch(name)
            return spec.model_id, hub_options(dataclasses.replace(spec, revision=revision), None)
    return None


def _works_without_videos(kind: Any) -> bool:
    """Say whether a class of processors needs torchvision for its video part only, as in Qwen-VL."""
    names = processor_parts(kind)
    return "video_processor" in names and set(names) <= _part_loaders().keys()


def _part_loaders() -> dict[str, Any]:
    """Return the functions that load the parts of a processor without torchvision; None for the video part."""
    from transformers import AutoFeatureExtractor, AutoTokenizer

    return {
        "tokenizer": AutoTokenizer.from_pretrained,
        "feature_extractor": AutoFeatureExtractor.from_pretrained,
        "image_processor": load_image_processor,
        "video_processor": None,
    }


@contextlib.contextmanager
def _processor_errors(spec: LoadSpec) -> Iterator[None]:
    """Turn errors while a processor is read into this package's; a missing package is not always an ImportError."""
    try:
        yield
    except (ImportError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        package = next((name for name in ("torchvision", "num2words") if name in str(error).lower()), None)
        lacks_torchvision = package == "torchvision" and not is_installed("torchvision")
        if not isinstance(error, ImportError) and not lacks_torchvision:
            raise CheckpointError(explain(spec, error, "processor")) from error
        if package is None:
            msg = f"the processor of {spec.model_id} needs a package: {first_line(error)}"
        else:
            wanted = _torchvision() if package == "torchvision" else package
            msg = f"the processor of {spec.model_id} needs {package}: {pip_install(wanted)}"
        raise MissingPackageError(msg) from error


def _torchvision() -> str:
    """Return the requirement of the torchvision made for this PyTorch; another one would replace PyTorch."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return f"torchvision==0.{int(minor) + 15}.*" if major == "2" else "torchvision"


def no_media_reason(parts: ModelParts, kind: Literal["image", "sound"], message: int) -> QuantLLMError | None:
    """Return the error for a loaded model that could take images or sounds, but for its processor; None if it can.

    Args:
        parts: The parts of a model that `reads_images`, or `hears_sounds`.
        kind: What is to be taken.
        message: Number of the message that holds it.
    """
    if kind == "sound":
        if getattr(parts.processor, "feature_extractor", None) is not None:
            return None
        return UnsupportedError(
            f"message {message} holds a sound, and the model was loaded without the feature extractor that sounds "
            f"need; add {' or '.join(PROCESSOR_FILES)} to its folder."
        )
    if getattr(parts.processor, "image_processor", None) is not None:
        return None
    if not is_installed("PIL"):
        return MissingPackageError(
            f"message {message} holds an image, which needs pillow: {pip_install(_PILLOW)}; then load the model again."
        )
    return UnsupportedError(
        f"message {message} holds an image, and the model was loaded without the processor that images need; add "
        f"{' or '.join(PROCESSOR_FILES)} to its folder, or make your pipeline for the task 'image-text-to-text'."
    )


def process(
    processor: Any, pieces: Sequence[str], media: Media, *, add_special_tokens: bool
) -> tuple[list[int], dict[str, Any]]:
    """Turn a prompt, its images and its sounds into a model's inputs.

    Args:
        processor: A transformers processor.
        pieces: The prompt, with a placeholder for each image and sound, in pieces of which none shares a token with the
            next.
        media: The images and sounds, in the placeholders' order.
        add_special_tokens: Let the tokenizer add its begin token.

    Returns:
        The token ids, in which each placeholder is expanded to the tokens of what it stands for, and the other inputs,
        such as `pixel_values`, by their names.

    Raises:
        InvalidOptionError: If the processor rejects them.
    """
    cut = f"Qz{secrets.token_hex(8)}e"
    if len(pieces) > 1:  # the processor takes the text as one

        def encode(text: str) -> list[int]:
            return piece_ids(processor.tokenizer, text.split(cut), add_special_tokens=add_special_tokens)

        reader = with_encoder(processor, encode)
    else:
        reader = processor
    try:
        inputs = dict(
            reader(
                text=[cut.join(pieces)],
                return_tensors="pt",
                add_special_tokens=add_special_tokens,
                **_given_media(processor, media),
            )
        )
    except (ValueError, TypeError, IndexError, RuntimeError, StopIteration) as error:
        kind, noun = ("image", "an image") if media.images else ("audio", "a sound")
        token = getattr(processor, f"{kind}_token", None)
        hint = f"; is {token!r}, which stands for {noun}, in the text of a message?" if token else ""
        what = "images" if media.images else "sounds"
        msg = f"the model's processor does not take this prompt with its {what}: {first_line(error)}{hint}"
        raise InvalidOptionError(msg) from error
    del inputs["attention_mask"]  # all ones: the prompt is alone
    return inputs.pop("input_ids")[0].tolist(), inputs


def _given_media(processor: Any, media: Media) -> dict[str, Any]:
    """Return the arguments for images, of which a processor takes a list for each prompt, and for sounds."""
    given: dict[str, Any] = {"images": [list(media.images)]} if media.images else {}
    if media.sounds:
        given |= {"audio": list(media.sounds), "sampling_rate": processor.feature_extractor.sampling_rate}
    return given
