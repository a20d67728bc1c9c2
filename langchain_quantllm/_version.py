"""The version of the package, as its metadata has it."""

from importlib import metadata

try:
    __version__ = metadata.version("langchain-quantllm")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.2.0"
