"""One checked configuration for every launcher: `toolkit launch recipes/pretrain.py … --on slurm`."""

# The module here that has a function of this name, from a Job to a Launch
LAUNCHERS = dict.fromkeys(("deepspeed", "torchrun", "slurm", "mpi"), "commands")
LAUNCHERS |= dict.fromkeys(("kubernetes", "compose"), "manifests")
