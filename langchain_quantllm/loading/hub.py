"""Asking the Hugging Face Hub: whether it can be reached, before anything waits for it.

huggingface_hub asks six times with pauses of 23 s in all where there is no connection. Owns one question before its
own, which waits only for a Hub that answers slowly.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

_PAUSE_S = 1.0
"""Before the one further try, for a connection that comes back at once."""


def check_reachable(repository: str, *, revision: str | None = None, token: str | None = None) -> None:
    """Ask the Hub for the head of a repository's config, to learn whether there is a connection at all.

    What the Hub answers is not looked at, nor that it takes its time: whoever fetches a file next is told.

    Raises:
        ConnectionError: If no connection comes about, a second later neither.
    """
    import httpx
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    for is_last in (False, True):
        try:
            url = hf_hub_url(repository, "config.json", revision=revision)
            get_hf_file_metadata(url, token=token, timeout=HF_HUB_ETAG_TIMEOUT)
        except httpx.ConnectTimeout as error:
            msg = f"no answer within {HF_HUB_ETAG_TIMEOUT} s, which HF_HUB_ETAG_TIMEOUT raises"
            raise ConnectionError(msg) from error
        except (httpx.ConnectError, httpx.ProxyError) as error:
            if is_last:
                raise ConnectionError(str(error)) from error
            time.sleep(_PAUSE_S)
            continue
        except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError):
            pass
        return


def fetch(repository: str, name: str, *, token: str | None = None, revision: str | None = None, **options: Any) -> Path:
    """Bring a file from the Hub, or find it in its cache.

    Args:
        repository: Its name.
        name: Of the file.
        token: Access token.
        revision: Branch, tag or commit.
        **options: Others of `hf_hub_download`.

    Raises:
        OSError: As `hf_hub_download` raises it, its errors of the Hub among them; `ConnectionError` if there is no
            connection, within seconds.
    """
    import httpx
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.constants import is_offline_mode

    cached = try_to_load_from_cache(repository, name, cache_dir=options.get("cache_dir"), revision=revision)
    if not (isinstance(cached, str) or options.get("local_files_only") or is_offline_mode()):
        check_reachable(repository, revision=revision, token=token)
    try:
        return Path(hf_hub_download(repository, name, revision=revision, token=token, **options))
    except httpx.TransportError as error:  # which huggingface_hub passes on where a proxy cannot be reached
        if isinstance(cached, str):
            return Path(cached)
        raise ConnectionError(str(error)) from error
