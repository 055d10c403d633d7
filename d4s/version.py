"""The version of d4s, and of what it stands on."""

from __future__ import annotations

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """Of d4s, torch, transformers and Python: what figures were made with."""
    import platform

    import torch
    import transformers

    return {
        "d4s": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
