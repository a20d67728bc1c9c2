"""The name of a model in requests."""

from __future__ import annotations

from pathlib import Path


def name_of(model_id: str) -> str:
    """Name a model by its repository, or by the last part of its folder's path: strangers need not know the rest."""
    is_path = Path(model_id).is_absolute() or Path(model_id).exists()
    return (Path(model_id).resolve().name if is_path else model_id) or "model"
