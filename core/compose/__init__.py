"""From names and parameters to a run: what exists, what is allowed, what is built."""
