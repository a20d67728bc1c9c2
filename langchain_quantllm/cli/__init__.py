"""The command line, `langchain-quantllm`.

Owns all printing of the package. Everything it shows comes from the public classes and functions; it loads and
computes nothing by itself.
"""

from langchain_quantllm.cli import answering, comparing, diagnosing, making, measuring  # noqa: F401  (each adds its commands)
from langchain_quantllm.cli.console import app

__all__ = ["app"]
