"""Attention for any similarity, and its limit that looks up one key."""
