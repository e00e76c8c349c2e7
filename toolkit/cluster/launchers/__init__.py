"""One checked configuration for every launcher: `toolkit launch recipes/pretrain.py … --on slurm`."""

LAUNCHERS = {  # the module here that has a function of this name, from a Job to a Launch
    "deepspeed": "commands",
    "torchrun": "commands",
    "slurm": "slurm",
    "mpi": "commands",
    "kubernetes": "kubernetes",
    "compose": "docker_compose",
}
