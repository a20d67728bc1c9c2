"""Virtual environments of this project: torch's build for CPUs, packages with exact versions and hashes, the package.

    python tools/environment.py VENV LOCK    # such as .venv requirements/test.txt

Run with Python 3.10 to 3.13, for which the locks hold hashes; uses nothing but the standard library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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
        """Make the environment, if it is not there or has no pip.

        Raises:
            SystemExit: If Python cannot make one.
        """
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self._variables = {**os.environ, **(variables or {})}
        if self.python.is_file() and self._run("--version").returncode == 0:
            return
        shutil.rmtree(folder, ignore_errors=True)
        if subprocess.run([sys.executable, "-m", "venv", str(folder)], check=False).returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise SystemExit("Python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run pip, and keep what it says."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(
            command,
            env=self._variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def pip_install(self, *arguments: str) -> None:
        """Run `pip install`.

        Raises:
            SystemExit: If it fails, with the end of what it says.
        """
        if not self._found(*arguments):
            raise SystemExit(f"pip install {' '.join(arguments)} finds no such version, or none that fits the others")

    def _found(self, *arguments: str) -> bool:
        """Run `pip install`; False where no index that it asks has such a version."""
        done = self._run("install", "--quiet", *arguments)
        # With constraints in pip's settings, it says of a version that it does not find that it conflicts with them.
        lacks = any(text in done.stdout for text in ("No matching distribution found", "ResolutionImpossible"))
        if done.returncode and not lacks:
            end = "\n".join(done.stdout.strip().splitlines()[-20:])
            raise SystemExit(f"pip install {' '.join(arguments)} failed:\n{end}")
        return done.returncode == 0

    def install_torch(self, cpu: Sequence[str], ordinary: str) -> None:
        """Install the build of torch for CPUs, from where pip looks or from PyTorch's own index; else the ordinary one.

        Args:
            cpu: What pip is given to find the build for CPUs.
            ordinary: The requirement for a build with all that it requires.
        """
        names_build = sys.platform != "linux" or "torch" not in cpu  # else where pip looks is a build for GPUs
        if names_build and self._found("--no-deps", *cpu):
            return
        if self._found("--no-deps", "--retries", "1", "--index-url", CPU_INDEX, *cpu):
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
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise SystemExit("The locks are for Python 3.10 to 3.13; name one of these: make PYTHON=python3.12")
    main(*sys.argv[1:])
