"""Checkpoints: saved whole or not at all, verified, resumed, exported."""
