"""The common base of the LangChain classes over a quantized local model.

Owns the fields with their checks, loading on first use, the rule for defaults, and the translation of this package's
errors into LangChain's. Knows no prompt and no message format: the classes above bring those.
"""

from langchain_quantllm.base.batch import run_together, setting
from langchain_quantllm.base.model import (
    PreparedCall,
    PromptOverflowError,
    QuantizedModel,
    RequestTimeoutError,
    langchain_errors,
)

__all__ = [
    "PreparedCall",
    "PromptOverflowError",
    "QuantizedModel",
    "RequestTimeoutError",
    "langchain_errors",
    "run_together",
    "setting",
]
