"""`QuantizedHuggingFaceEmbeddings`: a quantized embedding model as LangChain's `Embeddings`.

Owns the way from LangChain's calls to the operation of an encoder, and from its vectors to lists of numbers. Prompts,
pooling and normalization are those of the model's own files, which sentence-transformers reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from langchain_core.embeddings import Embeddings
from pydantic import Field, model_validator
from typing_extensions import Self

from langchain_quantllm.base.aside import run_aside
from langchain_quantllm.base.encoder_fields import EncoderFields
from langchain_quantllm.base.progress import progress_bar
from langchain_quantllm.chat.image_files import read_images
from langchain_quantllm.compat.sentence_transformers import modalities_of, normalizes, prompts_of, reads, vector_size
from langchain_quantllm.encoders.arguments import translate_arguments
from langchain_quantllm.encoders.embedding import SDPA_KERNELS, Embed
from langchain_quantllm.encoders.registry import LoadedEncoder
from langchain_quantllm.encoders.vectors import VectorForm
from langchain_quantllm.encoders.work import Work
from langchain_quantllm.errors import (
    InvalidOptionError,
    UnsupportedError,
    nearest,
)

_PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Names of the model's own prompts that are used without being asked for, the first that is set.

Source: `encode_query` and `encode_document` of sentence-transformers.
"""

_FEW_VECTORS = 64
"""Vectors up to this number are turned into lists on the event loop."""


class QuantizedHuggingFaceEmbeddings(EncoderFields, Embeddings):
    """A quantized embedding model of the Hugging Face Hub, run in this process, as LangChain's `Embeddings`.

    Setup:
        ```bash
        pip install "langchain-quantllm[rag]"
        ```

    Key init args:
        model_id: A folder, or the name of a repository on the Hub; `model_name` is the same.
        quantization: `"int8"`, `"nf4"`, `"fp4"`, `"none"`. Small models gain from 16 bits (`dtype="bfloat16"`) most of
            what there is to gain; large ones, such as Qwen3-Embedding, from int8 or nf4.
        query_prompt, document_prompt: Texts before queries and documents; None takes the model's own.
        truncate_dim: First numbers of each vector that are kept.

    Instantiate:
        ```python
        from langchain_quantllm import QuantizedHuggingFaceEmbeddings

        embeddings = QuantizedHuggingFaceEmbeddings(model_id="Qwen/Qwen3-Embedding-0.6B", quantization="nf4")
        ```

    Embed:
        ```python
        vectors = embeddings.embed_documents(["Paris is the capital of France.", "Bananas are yellow."])
        vector = embeddings.embed_query("What is the capital of France?")
        ```

    Async:
        ```python
        vector = await embeddings.aembed_query("What is the capital of France?")
        ```

    Pictures, with a model that reads them, such as CLIP or SigLIP:
        ```python
        embeddings = QuantizedHuggingFaceEmbeddings(model_id="sentence-transformers/clip-ViT-B-32")
        vectors = embeddings.embed_images(["dog.jpg", "cat.png"])
        ```

    Memory:
        ```python
        print(embeddings.memory_report())
        ```

    Coming from `HuggingFaceEmbeddings` of langchain-huggingface, change the class's name; its arguments are taken.
    Three things differ: queries and documents get the model's own prompts, line ends stay as they are, and one set of
    processes serves all calls.
    """

    pooling: str | None = None
    """How the vectors of tokens become that of a text, for a model whose files do not say it: `"mean"`, `"cls"`,
    `"lasttoken"`, ..."""
    query_prompt: str | None = None
    """Text before each query; None takes the model's own, `""` takes none."""
    query_prompt_name: str | None = None
    """Name of the model's prompt that stands before queries."""
    document_prompt: str | None = None
    """Text before each document; None takes the model's own, `""` takes none."""
    document_prompt_name: str | None = None
    """Name of the model's prompt that stands before documents."""
    normalize: bool | None = None
    """True gives every vector the length 1. None and False add nothing to what the model's own modules do; with None,
    the vectors of a model that normalizes get the length 1 again after `truncate_dim`."""
    truncate_dim: int | None = Field(default=None, ge=1)
    """Number of a vector's first numbers that are kept, for models that were trained for it (Matryoshka)."""
    output_precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] = "float32"
    """The numbers of a vector, to save room in a store; `binary` and `ubinary` are one number for eight dimensions."""
    output_ranges: list[list[float]] | None = None
    """The smallest and the largest value of each dimension, for `int8` and `uint8`; see `vector_ranges`. None is
    -1 to 1 for all."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of a text that are read; None is what the model reads."""
    on_too_long: Literal["truncate", "error"] = "truncate"
    """Cut a text that is too long, or raise a `PromptTooLongError`."""
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a batch, padding included; None is 4,096 on a CPU and 16,384 on others. It is halved where memory
    runs out, and doubled again after some batches that fit."""
    batch_size: int | None = Field(default=None, ge=1)
    """Most texts of a batch; None bounds the tokens alone."""
    sdpa_kernel: str | None = None
    """Kernel of PyTorch's attention: `"flash"`, `"efficient"`, `"cudnn"` or `"math"`; None leaves it to PyTorch."""
    show_progress: bool | None = None
    """Show a progress bar for documents: always, never, or (None) with `progress=True` after five seconds."""

    _kind: ClassVar[str] = "embedding"
    _several_devices: ClassVar[bool] = True

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        return super()._translate(translate_arguments(values))

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        for field in ("query_prompt", "document_prompt"):
            if getattr(self, field) is not None and getattr(self, f"{field}_name") is not None:
                msg = f"{field} and {field}_name say the same thing twice; give one of them."
                raise InvalidOptionError(msg)
        if self.sdpa_kernel not in (None, *SDPA_KERNELS):
            msg = f"sdpa_kernel={self.sdpa_kernel!r} is not known{nearest(str(self.sdpa_kernel), SDPA_KERNELS)}"
            raise InvalidOptionError(msg)
        ranges = self.output_ranges
        if ranges is not None and (len(ranges) != 2 or len(ranges[0]) != len(ranges[1])):
            msg = "output_ranges must be two lists: the smallest and the largest value of each dimension."
            raise InvalidOptionError(msg)
        if ranges is not None and not self.output_precision.endswith("int8"):
            msg = f"output_ranges has no effect on output_precision={self.output_precision!r}; leave it out."
            raise InvalidOptionError(msg)
        return self

    def load(self) -> Self:
        """Load the weights now instead of at the first use, on every device."""
        self._loaded().worker(self._devices()[1:]).prepare()
        return self

    # Texts.

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents.

        Args:
            texts: The documents. Longer ones than the model reads are cut, or an error; see `on_too_long`.

        Returns:
            A vector for each, in their order.

        Raises:
            InvalidOptionError: If an element is no text.
            PromptTooLongError: If a text is too long and `on_too_long="error"`.
            EncodingError: If the model failed.
        """
        return self._embed(self._check_texts(texts), "document")

    def embed_query(self, text: str) -> list[float]:
        """Embed a query.

        Args:
            text: The query.

        Returns:
            Its vector.

        Raises:
            InvalidOptionError: If it is no text.
            PromptTooLongError: If it is too long and `on_too_long="error"`.
            EncodingError: If the model failed.
        """
        return self._embed(self._check_texts([text]), "query")[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents without holding up the event loop; as `embed_documents`."""
        return await self._aembed(self._check_texts(texts), "document")

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a query without holding up the event loop; concurrent ones are computed in one batch."""
        return (await self._aembed(self._check_texts([text]), "query"))[0]

    # Pictures.

    def embed_images(self, images: Sequence[Any]) -> list[list[float]]:
        """Embed pictures into the space of the model's texts.

        Args:
            images: Paths, `data:` URLs in base64, bytes of files, or Pillow images. Nothing is fetched from a network.

        Returns:
            A vector for each, in their order.

        Raises:
            UnsupportedError: If the model reads no pictures, or an element is the URL of a server.
            InvalidOptionError: If a picture is missing, damaged or too large.
            EncodingError: If the model failed.
        """
        return self._embed(read_images(images), "image")

    def embed_image(self, image: Any = None, *, uris: Sequence[str] | None = None) -> Any:
        """Embed one picture.

        Args:
            image: As an element of `embed_images`.
            uris: Paths instead, as Chroma passes them.

        Returns:
            Its vector; for `uris` a list of vectors.
        """
        if uris is not None:
            return self.embed_images(uris)
        return self.embed_images([image])[0]

    async def aembed_images(self, images: Sequence[Any]) -> list[list[float]]:
        """Embed pictures without holding up the event loop; as `embed_images`."""
        return await self._aembed(await run_aside(read_images, images), "image")

    async def aembed_image(self, image: Any) -> list[float]:
        """Embed one picture without holding up the event loop; as `embed_image`."""
        return (await self.aembed_images([image]))[0]

    # The model.

    @property
    def vector_size(self) -> int:
        """Number of numbers in a vector, `truncate_dim` and `output_precision` included; loads the model if needed."""
        size = min(self.truncate_dim or 2**31, vector_size(self._loaded().model))
        return (size + 7) // 8 if self.output_precision.endswith("binary") else size

    def vector_ranges(self, texts: list[str]) -> list[list[float]]:
        """Compute the smallest and the largest value of each dimension over documents, for `output_ranges`.

        Args:
            texts: Documents like those that will be embedded, some thousand.
        """
        vectors = self._array(self._check_texts(texts), "document", precision="float32")
        return [vectors.min(axis=0).tolist(), vectors.max(axis=0).tolist()]

    # One way for all.

    def _embed(self, items: Sequence[Any], what: str) -> list[list[float]]:
        if not items:
            return []
        vectors: list[list[float]] = self._array(items, what).tolist()
        return vectors

    def _array(self, items: Sequence[Any], what: str, precision: str | None = None) -> Any:
        encoder = self._loaded()
        with self._progress(len(items), what) as progress:
            rows = self._submit(encoder, items, what, progress).result()
        return self._form(encoder, precision).apply(rows)

    async def _aembed(self, items: Sequence[Any], what: str) -> list[list[float]]:
        if not items:
            return []
        encoder = self._model
        if encoder is None or encoder.closed:
            encoder = await run_aside(self._loaded)
        with self._progress(len(items), what) as progress:
            work = self._submit(encoder, items, what, progress)
            rows = await asyncio.wrap_future(work.future)  # the end of the task cancels the work
        form = self._form(encoder)
        if len(rows) <= _FEW_VECTORS:
            return form.apply(rows).tolist()  # type: ignore[no-any-return]
        return await run_aside(lambda: form.apply(rows).tolist())

    def _submit(
        self, encoder: LoadedEncoder, items: Sequence[Any], what: str, progress: Callable[[int], None] | None
    ) -> Work:
        model = encoder.model
        is_image = what == "image"
        if model is not None and not reads(model, "image" if is_image else "text"):
            msg = (
                f"{self.model_id} reads no {'pictures' if is_image else 'texts'}; it reads "
                f"{', '.join(modalities_of(model))}."
            )
            raise UnsupportedError(msg)
        operation = Embed(
            prompt=None if is_image or model is None else self._prompt(model, what),
            task=None if is_image else what,
            max_length=self.max_length,
            cuts=self.on_too_long == "truncate",
            sdpa_kernel=self.sdpa_kernel,
            is_image=is_image,
        )
        return encoder.submit(
            operation,
            items,
            sizes=[0 if is_image else len(item) for item in items],
            most_tokens=self.max_batch_tokens,
            most_items=self.batch_size,
            progress=progress,
            further_devices=self._devices()[1:],
        )

    def _prompt(self, model: Any, what: str) -> str | None:
        """Return the text before queries or documents."""
        given: str | None = getattr(self, f"{what}_prompt")
        if given is not None:
            return given or None
        prompts = prompts_of(model)
        name = getattr(self, f"{what}_prompt_name")
        if name is None:
            return next((prompts[known] for known in _PROMPT_NAMES[what] if known in prompts), None)
        if name not in model.prompts:
            msg = f"{what}_prompt_name={name!r} is no prompt of {self.model_id}{nearest(name, prompts)}"
            raise InvalidOptionError(msg)
        return prompts.get(name)

    def _form(self, encoder: LoadedEncoder, precision: str | None = None) -> VectorForm:
        again = self.normalize is None and self.truncate_dim is not None
        ranges = None if self.output_ranges is None else (tuple(self.output_ranges[0]), tuple(self.output_ranges[1]))
        return VectorForm(
            size=self.truncate_dim,
            normalize=bool(self.normalize) or (again and encoder.model is not None and normalizes(encoder.model)),
            precision=precision or self.output_precision,
            ranges=ranges if precision is None else None,
        )

    def _check_texts(self, texts: Sequence[Any]) -> list[str]:
        if isinstance(texts, str):
            msg = f"embed_documents takes a list of texts, not the text {texts[:40]!r}; write [text], or embed_query."
            raise InvalidOptionError(msg)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                msg = f"element {index} of the texts is {type(text).__name__}, not a text; give str, or embed_images."
                raise InvalidOptionError(msg)
        return list(texts)

    def _progress(self, count: int, what: str) -> AbstractContextManager[Callable[[int], None] | None]:
        """Show a progress bar for documents and pictures inside the block."""
        show = False if what == "query" else self.show_progress
        return progress_bar(count, title="Embedding", unit=what, show=show, default=self.progress)
