"""Speech as Documents: a LangChain parser of sound files over a quantized Whisper in this process."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from langchain_core.document_loaders import BaseBlobParser
from langchain_core.documents import Document
from langchain_core.documents.base import Blob
from typing_extensions import Self

from langchain_quantllm.audio.decode import SPEECH_RATE, Sound, open_sound
from langchain_quantllm.audio.pieces import Piece, cut
from langchain_quantllm.audio.transcribe import WINDOW_S, Segment, Transcriber
from langchain_quantllm.base.aside import run_aside
from langchain_quantllm.base.speech_fields import SpeechFields
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.loading.inputs import require_pipeline

_LONG_S = 60.0
"""Seconds of sound from which on the progress is shown."""


class QuantizedWhisperParser(BaseBlobParser, SpeechFields):
    """Parser of sound files into Documents, by a Whisper in int8, nf4, fp4 or 16 bits.

    Takes blobs of WAV, MP3, FLAC, M4A, OGG, WebM, and of videos, whose pictures it does not look at. `av` decodes them:
    `pip install "langchain-quantllm[audio]"`. A file is read, decoded and written down piece by piece, each of up to 30
    seconds and cut where the speaker pauses, so that its first Documents come while the rest is not even decoded, and
    an hour takes the memory of a minute. The weights are loaded at the first use and shared by all instances of
    the same settings.

    Parse:
        ```python
        from langchain_core.documents.base import Blob
        from langchain_quantllm import QuantizedWhisperParser

        parser = QuantizedWhisperParser(model="openai/whisper-large-v3-turbo", quantization="int8")
        for document in parser.lazy_parse(Blob.from_path("interview.mp3")):
            print(document.metadata["start_s"], document.page_content)
        ```

    With a loader:
        ```python
        loader = GenericLoader(FileSystemBlobLoader("talks", glob="*.mp3"), parser)
        ```

    Metadata of a Document:
        `source`, `start_s` and `end_s` in seconds, `duration_s` of the file where its header says it, `language` by its
        code, `model`, and what the blob's own metadata says. `damaged_at_s` is there where a part of the file could not
        be decoded.

    Silence gives no Document. A file that is no sound, empty, too long or wholly damaged raises an
    `InvalidOptionError`.
    """

    def lazy_parse(self, blob: Blob) -> Iterator[Document]:
        """Parse a sound, Document by Document as they are found.

        Args:
            blob: A file by its path, or its bytes.

        Raises:
            InvalidOptionError: If it is no sound, empty, too long or wholly damaged.
            QuantLLMError: If the model cannot be loaded.
        """
        name = f"the file {blob.source}" if blob.source else "the blob"
        with _opened(blob, name) as file, open_sound(file, name, max_duration_s=self.max_duration_s) as sound:
            transcriber = self._new_transcriber()
            texts: list[Segment] = []
            with _Progress(sound, shown=self.progress) as progress:
                for piece, segments in self._transcribed(transcriber, cut(sound, SPEECH_RATE, WINDOW_S)):
                    texts += segments
                    if self.per == "segment":
                        groups = [[segment] for segment in texts]
                    else:
                        groups = [texts] if texts and self.per == "piece" else []
                    for group in groups:
                        yield self._document(group, blob, sound, transcriber.language)
                    if self.per != "file":
                        texts = []
                    progress.advance(piece.end_s)
            if texts:
                yield self._document(texts, blob, sound, transcriber.language)

    async def alazy_parse(self, blob: Blob) -> AsyncIterator[Document]:
        """Parse a sound as `lazy_parse` does, in threads beside the event loop.

        A task that is cancelled ends at once; the piece in progress is the last.
        """
        found, using = self.lazy_parse(blob), threading.Lock()

        def step() -> Document | None:
            with using:
                return next(found, None)

        def close() -> None:
            with using:
                found.close()  # type: ignore[attr-defined]

        try:
            while (document := await run_aside(step)) is not None:
                yield document
        except BaseException:  # of the sound, or the end of the task, which does not wait for the piece
            threading.Thread(target=close, name="quantllm-close", daemon=True).start()
            raise

    async def aparse(self, blob: Blob) -> list[Document]:
        """Parse a sound as `parse` does, in a thread beside the event loop."""
        return [document async for document in self.alazy_parse(blob)]

    def _new_transcriber(self) -> Transcriber:
        return Transcriber(require_pipeline(self._loaded()), self._options())

    def _transcribed(self, transcriber: Transcriber, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, list[Segment]]]:
        """Write down pieces in batches; files that are parsed at the same time take turns."""
        model = self._loaded()
        lock: threading.Lock = model.remember(("speech", "lock"), threading.Lock)
        transcribe = in_clean_thread(transcriber.transcribe)
        while batch := list(islice(pieces, self.batch_size)):
            require_pipeline(model)  # it may have been unloaded meanwhile
            with lock:
                found = transcribe(batch)
            yield from zip(batch, found, strict=True)

    def _document(self, segments: Sequence[Segment], blob: Blob, sound: Sound, language: str | None) -> Document:
        metadata: dict[str, Any] = {
            **blob.metadata,
            "source": blob.source,
            "start_s": segments[0].start_s,
            "end_s": segments[-1].end_s,
            "duration_s": None if sound.duration_s is None else round(sound.duration_s, 2),
            "language": language,
            "model": self.model_id,
            "damaged_at_s": None if sound.damaged_at_s is None else round(sound.damaged_at_s, 2),
        }
        return Document(
            page_content="".join(segment.text for segment in segments).strip(),
            metadata={name: value for name, value in metadata.items() if value is not None},
        )

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Return the path by which `load` finds the class."""
        return ["langchain_quantllm", "speech"]


@contextlib.contextmanager
def _opened(blob: Blob, name: str) -> Iterator[BinaryIO]:
    """Open a blob's bytes: those in it, else those of its file."""
    if blob.data is None and blob.path is not None and not Path(blob.path).is_file():
        what = "is a folder" if Path(blob.path).is_dir() else "does not exist"
        msg = f"{name} {what}; give the path of a sound file on this machine, or its bytes with Blob.from_data."
        raise InvalidOptionError(msg)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(blob.as_bytes_io())
        except (OSError, NotImplementedError, ValueError) as error:
            msg = f"{name} cannot be read: {error}; give a file that may be read, or its bytes with Blob.from_data."
            raise InvalidOptionError(msg) from error
        yield file


class _Progress:
    """The progress bar of one sound, in seconds; none for a short one."""

    def __init__(self, sound: Sound, *, shown: bool) -> None:
        self._total_s = sound.duration_s
        self._is_shown = shown and (self._total_s is None or self._total_s >= _LONG_S)
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._is_shown:
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            total = None if self._total_s is None else math.ceil(self._total_s)
            self._bar = tqdm(total=total, unit="s", desc="Transcribing")
        return self

    def advance(self, to_s: float) -> None:
        """Show that the sound is written down up to a second."""
        if self._bar is not None:
            self._bar.update(round(to_s) - self._bar.n)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
