"""The sounds of messages: their sources, and reading them into samples.

`media` reads the bytes and `audio.decode` decodes them. Knows no message format, no template and no model.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar

from langchain_quantllm.audio.decode import Samples, check_decoder, open_sound
from langchain_quantllm.chat.fetching import FetchRules
from langchain_quantllm.chat.media import FETCH_S, PUBLIC, MediaSource, read_file


@dataclass(frozen=True, kw_only=True)
class SoundSource(MediaSource):
    """A sound in a message, not read yet."""

    noun: ClassVar[str] = "sound"
    example: ClassVar[str] = "audio/wav"


def read_sound(
    source: SoundSource, rate: int, longest_s: float, timeout_s: float = FETCH_S, rules: FetchRules = PUBLIC
) -> Samples:
    """Read a sound.

    Args:
        source: The sound in the message.
        rate: Samples a second that the model takes.
        longest_s: Most seconds that the model hears; it would leave out the rest.
        timeout_s: Seconds after which fetching ends with an error.
        rules: Where sounds may be fetched from.

    Returns:
        The samples of one channel: float32 of shape `(samples,)`.

    Raises:
        InvalidOptionError: If it cannot be fetched or decoded, is no sound, or lasts too long.
        MissingPackageError: If the decoder is not installed.
        UnsupportedError: If the source is of a kind that is not read here.
    """
    import numpy as np

    check_decoder(source.name)
    file = read_file(source, timeout_s, rules)
    limit = f"the {longest_s:g} seconds that the model hears"
    with open_sound(io.BytesIO(file.content), file.name, rate=rate, max_duration_s=longest_s, limit=limit) as sound:
        return np.concatenate(list(sound))
