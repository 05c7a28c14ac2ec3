"""Studies of attention: its scale, its denominator, its feature maps, and what models learn with it."""
