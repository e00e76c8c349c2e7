"""Manifests: for Kubernetes, and a compose file for the hosts of one Docker engine.

kubernetes(job).shown     # manifest.yaml, for `kubectl apply -f`
compose(job).shown        # compose.yaml, for `docker compose -f runs/<name>/launch/compose.yaml up`
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from toolkit.cluster.launchers.commands import ELASTIC, SSH, deepspeed_env, elastic
from toolkit.cluster.launchers.job import LAUNCH, Job, Launch

# With this key, which the MPI operator makes, the image's entrypoint starts sshd (docker/entrypoint.sh).
KEYS, SSH_PORT = "/etc/mpi/keys", 2222
NODE_RANK = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
Tree = dict[str, Any]


def kubernetes(job: Job) -> Launch:
    """A ConfigMap with the configuration, and a PyTorchJob, TrainJob, MPIJob or JobSet; runs lie on the volume claim
    cluster.kubernetes.claim. Raises ConfigError without an image."""
    kinds = {"pytorchjob": _pytorchjob, "trainjob": _trainjob, "mpijob": _mpijob, "jobset": _jobset}
    configuration = {"config.yaml": job.saved, "deepspeed_env": deepspeed_env(job)}
    documents = [_object(job, "v1", "ConfigMap", data=configuration), *kinds[job.cluster.kubernetes.kind](job)]
    return _manifest(job, "manifest.yaml", documents, "kubectl", "apply", "-f", "manifest.yaml")


def _pytorchjob(job: Job) -> list[Tree]:
    """Training operator, v1: it sets torchrun's PET_* variables."""
    replica = {
        "restartPolicy": "OnFailure" if job.cluster.restarts else "Never",
        "template": {"spec": _pod(job, "pytorch", ["torchrun", *job.arguments(LAUNCH)])},
    }
    counts = {"Master": 1, "Worker": job.nodes - 1}
    # The operator adds up the restarts of all pods, and the ranks of all of them end when one fails.
    restarts = job.cluster.restarts * job.nodes + bool(job.cluster.restarts)
    spec = {
        "nprocPerNode": str(job.devices),
        "runPolicy": {"backoffLimit": restarts, "cleanPodPolicy": "Running"},
        "pytorchReplicaSpecs": {name: {"replicas": count} | replica for name, count in counts.items() if count},
    }
    return [_object(job, "kubeflow.org/v1", "PyTorchJob", spec=spec)]


def _trainjob(job: Job) -> list[Tree]:
    """Trainer, v2: a runtime of the job's own with the volumes, and the job that refers to it."""
    pod = _pod(job, "node", ["torchrun", *job.arguments(LAUNCH)])
    pods = _replicated(job, pod, metadata={"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}})
    runtime = {"mlPolicy": {"numNodes": job.nodes, "torch": {}}, "template": {"spec": pods}}
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.label}
    trainer = {"numNodes": job.nodes, "numProcPerNode": job.devices}
    return [
        _object(job, "trainer.kubeflow.org/v1alpha1", "TrainingRuntime", spec=runtime),
        _object(job, "trainer.kubeflow.org/v1alpha1", "TrainJob", spec={"runtimeRef": reference, "trainer": trainer}),
    ]


def _jobset(job: Job) -> list[Tree]:
    """JobSet, v1alpha2: an indexed Job whose pods know the first one's name."""
    name = job.label
    options = ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.devices)]
    options += ["--master-addr", f"{name}-node-0-0.{name}", "--master-port", str(job.port)]
    pod = _pod(job, "node", ["torchrun", *options, *job.arguments(LAUNCH)])
    pod["containers"][0]["env"].append({"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": NODE_RANK}}})
    spec = {"network": {"enableDNSHostnames": True, "subdomain": name}} | _replicated(job, pod)
    return [_object(job, "jobset.x-k8s.io/v1alpha2", "JobSet", spec=spec)]


def _mpijob(job: Job) -> list[Tree]:
    """MPI operator, v2beta1: its hostfile is of DeepSpeed's format, so that the image needs sshd and pdsh, no MPI."""
    options = ["--hostfile", "/etc/mpi/hostfile", "--no_ssh_check", "--force_multi", "--master_port", str(job.port)]
    key = {"CLUSTER_KEY": f"{KEYS}/id_rsa"}
    own = {"DS_ENV_FILE": f"{LAUNCH}/deepspeed_env", "PDSH_SSH_ARGS_APPEND": SSH} | key
    launcher = _pod(job, "launcher", ["deepspeed", *options, *job.arguments(LAUNCH)], own, gpus=False)
    worker = _pod(job, "worker", ["sleep", "infinity"], key)
    worker["containers"][0]["readinessProbe"] = {"tcpSocket": {"port": SSH_PORT}}
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
    return [_object(job, "kubeflow.org/v2beta1", "MPIJob", spec=spec)]


def _replicated(job: Job, pod: Tree, **more: Tree) -> Tree:
    """A JobSet's spec: one pod a node, in a template with ``more``; any that fails has all of them made anew."""
    counts = {"parallelism": job.nodes, "completions": job.nodes, "completionMode": "Indexed", "backoffLimit": 0}
    template = {"spec": counts | {"template": {"spec": {"restartPolicy": "Never"} | pod}}, **more}
    pods = {"name": "node", "replicas": 1, "template": template}
    return {"failurePolicy": {"maxRestarts": job.cluster.restarts}, "replicatedJobs": [pods]}


def _object(job: Job, version: str, kind: str, **content: Any) -> Tree:
    names = {"name": job.label, "namespace": job.cluster.kubernetes.namespace}
    return {"apiVersion": version, "kind": kind, "metadata": names, **content}


def _pod(job: Job, name: str, arguments: list[str], own: dict[str, str] | None = None, *, gpus: bool = True) -> Tree:
    """One container of the image, with shared memory, the configuration and the run directory; ``own`` variables."""
    cluster, kubernetes = job.cluster, job.cluster.kubernetes
    volumes: dict[str, tuple[str, Tree]] = {
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": f"{cluster.shm_gib}Gi"}}),
        "launch": (LAUNCH, {"configMap": {"name": job.label}}),
        "runs": (job.runs, {"persistentVolumeClaim": {"claimName": kubernetes.claim}}),
    }
    variables = cluster.variables | ELASTIC | (own or {})
    container: Tree = {
        "name": name,
        "image": job.image,
        "workingDir": cluster.workdir,
        "args": arguments,  # of the image's entrypoint, which passes signals on
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "volumeMounts": [{"name": key, "mountPath": path} for key, (path, _) in volumes.items()],
    }
    if kubernetes.secret:
        container["envFrom"] = [{"secretRef": {"name": kubernetes.secret}}]
    if gpus and cluster.accelerator == "cuda":
        container["resources"] = {"limits": {"nvidia.com/gpu": str(job.devices)}}
    return {
        "containers": [container],
        "volumes": [{"name": key} | volume for key, (_, volume) in volumes.items()],
        "terminationGracePeriodSeconds": 300,  # SIGTERM: finish the step, save
        **({"nodeSelector": dict(kubernetes.node_selector)} if kubernetes.node_selector else {}),
    }


def compose(job: Job) -> Launch:
    """compose.yaml, a service a node; they meet at node0. Raises ConfigError without an image."""
    services, cluster = {}, job.cluster
    for node in range(job.nodes):
        services[f"node{node}"] = service = {
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
    up = ["docker", "compose", "-f", "compose.yaml", "up", "--abort-on-container-failure"]
    return _manifest(job, "compose.yaml", [{"name": job.label, "services": services}], *up)


def _manifest(job: Job, name: str, documents: Sequence[Mapping[str, Any]], *submit: str) -> Launch:
    """``documents`` as a YAML file, in the order of their keys; ``submit`` is the command, ``name`` in it its path."""
    plain = json.loads(json.dumps(documents))  # no anchors for what stands there twice
    text = yaml.safe_dump_all(plain, sort_keys=False, width=120)
    command = [str(job.directory / name) if word == name else word for word in submit]
    return Launch(text, command, {name: text})
