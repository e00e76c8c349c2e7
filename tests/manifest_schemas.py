"""What is wrong with a Kubernetes manifest, by the schemas that its operators publish as Python packages.

problems(yaml.safe_load(text))      # [] or lines; a kind without a schema is an error, never a pass
"""

from collections.abc import Iterator
from typing import Any

import kubernetes.client.models
import kubernetes_validate
from kubeflow.training import models as training
from kubeflow_trainer_api import models as trainer

VERSION = "1.34"  # of Kubernetes
TRAINER = {
    "TrainJob": trainer.TrainerV1alpha1TrainJob,
    "TrainingRuntime": trainer.TrainerV1alpha1TrainingRuntime,
    "JobSet": trainer.JobsetV1alpha2JobSet,
}


class MPIJob:
    """Of v2beta1. No package has its model: these are the fields that the operator's API page lists."""

    openapi_types = {"version": "str", "kind": "str", "metadata": "V1ObjectMeta", "spec": "MPIJobSpec"}  # noqa: RUF012
    attribute_map = {"version": "apiVersion", "kind": "kind", "metadata": "metadata", "spec": "spec"}  # noqa: RUF012


class MPIJobSpec:
    openapi_types = {  # noqa: RUF012
        "slots": "int",
        "ssh_path": "str",
        "implementation": "str",
        "creation": "str",
        "as_worker": "bool",
        "policy": "KubeflowOrgV1RunPolicy",
        "replicas": "dict(str, KubeflowOrgV1ReplicaSpec)",
    }
    attribute_map = {  # noqa: RUF012
        "slots": "slotsPerWorker",
        "ssh_path": "sshAuthMountPath",
        "implementation": "mpiImplementation",
        "creation": "launcherCreationPolicy",
        "as_worker": "runLauncherAsWorker",
        "policy": "runPolicy",
        "replicas": "mpiReplicaSpecs",
    }


def problems(manifest: dict[str, Any]) -> list[str]:
    kind = manifest["kind"]
    if kind in TRAINER:
        found = _lost(manifest, TRAINER[kind].from_dict(manifest).to_dict(), kind)
    elif kind == "PyTorchJob":
        found = _misfits(manifest, "KubeflowOrgV1PyTorchJob", kind)
    elif kind == "MPIJob":
        found = _misfits(manifest, "MPIJob", kind)
    else:
        found = iter(())
        kubernetes_validate.validate(manifest, VERSION, strict=True)  # raises for a kind that it does not know
    for pod in _pods(manifest):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
        kubernetes_validate.validate(whole, VERSION, strict=True)
    return list(found)


def _lost(given: Any, kept: Any, place: str) -> Iterator[str]:
    """The models drop fields that they do not know."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key not in kept:
                yield f"{place}.{key}: unknown"
            else:
                yield from _lost(value, kept[key], f"{place}.{key}")
    elif isinstance(given, list) and isinstance(kept, list):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{place}[{index}]")
    elif given != kept:
        yield f"{place}: {given!r} was read as {kept!r}"


def _misfits(value: Any, kind: str, place: str) -> Iterator[str]:
    """By the types that the generated models name: ``int``, ``list[V1EnvVar]``, ``dict(str, X)``."""
    if kind.startswith(("list[", "dict(")):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inner = kind[5:-1].removeprefix("str, ")
        for key, item in items:
            yield from _misfits(item, inner, f"{place}.{key}")
    elif kind in ("int", "str", "bool", "float"):
        if type(value).__name__ != kind:
            yield f"{place}: {value!r} is no {kind}"
    elif kind not in ("object", "datetime"):
        found = globals().get(kind) or getattr(training, kind, None) or getattr(kubernetes.client.models, kind)
        fields = {name: found.openapi_types[own] for own, name in found.attribute_map.items()}
        for key, item in value.items():
            if key not in fields:
                yield f"{place}.{key}: unknown"
            else:
                yield from _misfits(item, fields[key], f"{place}.{key}")


def _pods(tree: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification within a manifest."""
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from _pods(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _pods(value)
