"""A compose file with one service a node, for hosts of one Docker engine.

compose(job).shown     # compose.yaml, for `docker compose -f runs/<name>/launch/compose.yaml up`
"""

import json
from typing import Any

from toolkit.cluster.launchers.commands import ELASTIC, elastic
from toolkit.cluster.launchers.job import LAUNCH, Job, Launch


def compose(job: Job) -> Launch:
    """compose.yaml; the nodes meet at service node0. Raises ConfigError without an image."""
    path = job.directory / "compose.yaml"
    text = dump({"name": job.label, "services": {f"node{i}": _service(job, i) for i in range(job.nodes)}})
    up = ["docker", "compose", "-f", str(path), "up", "--abort-on-container-failure"]
    return Launch(text, up, {path.name: text})


def _service(job: Job, node: int) -> dict[str, Any]:
    cluster = job.cluster
    service = {
        "image": job.image,
        "hostname": f"node{node}",
        "working_dir": cluster.workdir,
        "command": ["torchrun", *elastic(job, "node0"), *job.arguments(LAUNCH)],
        # HF_TOKEN without a value: the shell's, if it has one; the file does not hold it
        "environment": [*(f"{name}={value}" for name, value in (job.environment | ELASTIC).items()), "HF_TOKEN"],
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


def dump(*documents: Any) -> str:
    """YAML, in the order of the keys."""
    import yaml

    plain = json.loads(json.dumps(documents))  # no anchors for what stands there twice
    return str(yaml.safe_dump_all(plain, sort_keys=False, width=120))
