"""The `linattn` command."""
