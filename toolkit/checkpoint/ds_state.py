"""DeepSpeed's state to files and back: every file synced and hashed, none executed, NVMe included.

    files = write(engine.ds, folder)     # {"state/mp_rank_00_model_states.pt": {"bytes": …, "sha256": …}, …}
    read(engine.ds, folder)              # weights, optimizer, learning rate schedule, loss scale

Works around DeepSpeed 0.19.8 where it would lose or run something; each place says what.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address, safe_get_full_fp32_param

TAG = "state"
STAGE = "weights.stage{}.pt"
Digest = dict[str, Any]  # bytes, sha256


def write(ds: Any, folder: Path) -> dict[str, Digest]:
    """Write ``folder/state``. Collective; returns the files that this rank wrote, or raises its OSError after all ranks
    have left DeepSpeed's barriers."""
    files = _attach(ds, folder)
    ds.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    if hasattr(ds.module, "hf_name"):
        # A pipe stage's weights in fp32 under their Hugging Face names, for `toolkit export`: DeepSpeed writes them
        # layer by layer in the training type, and cannot put a pipeline's fp32 parts together.
        named = {ds.module.hf_name(n): p for n, p in ds.module.named_parameters()}
        weights = {n: safe_get_full_fp32_param(p) if hasattr(p, "_hp_mapping") else p for n, p in named.items()}
        if ds.grid.data_parallel_id == 0:
            state = {name: tensor.detach().float().cpu() for name, tensor in weights.items()}
            files.save(state, str(folder / TAG / STAGE.format(f"{ds.stage_id:02}")))
    if files.problem is not None:
        raise files.problem
    return files.written


def read(ds: Any, folder: Path) -> None:
    """Load ``folder/state``. Collective; the hyperparameters stay those of this run's configuration."""
    _attach(ds, folder)
    names = {"initial_lr", "lr", *(ds.optimizer_params() or {})}
    chosen = [{k: group[k] for k in names if k in group} for group in ds.optimizer.param_groups]
    with safe_loading():
        ds.load_checkpoint(str(folder), tag=TAG)
    _restore_hyperparameters(ds, chosen)
    _replay_bias_correction(ds)


def save_file(tree: Any, path: Path) -> Digest:
    """torch.save, synced to the disk and hashed on the way."""
    with _Hashed(path) as file:
        try:
            torch.save(tree, file)
        except RuntimeError as error:  # torch says "unexpected pos 704 vs 598" of a full disk
            raise file.problem or error from error
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": file.sha256.hexdigest()}


def foreign_code(path: Path) -> str | None:
    """What a file would import beyond tensors and DeepSpeed's few classes, or None. Executes nothing."""
    try:
        with safe_loading():
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:  # whatever a hostile pickle makes the disassembler say
        return f"is not a file of torch.save: {error}"
    return f"would run {', '.join(sorted(names))}" if names else None


@contextmanager
def safe_loading() -> Iterator[None]:
    """Inside, torch.load executes nothing that a file carries, whatever the caller asked of it."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]):
            yield
    finally:
        os.environ.pop(key) if before is None else os.environ.update({key: before})


class _Files(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's way to the disk. A failure is kept: raised inside, it would leave the other ranks in a barrier."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.written: dict[str, Digest] = {}
        self.problem: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        shard = state_dict.get("optimizer_state_dict")
        if shard and {"zero_stage", "single_partition_of_fp32_groups"} & set(shard):
            # BF16_Optimizer leaves the stage out, and zero_to_fp32.parse_optim_states then refuses to read it. An enum
            # is pickled as a call of getattr by Python 3.11.0 to 3.11.3, which safe loading refuses.
            shard["zero_stage"] = int(shard.get("zero_stage", ZeroStageEnum.optimizer_states))
        try:
            self.written[str(Path(path).relative_to(self.root))] = save_file(state_dict, Path(path))
        except (OSError, RuntimeError) as error:
            self.problem = self.problem or error

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True


class _Hashed(io.BufferedWriter):
    """A file that hashes what passes through and remembers why it could not."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.sha256 = hashlib.sha256()
        self.problem: OSError | None = None

    def write(self, block: Any) -> int:
        self.sha256.update(block)
        try:
            return super().write(block)
        except OSError as error:
            self.problem = error
            raise


def _attach(ds: Any, folder: Path) -> _Files:
    """Put our file access, and the state of tensors on NVMe, in the place of DeepSpeed's."""
    files = ds.checkpoint_engine = _Files(folder)
    ds._copy_recovery_script = lambda path: None  # no program beside the weights; `toolkit export` reads them
    optimizer = ds.optimizer
    parameters = getattr(optimizer, "fp16_partitioned_groups_flat", [])  # None: on NVMe
    if getattr(optimizer, "swap_optimizer", False) or any(p is None for p in parameters):
        # DeepSpeedEngine.load_checkpoint skips _load_zero_checkpoint for a swapped optimizer and copies swap
        # files: weights, step count and the tensors under 1 MiB, which are never swapped, do not come back.
        ds.zero_nvme_offload_optimizer = lambda: False
        optimizer._rigid_state_dict = lambda: _swapped_state(optimizer)
        optimizer._rigid_load_state_dict = lambda tree, **_: _restore_swapped(optimizer, tree)
    return files


def _swapped_state(optimizer: Any) -> dict[str, Any]:
    """Stage 3's own state dict, with the tensors that are on NVMe read into it (into CPU memory, this rank's)."""
    tree: dict[str, Any] = type(optimizer)._rigid_state_dict(optimizer)
    state = tree["optimizer_state_dict"]["state"]
    flat = tree["fp32_flat_groups"] = list(tree["fp32_flat_groups"])
    for i, group in enumerate(optimizer.fp32_partitioned_groups_flat):
        with _in_memory(optimizer, i):
            flat[i] = group.detach().clone()
            state[i] = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.optimizer.state[group].items()}
    return tree


def _restore_swapped(optimizer: Any, tree: dict[str, Any]) -> None:
    """The reverse of :func:`_swapped_state`: fp32 weights and moments in place, then the model's own copies."""
    for name in ("loss_scaler", "dynamic_loss_scale", "overflow"):
        setattr(optimizer, name, tree[name])
    saved = tree["optimizer_state_dict"]
    for group, kept in zip(optimizer.optimizer.param_groups, saved["param_groups"], strict=True):
        group |= {k: v for k, v in kept.items() if k != "params"}
    pairs = zip(optimizer.fp32_partitioned_groups_flat, tree["fp32_flat_groups"], strict=True)
    for i, (group, kept) in enumerate(pairs):
        with _in_memory(optimizer, i):
            group.data.copy_(kept)
            state = optimizer.optimizer.state[group]
            for name, value in saved["state"][i].items():
                if torch.is_tensor(value) and name in state:
                    state[name].data.copy_(value)
                else:
                    state[name] = value.clone() if torch.is_tensor(value) else value
            optimizer._reassign_or_swap_out_partitioned_parameters(i)


@contextmanager
def _in_memory(optimizer: Any, i: int) -> Iterator[None]:
    """Group ``i``'s fp32 weights and moments in memory; written back to NVMe if that is where they live."""
    swapped = optimizer._swappable_optimizer_subgroup(i)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(i)
    yield
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(i)


def _restore_hyperparameters(ds: Any, chosen: list[dict[str, Any]]) -> None:
    """Per optimizer group what the configuration says: lr, weight decay, betas … A checkpoint also carries the old
    values, and DeepSpeed would go on with those without a word."""
    schedule = ds.lr_scheduler
    for i, (group, values) in enumerate(zip(ds.optimizer.param_groups, chosen, strict=True)):
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            schedule.base_lrs[i] = values["initial_lr"]
            values["lr"] = values["initial_lr"] * schedule.lr_lambdas[i](schedule.last_epoch)
        elif schedule is not None:
            values["lr"] = group["lr"]  # DeepSpeed's schedules set it from their own parameters at each step
        group |= values
    if hasattr(ds.optimizer, "clip_grad"):
        ds.optimizer.clip_grad = ds.gradient_clipping()


def _replay_bias_correction(ds: Any) -> None:
    """DeepSpeed's Adam on the CPU keeps beta^t in C++ as a running product of floats, which no checkpoint holds: after
    a resume it takes pow(beta, t), an ulp off (csrc/includes/cpu_adam.h, IncrementStep). So count one number up to t.
    """
    adam = ds.basic_optimizer
    offloaded = hasattr(adam, "ds_opt_adam")
    if not (offloaded or (hasattr(adam, "multi_tensor_adam") and ds.device.type == "cpu")):
        return
    beta1, beta2 = adam.param_groups[0]["betas"]
    steps = max((int(state["step"]) for state in adam.state.values()), default=0)
    if max(beta1, beta2) ** steps < 2**-25:
        return  # 1 - beta^t is 1 in fp32, either way
    one = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        if offloaded:
            adam.ds_opt_adam.adam_update(adam.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *one)
        else:
            rates, more = (0.0, beta1, beta2, 1.0), (step, adam.adam_w_mode, 1, 0.0)
            adam.multi_tensor_adam(1, adam._dummy_overflow_buf, [[x] for x in one], *rates, *more)
