"""`toolkit launch`: the same run through every launcher that this machine has, really started."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from launching import ROOT, TINY, Job, build_ops, data_cache, launch, logs, read, toolkit_command
from manifest_schemas import problems
from omegaconf import OmegaConf
from pages import COMMANDS, TEXTS
from slurm_cluster import Cluster, needs_slurm, slurm_cluster

from toolkit.cluster.launchers import LAUNCHERS
from toolkit.cluster.launchers.job import Launch, start
from toolkit.config.compose import compose
from toolkit.config.schema import load
from toolkit.errors import ConfigError
from toolkit.job import ranks
from toolkit.job.ranks import free_port

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
TOOLKIT = str(Path(sys.executable).parent / "toolkit")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
needs_mpi = pytest.mark.skipif(
    shutil.which("ompi_info") is None, reason="needs Open MPI's mpirun (Debian: openmpi-bin), which is not installed"
)


def arguments(tmp_path: Path, *overrides: str) -> list[str]:
    """Of ``toolkit launch``, for two CPU ranks."""
    run = [f"data.cache_dir={data_cache()}", f"output_dir={tmp_path}", "name=x", "train.steps=4", "train.save_every=2"]
    return ["recipes/pretrain.py", *TINY, *run, "cluster=cpu_x2", f"cluster.master_port={free_port()}", *overrides]


def toolkit_launch(*words: str, code: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = toolkit_command("launch", *words, env=env or ENVIRONMENT)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read(run / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses under the bare `deepspeed --num_gpus 2`."""
    build_ops()
    return losses(launch(tmp_path_factory.mktemp("bare"), "train.steps=4", "train.save_every=2").dir)


@pytest.mark.parametrize("on", ["deepspeed", "torchrun", pytest.param("mpi", marks=needs_mpi)])
def test_every_launcher_gives_the_losses_of_a_bare_deepspeed_run(
    on: str, tmp_path: Path, reference: list[float]
) -> None:
    toolkit_launch(*arguments(tmp_path), "--on", on, "--submit")
    assert losses(tmp_path / "x") == reference, logs(tmp_path / "x")
    assert json.loads((tmp_path / "x" / "env.json").read_text())["world_size"] == 2


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    build_ops()
    with slurm_cluster() as cluster:
        yield cluster


def sbatch(slurm: Cluster, *words: str) -> dict[str, str]:
    """Submit and wait for the end: the job as it ended."""
    done = toolkit_launch(*words, "--on", "slurm", "--submit", env=ENVIRONMENT | slurm.environment)
    return ended(slurm, int(done.stdout.split()[-1]))


def ended(slurm: Cluster, number: int) -> dict[str, str]:
    """Sbatch's own --wait asks more and more seldom, up to every half minute."""
    end = time.monotonic() + 150
    while (job := slurm.job(number))["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < end, job
        time.sleep(0.2)
    return job


@needs_slurm
def test_a_slurm_job_on_two_nodes_gives_them_too(tmp_path: Path, slurm: Cluster, reference: list[float]) -> None:
    nodes = ["cluster.nodes=2", "cluster.devices_per_node=1", "cluster.slurm.partition=test"]
    job = sbatch(slurm, *arguments(tmp_path, *nodes))
    assert (job["JobState"], job["ExitCode"], job["NodeList"]) == ("COMPLETED", "0:0", "n[1-2]")
    assert losses(tmp_path / "x") == reference, logs(tmp_path / "x")


@needs_slurm
def test_a_stopped_slurm_job_saves_is_queued_again_and_goes_on(tmp_path: Path, slurm: Cluster) -> None:
    long = ["train.steps=1000000", "train.save_every=1000000", "cluster.restarts=1", "cluster.nodes=2"]
    toolkit_launch(
        *arguments(tmp_path, *long, "cluster.devices_per_node=1"), "--on", "slurm", "--submit", env=slurm.environment
    )
    metrics, number = tmp_path / "x" / "metrics.jsonl", int(slurm.run("squeue", "--noheader", "--format=%i"))
    until(lambda: losses(tmp_path / "x"), tmp_path)
    slurm.run("scancel", "--signal=TERM", str(number))
    until(lambda: any("checkpoint" in record for record in read(metrics)), tmp_path)
    saved = next(record["step"] for record in read(metrics) if "checkpoint" in record)
    until(lambda: slurm.job(number)["Restarts"] == "1" and read(metrics)[-1]["step"] > saved, tmp_path)
    slurm.run("scancel", str(number))
    assert "Exit code 75: queued again" in (tmp_path / "x" / "launch" / f"slurm-{number}.out").read_text()
    assert [r["step"] for r in read(metrics) if "loss" in r][: saved + 1] == list(range(1, saved + 2))


def until(condition: Callable[[], Any], tmp_path: Path, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not condition():
        output = "".join(p.read_text() for p in tmp_path.glob("x/launch/slurm-*.out"))
        assert time.monotonic() < end, f"{output}\n{logs(tmp_path / 'x')}"
        time.sleep(0.2)


@needs_slurm
def test_the_exit_code_of_a_refused_slurm_job_is_2(tmp_path: Path, slurm: Cluster) -> None:
    job = sbatch(slurm, *arguments(tmp_path, "data=text", f"data.path={tmp_path}/none.txt", "cluster.restarts=1"))
    assert job["ExitCode"] == "2:0" and job["Restarts"] == "0"
    [output] = tmp_path.glob("x/launch/slurm-*.out")
    assert "error: " in output.read_text() and "none.txt" in output.read_text()


NUMBERS = "{ranks.rank()} {ranks.world()} {ranks.local_rank()} {ranks.local_size()}"
# In one write: lines of ranks that print at once would mix
RANK = f"import os; from toolkit.job import ranks; ranks.complete_environment(); os.write(1, f'{NUMBERS}\\n'.encode())"


@needs_slurm
def test_a_python_in_a_batch_script_is_alone_and_one_under_srun_is_a_rank(tmp_path: Path, slurm: Cluster) -> None:
    python = shlex.join([sys.executable, "-c", RANK])
    script = tmp_path / "ranks.sh"
    step = f"MASTER_ADDR=n1 srun -n3 {python} | sort"
    script.write_text(f"#!/bin/bash\n#SBATCH -N2 -n3 -o {tmp_path}/out\n{python}\nsrun -N1 -n1 {python}\n{step}\n")
    ended(slurm, int(slurm.run("sbatch", "--parsable", str(script))))
    alone, step_of_one, *ranks = (tmp_path / "out").read_text().splitlines()
    assert alone == step_of_one == "0 1 0 1"
    assert ranks == ["0 3 0 2", "1 3 1 2", "2 3 0 1"]


@pytest.mark.parametrize("mpirun", ["mpirun.openmpi", "mpirun.mpich"])
def test_ranks_take_their_numbers_from_mpirun(mpirun: str) -> None:
    if shutil.which(mpirun) is None:
        pytest.skip(f"{mpirun} is not installed")
    command = [mpirun, "-np", "2", *(["--oversubscribe"] if "openmpi" in mpirun else []), sys.executable, "-c", RANK]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, cwd=ROOT)
    assert sorted(done.stdout.splitlines()) == ["0 2 0 2", "1 2 1 2"]


def test_ranks_on_several_hosts_without_an_address_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"RANK": "1", "LOCAL_RANK": "0", "SIZE": "2", "LOCAL_SIZE": "1"}
    monkeypatch.setattr(os, "environ", {f"OMPI_COMM_WORLD_{name}": value for name, value in own.items()})
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        ranks.complete_environment()


def test_two_slurm_steps_of_one_rank_each_do_not_share_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    monkeypatch.setattr(os, "environ", own)
    ranks.complete_environment()
    assert os.environ["RANK"] == "0" and os.environ["MASTER_PORT"] != "29500"


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `toolkit launch` prints, in this process; the files are in tmp_path/x/launch."""
    monkeypatch.chdir(ROOT)

    def run(on: str, *overrides: str, recipe: str = "pretrain") -> str:
        given = ["name=x", f"output_dir={tmp_path}", "batch.micro_size=1", *overrides]
        start(Path(f"recipes/{recipe}.py"), given, on=on)
        return capsys.readouterr().out

    return run


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode-1 slots=4\n\n10.0.0.2   slots=4  # the other\n")
    return path


def test_deepspeed_gets_a_hostfile_and_the_environment_of_every_host(
    tmp_path: Path, printed: Callable[..., str], hostfile: Path
) -> None:
    own = [
        f"cluster.hostfile={hostfile}",
        "cluster.interface=eth0",
        "cluster.environment.TOKENIZERS_PARALLELISM='false'",
    ]
    variables, words = environment_and_words(printed("deepspeed", *own, "cluster.accelerator=cpu"))
    launch = tmp_path / "x" / "launch"
    assert (launch / "hostfile").read_text() == "node-1 slots=4\n10.0.0.2 slots=4\n"
    forwarded = (launch / ".deepspeed_env").read_text().splitlines()  # a blank line breaks DeepSpeed's parser
    assert forwarded == [
        "DS_ACCELERATOR=cpu",
        "GLOO_SOCKET_IFNAME=eth0",
        "NCCL_SOCKET_IFNAME=eth0",
        "TOKENIZERS_PARALLELISM=false",
    ]
    assert (
        variables["DS_ENV_FILE"] == str(launch / ".deepspeed_env")
        and "ServerAlive" in variables["PDSH_SSH_ARGS_APPEND"]
    )
    from deepspeed.launcher import runner  # seconds

    parsed = runner.parse_args(words[1:])
    assert (parsed.hostfile, parsed.master_addr, parsed.master_port) == (str(launch / "hostfile"), "node-1", 29500)
    assert parsed.user_args == ["--config-path", str(launch), "--config-name", "config"]


def environment_and_words(line: str) -> tuple[dict[str, str], list[str]]:
    words = shlex.split(line)
    first = next(i for i, word in enumerate(words) if "=" not in word)
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


def test_torchrun_starts_the_ranks_again_and_the_run_goes_on(tmp_path: Path) -> None:
    """For longer than train.lost_seconds: what the first attempt left in torchrun's store does not end the second."""
    steps = ["train.steps=40", "train.save_every=5", "train.lost_seconds=2", "cluster.restarts=1"]
    command = [TOOLKIT, "launch", *arguments(tmp_path, *steps), "--on", "torchrun", "--submit"]
    (tmp_path / "launch").mkdir()
    job = Job(command, tmp_path / "launch", tmp_path / "x")
    try:
        job.until_step(6)
        children = psutil.Process(job.process.pid).children(recursive=True)  # torchrun's are sessions of their own
        started = [p for p in children if "recipes/pretrain.py" in p.cmdline()]
        next(p for p in started if p.environ()["RANK"] == "0").kill()
        result = job.wait(150)
    finally:
        job.kill()
    assert result.code == 0, result.stderr
    assert [r["step"] for r in result.steps] == list(range(1, 41))


def test_torchruns_line_is_the_same_on_every_node(printed: Callable[..., str], hostfile: Path) -> None:
    line = printed("torchrun", f"cluster.hostfile={hostfile}", "cluster.interface=lo", "cluster.restarts=3")
    assert "--nnodes 2 --nproc-per-node 4 --max-restarts 3" in line and "--rdzv-endpoint node-1:29500" in line
    address = line[line.index("$(") + 2 : line.index(')"')]
    assert subprocess.run(["sh", "-c", address], capture_output=True, text=True, check=True).stdout == "127.0.0.1\n"


def test_the_saved_configuration_is_the_one_that_was_composed(tmp_path: Path, printed: Callable[..., str]) -> None:
    own = ["zero=stage3", "precision=bf16", "cluster.devices_per_node=8"]
    printed("mpi", *own, "name=null")
    [run] = tmp_path.iterdir()
    same = compose([*own, "batch.micro_size=1", f"name={run.name}", f"output_dir={tmp_path}"])
    assert load(OmegaConf.load(run / "launch" / "config.yaml")) == same


def test_a_recipe_starts_from_its_own_task(tmp_path: Path, printed: Callable[..., str]) -> None:
    printed("torchrun", recipe="linear_regression")
    assert OmegaConf.load(tmp_path / "x" / "launch" / "config.yaml").task.kind == "linear"


CONTAINERS = {
    "bare": [],
    "pyxis": ["cluster.container=pyxis", "cluster.image=nvcr.io/x:1"],
    "apptainer": ["cluster.container=apptainer", "cluster.image=/images/x.sif", "cluster.mounts=[/data:/data:ro]"],
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_shellcheck_finds_nothing_in_the_batch_script(
    container: str, tmp_path: Path, printed: Callable[..., str]
) -> None:
    own = ["cluster.nodes=2", "cluster.restarts=2", "cluster.slurm.cpus_per_task=8", "cluster.slurm.exclusive=true"]
    text = printed("slurm", *own, *CONTAINERS[container], "cluster.environment.NOTE='a b'")
    script = tmp_path / "x" / "launch" / "job.sbatch"
    assert script.read_text() == text
    checked = subprocess.run(
        [SHELLCHECK, script, script.with_name("rank.sh")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    assert "#SBATCH --exclusive\n" in text and "export SRUN_CPUS_PER_TASK=8\n" in text
    [srun] = [line for line in text.splitlines() if line.startswith("srun ")]
    mounts = f"{tmp_path}:{tmp_path},{tmp_path}/x/launch:/launch"
    expected = {
        "bare": f"{sys.executable} -u recipes/pretrain.py --config-path {tmp_path}/x/launch",
        "pyxis": f"--container-image=nvcr.io/x:1 --container-mounts={mounts} --container-workdir=/workspace ",
        "apptainer": f"apptainer exec --nv --bind {mounts},/data:/data:ro --pwd /workspace /images/x.sif python -u",
    }
    assert expected[container] in srun


@pytest.mark.parametrize("kind", ["pytorchjob", "trainjob", "mpijob", "jobset"])
def test_a_manifest_is_what_its_operator_knows(kind: str, printed: Callable[..., str]) -> None:
    own = [
        "cluster.image=x:1",
        "cluster=gpu_x8",
        "cluster.nodes=2",
        "cluster.interface=eth0",
        f"cluster.kubernetes.kind={kind}",
    ]
    more = ["cluster.kubernetes.secret=tokens", "cluster.kubernetes.node_selector={nvidia.com/gpu.product: H100}"]
    manifests = list(yaml.safe_load_all(printed("kubernetes", *own, *more)))
    assert [problems(manifest) for manifest in manifests] == [[]] * len(manifests)
    assert load(yaml.safe_load(manifests[0]["data"]["config.yaml"])).cluster.nodes == 2
    for manifest in manifests[1:]:
        for place in nodes(manifest):
            place["oops"] = 1
            assert noticed(manifest), f"oops passes: {place}"
            del place["oops"]
        assert not noticed(manifest)


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object in a manifest whose fields are fixed."""
    free = ("labels", "nodeSelector", "limits", "torch")
    if isinstance(tree, dict):
        yield tree
        for key, value in tree.items():
            yield from nodes(value) if key not in free else ()
    elif isinstance(tree, list):
        yield from nodes(tree[0])


def noticed(manifest: dict[str, Any]) -> bool:
    try:
        return bool(problems(manifest))
    except (ValueError, AttributeError, TypeError, jsonschema.ValidationError):
        return True


def test_a_compose_file_keeps_to_the_specification(tmp_path: Path, printed: Callable[..., str]) -> None:
    text = printed("compose", "cluster.image=x:1", "cluster.nodes=2", "cluster=gpu_x8")
    services = yaml.safe_load(text)["services"]
    ids = [s["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for s in services.values()]
    assert list(services) == ["node0", "node1"] and [len(i) for i in ids] == [8, 8] and not set(ids[0]) & set(ids[1])
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    subprocess.run([*command, tmp_path / "x" / "launch" / "compose.yaml"], check=True, stdout=subprocess.DEVNULL)


def test_a_new_launcher_is_one_file_and_a_line_of_the_table(
    printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(ours=lambda job: Launch(f"{job.world} ranks\n", ["true"]))
    monkeypatch.setitem(sys.modules, "toolkit.cluster.launchers.ours", module)
    monkeypatch.setitem(LAUNCHERS, "ours", "ours")
    assert printed("ours", "cluster.nodes=2") == "2 ranks\n"
    with pytest.raises(ConfigError, match=r"Known: .*, ours"):
        printed("others")


REFUSED = [
    ("slurmm", [], "--on slurmm: no such launcher. Did you mean 'slurm'?"),
    ("slurm", ["batch.global_size=3", "cluster.nodes=2"], "batch.global_size=3"),
    ("slurm", ["cluster.nodes=0"], "cluster.nodes=0: Input should be greater than 0."),
    ("slurm", ["cluster.slurm.nodes=3"], "nodes follows from cluster.nodes and cluster.devices_per_node. Drop it."),
    ("slurm", ["cluster.slurm.comment='a b'"], "without blanks and quotes"),
    ("slurm", ["cluster.image=x:1"], "cluster.image without cluster.container"),
    ("slurm", ["cluster.container=pyxis"], "cluster.image is not set"),
    ("kubernetes", [], "cluster.image is not set"),
    ("kubernetes", ["cluster.image=x", "name=a-name-that-is-longer-than-forty-characters"], "Kubernetes takes 1 to 40"),
    ("kubernetes", ["cluster.image=--privileged"], "cluster.image='--privileged'"),
    ("deepspeed", ["cluster.nodes=2"], "cluster.nodes=2: which hosts? Set cluster.hostfile"),
    ("mpi", ["cluster.nodes=2", "cluster.master_addr=node-1"], "cluster.nodes=2: which hosts?"),
    ("deepspeed", ["cluster.interface=-oProxyCommand"], "cluster.interface='-oProxyCommand'"),
    ("deepspeed", ["cluster.master_addr='$(id)'"], "cluster.master_addr='$(id)'"),
    ("deepspeed", ["cluster.hostfile=none"], "cluster.hostfile none: "),
    ("mpi", ["cluster.restarts=1"], "cluster.restarts=1: deepspeed and mpirun start a run once."),
    ("mpi", ["cluster.environment={A: 'x\"$(id)'}"], "A must be a name, and its value of letters"),
    ("mpi", ["cluster.nods=2"], "cluster.nods: unknown key. Did you mean 'nodes'?"),
]


@pytest.mark.parametrize(("on", "overrides", "message"), REFUSED)
def test_what_cannot_be_launched_is_one_line_and_leaves_nothing(
    on: str, overrides: list[str], message: str, tmp_path: Path, printed: Callable[..., str]
) -> None:
    with pytest.raises(ConfigError) as error:
        printed(on, "name=null", *overrides)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_list_of_mounts_would_split_is_refused(tmp_path: Path, printed: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="a,b: blanks, commas and colons do not pass a list of mounts"):
        printed("compose", "cluster.image=x", f"output_dir='{tmp_path}/a,b'")


def test_all_hosts_start_as_many_ranks(hostfile: Path, printed: Callable[..., str]) -> None:
    hostfile.write_text("a slots=2\nb slots=4\n")
    with pytest.raises(ConfigError, match="b slots=4, but 2 ranks start on each host"):
        printed("deepspeed", f"cluster.hostfile={hostfile}")


@pytest.mark.parametrize("override", ["cluster.environment.HF_TOKEN=abcdefgh", "cluster.environment.X=hf_abcdefgh"])
def test_a_secret_is_refused_and_not_repeated(override: str, printed: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="looks like a secret") as error:
        printed("slurm", override)
    assert "abcdefgh" not in str(error.value)


def test_a_missing_tool_is_one_line(tmp_path: Path) -> None:
    own = [*arguments(tmp_path), "--on", "slurm", "--submit"]
    done = toolkit_launch(*own, env=ENVIRONMENT | {"PATH": str(tmp_path)}, code=2)
    assert done.stderr.startswith("error: sbatch: not found on this host.") and not (tmp_path / "x").exists()


def test_overrides_may_stand_on_both_sides_of_the_options(tmp_path: Path) -> None:
    first, *rest = arguments(tmp_path)
    assert "deepspeed --num_gpus 2" in toolkit_launch(first, "--on", "deepspeed", *rest).stdout
    done = toolkit_launch(first, "--on", "deepspeed", *rest, "--subnit", code=2)
    assert "unrecognized arguments: --subnit" in done.stderr


CLAIMS = re.findall(r"```yaml\n(apiVersion.*?)```", TEXTS["docs/clusters.md"], re.DOTALL)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("toolkit launch")])
def test_a_command_of_the_pages_prints(command: str, tmp_path: Path, printed: Callable[..., str]) -> None:
    recipe, *overrides, _, on = shlex.split(command)[2:]
    (tmp_path / "hosts").write_text("node-1 slots=8\nnode-2 slots=8\n")
    given = [o.replace("hostfile=", f"hostfile={tmp_path}/") for o in overrides]
    assert "config" in printed(on, *given, recipe=Path(recipe).stem)


@pytest.mark.parametrize("text", CLAIMS)
def test_a_manifest_of_the_pages_is_valid(text: str) -> None:
    assert not problems(yaml.safe_load(text))
