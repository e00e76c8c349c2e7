"""One checked configuration for every launcher: `toolkit launch recipes/pretrain.py … --on slurm`."""
