"""Run directories as pictures. Reads files only; training never imports it, and it needs no torch."""
