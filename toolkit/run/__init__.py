"""A run: the recipe that starts it, its directory and terminal, its own plan, and sweeps of many."""
