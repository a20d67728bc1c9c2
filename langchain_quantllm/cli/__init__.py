"""The command line, `langchain-quantllm`: a module for each command or group of commands.

Prints everything that the package prints. It shows the results of the public classes and functions; it loads and
computes nothing itself.
"""

# In the order of the help.
from langchain_quantllm.cli import run, serving, memory, bench, compare, doctor, checkpoints  # noqa: F401, I001
from langchain_quantllm.cli.console import app

__all__ = ["app"]
