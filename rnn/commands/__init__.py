"""Commands on recurrent networks."""
