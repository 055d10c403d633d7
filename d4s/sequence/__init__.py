"""Edits one after another, and the same ones with several methods."""
