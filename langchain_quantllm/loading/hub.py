"""Repositories on the Hugging Face Hub: their files, the cache of these on this machine, and errors in one sentence.

huggingface_hub tries six times, with pauses of 23 s in all, where there is no connection. So `Repository.fetch` sends
one request of its own first, which waits only for a Hub that answers slowly.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_quantllm.errors import ModelNotFoundError, QuantLLMError, first_line
from langchain_quantllm.loading.sources import wrong_files
from langchain_quantllm.loading.spec import LoadSpec

_PAUSE_S = 1.0
"""Before the second and last try, for a connection that comes back at once."""

_NO_CHECKPOINT = "it is not a transformers checkpoint"


class MissingFileError(ModelNotFoundError):
    """The repository, or its copy in the cache where the Hub cannot be asked, has no such file."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository on the Hub.

    Args:
        name: Such as `"Qwen/Qwen3-8B"`.
        revision: Branch, tag or commit; None is the main branch.
        token: Access token.
        cache_dir: Folder in which files are kept; None is the Hub's own.
        local_files_only: Never ask the Hub.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_files_only: bool = False

    @classmethod
    def of(cls, spec: LoadSpec, *, revision: str | None = None) -> Repository:
        """Return the repository that a spec's model id names, at another revision if one is given."""
        return cls(
            name=spec.model_id,
            revision=revision or spec.revision,
            token=spec.token,
            cache_dir=spec.cache_dir,
            local_files_only=bool(spec.local_files_only),
        )

    def cached(self, file: str) -> Path | None:
        """Return the path of a file in the cache; None if it is not there."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(self.name, file, cache_dir=self.cache_dir, revision=self.revision)
        except HFValidationError:
            return None
        return Path(found) if isinstance(found, str) else None

    def fetch(self, file: str, *, if_missing: str = _NO_CHECKPOINT, check_connection: bool = False) -> Path:
        """Download a file, or find it in the cache.

        Args:
            file: Name of the file.
            if_missing: Conclusion for the error if the repository has no such file.
            check_connection: Ask the Hub even if the file is cached, for callers that need further files.

        Raises:
            MissingFileError: If the repository has no such file, or the Hub cannot be asked and the cache has none.
            ModelNotFoundError: If there is no such repository, or the Hub refuses it, or cannot be asked.
        """
        import httpx
        from huggingface_hub import errors, hf_hub_download

        cached, offline = self.cached(file), self._offline()
        if check_connection and offline:
            raise ModelNotFoundError(f"{self.name} {_may_not_ask(offline)}")
        options = {"cache_dir": self.cache_dir, "local_files_only": self.local_files_only}
        try:
            if check_connection or (cached is None and not offline):
                self._check_reachable()
            return Path(hf_hub_download(self.name, file, revision=self.revision, token=self.token, **options))
        except (httpx.HTTPError, errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:
            if cached is not None and not check_connection and isinstance(error, httpx.TransportError):
                return cached  # huggingface_hub raises this one if a proxy does not answer
            kind = MissingFileError if isinstance(error, errors.EntryNotFoundError) else ModelNotFoundError
            raise kind(f"{self.name} {self._reason(error, file, if_missing)}") from error

    def list_files(self) -> list[str]:
        """List the names of the repository's files.

        Raises:
            ModelNotFoundError: If there is no such repository, or the Hub refuses it, or cannot be asked.
        """
        import httpx
        from huggingface_hub import HfApi

        try:
            return list(HfApi(token=self.token).list_repo_files(self.name, revision=self.revision))
        except (httpx.HTTPError, OSError) as error:
            raise ModelNotFoundError(f"{self.name} {self._reason(error, '', '')}") from error

    def wrong_repository(self, config: Path | None, *, task: str = "text") -> QuantLLMError | None:
        """Return the error if the repository's files are no checkpoint of a task; see `wrong_files`.

        Args:
            config: Its config.json; None if it has none.
            task: The task of the `LoadSpec`.
        """

        def read(name: str) -> Mapping[str, Any]:
            path = config if name == "config.json" and config is not None else self.fetch(name)
            content = json.loads(path.read_text("utf-8"))
            return content if isinstance(content, dict) else {"": content}

        with contextlib.suppress(OSError, ValueError):  # the answer is a hint only
            files = [*self.list_files(), *(["config.json"] if config is not None else [])]
            return wrong_files(self.name, files, read, is_local=False, task=task) if files else None
        return None

    def _offline(self) -> str | None:
        """Return the setting that forbids asking the Hub; None if there is none."""
        from huggingface_hub.constants import is_offline_mode

        if self.local_files_only:
            return "local_files_only=True"
        return "HF_HUB_OFFLINE" if is_offline_mode() else None

    def _reason(self, error: Exception, file: str, if_missing: str) -> str:
        """Return the end of an error's sentence, after the repository's name."""
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return "is gated; accept its terms on its page on the Hub and pass token=, or set HF_TOKEN."
        if isinstance(error, errors.RevisionNotFoundError):
            return f"has no revision {self.revision!r}; check its branches, tags and commits."
        if isinstance(error, errors.RepositoryNotFoundError):
            return "is neither a folder here nor a repository on the Hub; a private one needs token= or HF_TOKEN."
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return f"has no {file}; {if_missing}."
        if isinstance(error, errors.HFValidationError):
            return "is neither a folder here nor a repository's name, which looks like 'owner/name'."
        if offline := self._offline():
            return _may_not_ask(offline)
        return (
            f"is not, or not wholly, on this machine and the Hub could not be asked ({first_line(error)}); check the "
            "connection, or give a local folder."
        )

    def _check_reachable(self) -> None:
        """Request the head of the config, to learn whether there is a connection at all.

        The Hub's answer does not matter, nor a slow one: the download that follows raises its own errors.

        Raises:
            ConnectionError: If there is no connection, and none a second later.
        """
        import httpx
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        for is_last in (False, True):
            try:
                url = hf_hub_url(self.name, "config.json", revision=self.revision)
                get_hf_file_metadata(url, token=self.token, timeout=HF_HUB_ETAG_TIMEOUT)
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


def _may_not_ask(setting: str) -> str:
    return f"is not, or not wholly, on this machine, and the Hub may not be asked ({setting}); give a local folder."


def hub_options(spec: LoadSpec, folder: str | None) -> dict[str, Any]:
    """Return the options of `from_pretrained` about the Hub; for a folder, that the Hub is not asked."""
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if folder is not None:
        return {**options, "local_files_only": True}
    given = {
        "revision": spec.revision,
        "token": spec.token,
        "cache_dir": spec.cache_dir,
        "local_files_only": spec.local_files_only or None,
    }
    return {**options, **{k: v for k, v in given.items() if v is not None}}
