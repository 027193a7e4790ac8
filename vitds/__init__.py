"""vitds: Vision Transformers on DeepSpeed. `vitds.create_model` is the Python face; importing this imports no torch."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__", "create_model"]


def __getattr__(name: str) -> object:
    """Import `create_model` (and with it torch) when it is first asked for."""
    if name == "create_model":
        from vitds.weights.create import create_model

        return create_model
    raise AttributeError(f"module 'vitds' has no attribute {name!r}")
