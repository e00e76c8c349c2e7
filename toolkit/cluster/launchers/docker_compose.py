"""A compose file with one service a node, for hosts of one Docker engine.

compose(job).shown     # compose.yaml, for `docker compose -f runs/<name>/launch/compose.yaml up`
"""

from typing import Any

from toolkit.cluster.launchers.commands import ELASTIC, elastic
from toolkit.cluster.launchers.job import LAUNCH, Job, Launch, manifest


def compose(job: Job) -> Launch:
    """compose.yaml; the nodes meet at service node0. Raises ConfigError without an image."""
    services = {f"node{node}": _service(job, node) for node in range(job.nodes)}
    up = ["docker", "compose", "-f", "compose.yaml", "up", "--abort-on-container-failure"]
    return manifest(job, "compose.yaml", [{"name": job.label, "services": services}], *up)


def _service(job: Job, node: int) -> dict[str, Any]:
    cluster = job.cluster
    service = {
        "image": job.image,
        "hostname": f"node{node}",
        "working_dir": cluster.workdir,
        "command": ["torchrun", *elastic(job, "node0"), *job.arguments(LAUNCH)],
        # HF_TOKEN without a value: the shell's, if it has one; the file does not hold it
        "environment": [*(f"{name}={value}" for name, value in (cluster.variables | ELASTIC).items()), "HF_TOKEN"],
        "volumes": job.mounts,
        "shm_size": f"{cluster.shm_gib}gb",
        "stop_grace_period": "5m",  # SIGTERM: finish the step, save
        "ulimits": {"memlock": -1, "stack": 67108864},
    }
    if cluster.accelerator == "cuda":
        ids = [str(node * job.devices + device) for device in range(job.devices)]
        gpus = {"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [gpus]}}}
    return service
