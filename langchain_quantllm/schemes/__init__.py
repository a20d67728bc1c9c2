"""The quantization schemes: frozen values, and the table of their names.

Owns a scheme's name, its options with their checks, the packages it needs, and its transformers config. Imports torch
and transformers only to make such a config, and reads no checkpoint.
"""

from langchain_quantllm.schemes.bitsandbytes import BITSANDBYTES_OPTIONS, FLOAT_DTYPES, FP4, NF4, Int8
from langchain_quantllm.schemes.config import scheme_of_config
from langchain_quantllm.schemes.gptq import AUTO_BITS, AWQ, GPTQ, GPTQ_BITS
from langchain_quantllm.schemes.scheme import MXFP4, Prequantized, Scheme, Unquantized
from langchain_quantllm.schemes.table import SCHEMES, scheme_from, scheme_hint

__all__ = [
    "AUTO_BITS",
    "AWQ",
    "BITSANDBYTES_OPTIONS",
    "FLOAT_DTYPES",
    "FP4",
    "GPTQ",
    "GPTQ_BITS",
    "MXFP4",
    "NF4",
    "SCHEMES",
    "Int8",
    "Prequantized",
    "Scheme",
    "Unquantized",
    "scheme_from",
    "scheme_hint",
    "scheme_of_config",
]
