"""Implementations that are not ours: how to call them, and proof of what they compute."""
