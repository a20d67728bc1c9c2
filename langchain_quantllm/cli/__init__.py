"""The command line, `langchain-quantllm`.

Prints everything that the package prints. What it shows comes from the public classes and functions; it loads and
computes nothing itself.
"""

from langchain_quantllm.cli import compare, doctor, memory_bench, quantize_merge, run_chat_demo  # noqa: F401
from langchain_quantllm.cli.console import app

__all__ = ["app"]
