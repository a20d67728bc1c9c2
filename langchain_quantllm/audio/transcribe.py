"""Turning pieces of sound into text by Whisper.

Owns the windows: which parts of which pieces go through the model together, and where the next window begins. The
rules for one window, retries and the threshold for speech among them, are transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.audio.pieces import Piece
from langchain_quantllm.compat import transformers_whisper as whisper
from langchain_quantllm.errors import InvalidOptionError, NotEnoughMemoryError, UnsupportedError, nearest
from langchain_quantllm.loading.devices import release_memory

WINDOW_S = 30.0
"""Seconds of a window of Whisper's."""

TASKS = ("transcribe", "translate")
"""Values of `task`."""

_SHORTEST_S = 0.2
"""A rest of a piece that is shorter holds no word."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of speech.

    Args:
        start_s: Where it begins in the sound, in seconds.
        end_s: Where it ends.
        text: Its text, as the model wrote it: with a space before it in languages that have spaces.
    """

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True, kw_only=True)
class TranscriptionOptions:
    """How speech is written down.

    Args:
        language: The language that is spoken, by its code or its English name; None detects it.
        task: `"transcribe"`, or `"translate"` into English.
        prompt: A text in whose style, and with whose names, the model goes on.
        num_beams: Beams of the search; 1 is greedy.
        temperatures: The temperature of the first try, and those of further tries for a window whose text repeats
            itself or is unlikely.
        compression_ratio: Above it, a text repeats itself.
        logprob: Mean log probability of a token below which a text is unlikely.
        no_speech: Probability of silence above which an unlikely text is left out.

    Raises:
        InvalidOptionError: If a value is not allowed.
    """

    language: str | None = None
    task: str = "transcribe"
    prompt: str | None = None
    num_beams: int = 1
    temperatures: tuple[float, ...] = (0.0,)
    compression_ratio: float = 1.35
    logprob: float = -1.0
    no_speech: float = 0.6

    def __post_init__(self) -> None:
        """Check what needs no model."""
        if self.task not in TASKS:
            msg = f"task={self.task!r} is not known{nearest(str(self.task), TASKS)}"
            raise InvalidOptionError(msg)
        if self.num_beams < 1:
            msg = f"num_beams={self.num_beams} is not allowed; it must be 1 or more."
            raise InvalidOptionError(msg)
        if not self.temperatures or any(not 0 <= t <= 2 for t in self.temperatures):
            msg = (
                f"temperature={self.temperatures!r} is not allowed; give numbers from 0 to 2, such as (0.0, 0.4, 0.8)."
            )
            raise InvalidOptionError(msg)

    def for_model(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Return the arguments of Whisper's `generate`, but for the language.

        Raises:
            InvalidOptionError: If the model takes no such task or prompt.
            UnsupportedError: If its generation config is too old for timestamps.
        """
        if not whisper.writes_timestamps(model):
            msg = (
                "the model's generation_config.json lacks no_timestamps_token_id, so it writes no timestamps; copy the "
                "file of the Whisper that it was trained from."
            )
            raise UnsupportedError(msg)
        given: dict[str, Any] = {"num_beams": self.num_beams}
        if whisper.languages_of(model):
            given["task"] = self.task
        elif self.task == "translate":
            msg = "task='translate' needs a multilingual Whisper, and this one knows English only."
            raise InvalidOptionError(msg)
        if self.prompt:
            given["prompt_ids"] = self._prompt_ids(model, tokenizer)
        return given

    def _prompt_ids(self, model: Any, tokenizer: Any) -> Any:
        ids = whisper.prompt_ids(tokenizer, self.prompt or "")
        most = model.config.max_target_positions // 2 - 1
        if len(ids) > most:
            msg = f"prompt has {len(ids)} tokens, and Whisper takes {most}; give a shorter one."
            raise InvalidOptionError(msg)
        return ids.to(model.device)


def language_code(model: Any, language: str) -> str:
    """Return the code of a language that a model knows.

    Args:
        model: A Whisper.
        language: A code such as `"en"`, or a name such as `"English"`.

    Raises:
        InvalidOptionError: If the model does not know it.
    """
    names, known = whisper.language_names(), list(whisper.languages_of(model)) or ["en"]
    code = language.strip().lower()
    code = names.get(code, code)
    if code not in known:
        if known == ["en"]:
            msg = f"language={language!r} needs a multilingual Whisper, and this one knows English only."
        else:
            spoken = [name for name, known_code in names.items() if known_code in known]
            hint = nearest(code, [*known, *spoken])
            hint = hint if hint.startswith("; did") else "; give a code such as 'en', or a name such as 'english'."
            msg = f"language={language!r} is not one of the model's {len(known)}{hint}"
        raise InvalidOptionError(msg)
    return code


class Transcriber:
    """Whisper with the options of one sound, whose language it finds in the first piece with sound.

    Attributes:
        language: The code of the language; None before the first piece with sound.
    """

    def __init__(self, pipeline: Any, options: TranscriptionOptions) -> None:
        """Check the options against the model.

        Args:
            pipeline: A pipeline for automatic-speech-recognition over a Whisper.
            options: How speech is written down.

        Raises:
            InvalidOptionError: If the model does not take an option.
        """
        self._model, self._tokenizer, self._features = pipeline.model, pipeline.tokenizer, pipeline.feature_extractor
        self._options = options
        self._arguments = options.for_model(self._model, self._tokenizer)
        self.language: str | None = None
        if options.language is not None:
            self.language = language_code(self._model, options.language)
        elif not whisper.languages_of(self._model):
            self.language = "en"

    def transcribe(self, pieces: Sequence[Piece]) -> list[list[Segment]]:
        """Write down pieces, all of them in one batch.

        Args:
            pieces: Pieces of the sound, of `WINDOW_S` seconds at most.

        Returns:
            The segments of each piece, in their order; none for silence.

        Raises:
            NotEnoughMemoryError: If a single window does not fit.
        """
        found: list[list[Segment]] = [[] for _ in pieces]
        rests: Mapping[int, Piece] = {i: piece.from_first_sound() for i, piece in enumerate(pieces)}
        while waiting := {i: rest for i, rest in rests.items() if _may_have_speech(rest)}:
            windows = list(waiting.values())
            rests = {}
            for (i, rest), heard in zip(waiting.items(), self._windows(windows), strict=True):
                found[i] += _segments(heard, rest)
                if heard and heard[-1].is_cut and heard[-1].end_s > 0:
                    rests[i] = rest.after(heard[-1].end_s)
        return found

    def _windows(self, windows: Sequence[Piece]) -> list[list[whisper.SpokenSegment]]:
        """Run the model over windows; in halves where they do not fit into the memory together."""
        import torch

        try:
            return self._listen(windows)
        except torch.OutOfMemoryError as error:
            half = len(windows) // 2
            if not half:
                msg = (
                    "the device ran out of memory over 30 seconds of sound; use a scheme of fewer bits, or num_beams=1."
                )
                raise NotEnoughMemoryError(msg) from error
        release_memory()
        return [*self._windows(windows[:half]), *self._windows(windows[half:])]

    def _listen(self, windows: Sequence[Piece]) -> list[list[whisper.SpokenSegment]]:
        """Write down windows; those whose text repeats itself or is unlikely again, at the next temperature.

        Source: `transcribe` in openai/whisper, and `generate_with_fallback` in transformers, which would run the
        encoder a second time to learn whether a window has speech, and again for each try.
        """
        options = self._options
        states = whisper.encode(self._model, self._inputs(windows))
        language, silences = whisper.first_impression(self._model, states)
        self.language = self.language or language
        arguments = {**self._arguments, **({} if language is None else {"language": self.language})}
        found: list[list[whisper.SpokenSegment]] = [[] for _ in windows]
        tries = list(range(len(windows)))
        for temperature in options.temperatures:
            again = []
            for i, heard in zip(tries, self._try(states[tries], arguments, temperature), strict=True):
                is_unlikely = heard.logprob < options.logprob
                is_silence = is_unlikely and silences[i] > options.no_speech
                found[i] = [] if is_silence else heard.segments
                if not is_silence and (is_unlikely or heard.compression_ratio > options.compression_ratio):
                    again.append(i)
            if not (tries := again):
                break
        return found

    def _try(self, states: Any, arguments: Mapping[str, Any], temperature: float) -> list[whisper.HeardWindow]:
        if temperature:  # sampling takes no beams
            arguments = {**arguments, "num_beams": 1}
        return whisper.listen(self._model, self._tokenizer, states, arguments, temperature)

    def _inputs(self, windows: Sequence[Piece]) -> Any:
        samples = [window.samples for window in windows]
        made = self._features(samples, sampling_rate=windows[0].rate, return_tensors="pt")
        return made["input_features"].to(self._model.device, self._model.dtype)


def _may_have_speech(rest: Piece) -> bool:
    return rest.duration_s >= _SHORTEST_S and not rest.is_silent()


def _segments(heard: Sequence[whisper.SpokenSegment], rest: Piece) -> list[Segment]:
    """Place what was heard in a window into the sound; what lies in the silence behind the window is none of it."""
    return [
        Segment(
            start_s=round(rest.start_s + segment.start_s, 2),
            end_s=round(min(rest.start_s + segment.end_s, rest.end_s), 2),
            text=segment.text,
        )
        for segment in heard
        if segment.text.strip() and segment.start_s < rest.duration_s
    ]
