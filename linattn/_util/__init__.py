"""Leaf helpers without knowledge of attention: files, figures, tables, progress, the environment."""
