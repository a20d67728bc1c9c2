"""Virtual environments of this project: torch's build for CPUs, packages with exact versions and hashes, the package.

    python tools/environment.py VENV LOCK    # such as .venv requirements/test.txt

Run with any Python from 3.10; uses nothing but the standard library.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of builds for CPUs. On Linux, PyPI has only builds for GPUs, which require gigabytes more."""


class Environment:
    """A virtual environment, made where it is missing.

    Args:
        folder: Where it is.
        variables: Environment variables for pip beside those of this process.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        """Make the environment, if it is not there."""
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self._variables = {**os.environ, **(variables or {})}
        if not self.python.is_file():
            venv.create(folder, with_pip=True)

    def pip_install(self, *arguments: str, quiet: bool = False) -> bool:
        """Run `pip install`; False if it fails and `quiet` is set, which also hides what it says.

        Raises:
            SystemExit: If it fails and `quiet` is not set.
        """
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
        hidden = subprocess.DEVNULL if quiet else None
        code = subprocess.run(command, env=self._variables, cwd=ROOT, stderr=hidden, check=False).returncode
        if code and not quiet:
            raise SystemExit(f"pip install {' '.join(arguments)} failed")
        return code == 0

    def install_torch(self, cpu: Sequence[str], ordinary: str) -> None:
        """Install the build of torch for CPUs, from where pip looks or from PyTorch's own index; else the ordinary one.

        Args:
            cpu: What pip is given to find the build for CPUs.
            ordinary: The requirement for a build with all that it requires.
        """
        if self.pip_install("--no-deps", *cpu, quiet=True):
            return
        if self.pip_install("--no-deps", "--retries", "1", "--index-url", CPU_INDEX, *cpu, quiet=True):
            return
        print(f"There is no build of torch for CPUs within reach; installing {ordinary}, which can take gigabytes.")
        self.pip_install(ordinary)

    def install_lock(self, lock: Path) -> None:
        """Install the packages of a lock file, whose hashes pip compares."""
        self.pip_install("--no-deps", "--require-hashes", "--requirement", str(lock))

    def install_package(self) -> None:
        """Install this checkout, editable, without looking at what it requires."""
        self.pip_install("--no-deps", "--no-build-isolation", "--editable", ".")


def locked_torch() -> str:
    """Version of torch in requirements/torch.txt, without the suffix of a build."""
    found = re.search(r"^torch==([\d.]+)", (ROOT / "requirements/torch.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("requirements/torch.txt names no version of torch")
    return found[1]


def main(folder: str, lock: str) -> None:
    """Make the environment of a lock file."""
    environment = Environment(Path(folder))
    environment.install_torch(
        ["--require-hashes", "--requirement", "requirements/torch.txt"], f"torch=={locked_torch()}"
    )
    environment.install_lock(Path(lock))
    environment.install_package()


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036  (it says so to an older one)
        raise SystemExit("Python 3.10 or newer is needed: make PYTHON=python3.12")
    main(*sys.argv[1:])
