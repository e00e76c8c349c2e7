"""Manifests for Kubernetes: a ConfigMap with the configuration, and a PyTorchJob, TrainJob, MPIJob or JobSet.

    kubernetes(job).shown     # manifest.yaml, for `kubectl apply -f`

The run directory lies on the volume claim cluster.kubernetes.claim.
"""

from typing import Any

from toolkit.cluster.launchers.commands import ELASTIC, SSH, deepspeed_env
from toolkit.cluster.launchers.docker_compose import dump
from toolkit.cluster.launchers.job import LAUNCH, Job, Launch

# With this key, which the MPI operator makes, the image's entrypoint starts sshd (docker/entrypoint.sh).
KEYS, SSH_PORT = "/etc/mpi/keys", 2222
NODE_RANK = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def kubernetes(job: Job) -> Launch:
    """manifest.yaml. Raises ConfigError without an image."""
    kind = {"pytorchjob": _pytorchjob, "trainjob": _trainjob, "mpijob": _mpijob, "jobset": _jobset}
    files = {"config.yaml": job.saved, "deepspeed_env": deepspeed_env(job)}
    configuration = _named(job, "v1", "ConfigMap") | {"data": files}
    text = dump(configuration, *kind[job.cluster.kubernetes.kind](job))
    path = job.directory / "manifest.yaml"
    return Launch(text, ["kubectl", "apply", "-f", str(path)], {path.name: text})


def _pytorchjob(job: Job) -> list[dict[str, Any]]:
    """Training operator, v1: it sets torchrun's PET_* variables."""
    template = {"spec": _pod(job, "pytorch", ["torchrun", *job.arguments(LAUNCH)])}
    restart = "OnFailure" if job.cluster.restarts else "Never"
    counts = {"Master": 1, "Worker": job.nodes - 1}
    replicas = {
        name: {"replicas": count, "restartPolicy": restart, "template": template}
        for name, count in counts.items()
        if count
    }
    spec = {
        "nprocPerNode": str(job.devices),
        # The operator adds up the restarts of all pods, and the ranks of all of them end when one fails.
        "runPolicy": {
            "backoffLimit": job.cluster.restarts * job.nodes + bool(job.cluster.restarts),
            "cleanPodPolicy": "Running",
        },
        "pytorchReplicaSpecs": replicas,
    }
    return [_named(job, "kubeflow.org/v1", "PyTorchJob") | {"spec": spec}]


def _trainjob(job: Job) -> list[dict[str, Any]]:
    """Trainer, v2: a runtime of the job's own with the volumes, and the job that refers to it."""
    pods = _indexed(job, _pod(job, "node", ["torchrun", *job.arguments(LAUNCH)]))
    pods["template"]["metadata"] = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    template = {"spec": _restarted(job, [pods])}
    policy = {"numNodes": job.nodes, "torch": {}}
    runtime = _named(job, "trainer.kubeflow.org/v1alpha1", "TrainingRuntime")
    trainer = {"numNodes": job.nodes, "numProcPerNode": job.devices}
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.label}
    return [
        runtime | {"spec": {"mlPolicy": policy, "template": template}},
        _named(job, "trainer.kubeflow.org/v1alpha1", "TrainJob")
        | {"spec": {"runtimeRef": reference, "trainer": trainer}},
    ]


def _jobset(job: Job) -> list[dict[str, Any]]:
    """JobSet, v1alpha2: an indexed Job whose pods know the first one's name."""
    name = job.label
    options = ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.devices)]
    options += ["--master-addr", f"{name}-node-0-0.{name}", "--master-port", str(job.port)]
    pod = _pod(job, "node", ["torchrun", *options, *job.arguments(LAUNCH)])
    index = {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": NODE_RANK}}}
    pod["containers"][0]["env"].append(index)
    spec = {"network": {"enableDNSHostnames": True, "subdomain": name}} | _restarted(job, [_indexed(job, pod)])
    return [_named(job, "jobset.x-k8s.io/v1alpha2", "JobSet") | {"spec": spec}]


def _mpijob(job: Job) -> list[dict[str, Any]]:
    """MPI operator, v2beta1: its hostfile is of DeepSpeed's format, so that the image needs sshd and pdsh, no MPI."""
    options = ["--hostfile", "/etc/mpi/hostfile", "--no_ssh_check", "--force_multi", "--master_port", str(job.port)]
    launcher = _pod(job, "launcher", ["deepspeed", *options, *job.arguments(LAUNCH)], gpus=False)
    worker = _pod(job, "worker", ["sleep", "infinity"])
    variables = {"DS_ENV_FILE": f"{LAUNCH}/deepspeed_env", "PDSH_SSH_ARGS_APPEND": SSH}
    launcher["containers"][0]["env"] += [{"name": name, "value": value} for name, value in variables.items()]
    worker["containers"][0]["readinessProbe"] = {"tcpSocket": {"port": SSH_PORT}}
    for pod in (launcher, worker):
        pod["containers"][0]["env"] += [{"name": "CLUSTER_KEY", "value": f"{KEYS}/id_rsa"}]
    pods = {"Launcher": (1, launcher), "Worker": (job.nodes, worker)}
    spec = {
        "slotsPerWorker": job.devices,
        "sshAuthMountPath": KEYS,
        "launcherCreationPolicy": "WaitForWorkersReady",
        "runPolicy": {"backoffLimit": job.cluster.restarts, "cleanPodPolicy": "Running"},
        "mpiReplicaSpecs": {
            name: {"replicas": count, "restartPolicy": "Never", "template": {"spec": pod}}
            for name, (count, pod) in pods.items()
        },
    }
    return [_named(job, "kubeflow.org/v2beta1", "MPIJob") | {"spec": spec}]


def _named(job: Job, version: str, kind: str) -> dict[str, Any]:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": job.label, "namespace": job.cluster.kubernetes.namespace},
    }


def _indexed(job: Job, pod: dict[str, Any]) -> dict[str, Any]:
    """A JobSet's replicated job of one pod a node."""
    counts = {"parallelism": job.nodes, "completions": job.nodes, "completionMode": "Indexed", "backoffLimit": 0}
    template = {"spec": counts | {"template": {"spec": {"restartPolicy": "Never"} | pod}}}
    return {"name": "node", "replicas": 1, "template": template}


def _restarted(job: Job, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """A JobSet's spec: any failed pod has all of them made anew."""
    return {"failurePolicy": {"maxRestarts": job.cluster.restarts}, "replicatedJobs": jobs}


def _pod(job: Job, name: str, arguments: list[str], *, gpus: bool = True) -> dict[str, Any]:
    """One container of the image, with shared memory, the configuration and the run directory."""
    own = job.cluster.kubernetes
    volumes: dict[str, tuple[str, dict[str, Any]]] = {
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": f"{job.cluster.shm_gib}Gi"}}),
        "launch": (LAUNCH, {"configMap": {"name": job.label}}),
        "runs": (job.runs, {"persistentVolumeClaim": {"claimName": own.claim}}),
    }
    container: dict[str, Any] = {
        "name": name,
        "image": job.image,
        "workingDir": job.cluster.workdir,
        "args": arguments,  # of the image's entrypoint, which passes signals on
        "env": [{"name": key, "value": value} for key, value in (job.environment | ELASTIC).items()],
        "volumeMounts": [{"name": key, "mountPath": path} for key, (path, _) in volumes.items()],
    }
    if own.secret:
        container["envFrom"] = [{"secretRef": {"name": own.secret}}]
    if gpus and job.cluster.accelerator == "cuda":
        container["resources"] = {"limits": {"nvidia.com/gpu": str(job.devices)}}
    selector = {"nodeSelector": dict(own.node_selector)} if own.node_selector else {}
    grace = {"terminationGracePeriodSeconds": 300}  # SIGTERM: finish the step, save
    return {
        "containers": [container],
        "volumes": [{"name": k} | v for k, (_, v) in volumes.items()],
        **grace,
        **selector,
    }
