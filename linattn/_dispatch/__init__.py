"""From a call to a plan: check the inputs, choose a backend and a form."""
