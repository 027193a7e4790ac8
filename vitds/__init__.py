"""vitds: Vision Transformers on DeepSpeed. `create_model` and `load` are the Python face; this imports no torch."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "load"]

_HOMES = {"create_model": "vitds.weights.create", "load": "vitds.inference"}


def __getattr__(name: str) -> object:
    """Import a function (and with it torch) when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vitds' has no attribute {name!r}")
