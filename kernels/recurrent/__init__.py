"""Recurrent layers: the loop over time behind an input projection. README.md has the derivation."""
