"""Frames to pictures."""
