"""How an op is declared: schema, fake, backends, allocation, first derivative."""
