"""Vectors after the model: shortened, normalized, checked, and rounded to the numbers that a store takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.compat.sentence_transformers import quantize_vectors
from langchain_quantllm.errors import EncodingError, InvalidOptionError

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
"""Values of `output_precision`."""


@dataclass(frozen=True, kw_only=True)
class VectorForm:
    """The form of the vectors that a caller gets.

    Args:
        size: First numbers of a vector that are kept; None keeps all.
        normalize: Whether vectors get the length 1, after they were shortened.
        precision: One of `PRECISIONS`. A number of `int8` and `uint8` is one of 256 steps of a range; eight dimensions
            make one number of `binary` and `ubinary`.
        ranges: The smallest and the largest value of each dimension, for int8 and uint8; None is -1 to 1 for all, in
            which every normalized vector lies.
    """

    size: int | None = None
    normalize: bool = False
    precision: str = "float32"
    ranges: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def apply(self, rows: Sequence[Any]) -> Any:
        """Bring vectors into this form.

        Args:
            rows: The model's vectors, float32 of shape `(size,)`.

        Returns:
            A NumPy array of shape `(vectors, size)`.

        Raises:
            InvalidOptionError: If the vectors are shorter than `size`, or `ranges` is of another size.
            EncodingError: If a vector has NaN or infinity.
        """
        import numpy as np

        vectors = np.stack(rows)
        if self.size is not None:
            if self.size > vectors.shape[1]:
                msg = f"truncate_dim={self.size} is more than the {vectors.shape[1]} numbers of this model's vectors."
                raise InvalidOptionError(msg)
            vectors = vectors[:, : self.size]
        if not (finite := np.isfinite(vectors).all(axis=1)).all():
            wrong = [int(index) for index in np.flatnonzero(~finite)]
            msg = (
                f"the model computed NaN or infinity for {len(wrong)} of {len(vectors)} inputs (number {wrong[0]}, "
                "counted from 0); float16 overflows in some models: pass dtype='bfloat16' or 'float32'."
            )
            raise EncodingError(msg)
        if self.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        if self.precision == "float32":
            return vectors
        return quantize_vectors(vectors, self.precision, self._ranges(vectors))

    def _ranges(self, vectors: Any) -> Any:
        import numpy as np

        if not self.precision.endswith("int8"):
            return None
        size = vectors.shape[1]
        if self.ranges is None:
            longest = float(np.linalg.norm(vectors, axis=1).max())
            if longest > 1.001:
                msg = (
                    f"output_precision={self.precision!r} needs vectors of length 1, and these have up to "
                    f"{longest:.3g}; pass normalize=True, or output_ranges= with the smallest and the largest value of "
                    "each dimension."
                )
                raise InvalidOptionError(msg)
            return np.array([[-1.0] * size, [1.0] * size], dtype=np.float32)
        if len(self.ranges[0]) != size:
            msg = f"output_ranges has {len(self.ranges[0])} dimensions, and the vectors have {size}."
            raise InvalidOptionError(msg)
        return np.array(self.ranges, dtype=np.float32)
