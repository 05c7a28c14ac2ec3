"""Feature-map linear attention: sim = scale * phi(q).phi(k)."""
