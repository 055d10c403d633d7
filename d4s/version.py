"""The version of d4s."""

__version__ = "0.2.0"
