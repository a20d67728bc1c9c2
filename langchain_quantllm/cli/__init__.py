"""The command line, `langchain-quantllm`: a module for each command or group of commands.

Prints everything that the package prints. It shows the results of the public classes and functions; it loads and
computes nothing itself.
"""

from langchain_quantllm.cli import bench, checkpoints, compare, doctor, memory, run  # noqa: F401
from langchain_quantllm.cli.console import app

__all__ = ["app"]
