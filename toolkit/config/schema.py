"""The whole configuration as frozen pydantic models; every default of the toolkit lives here, once.

    config = load(cfg)              # the DictConfig that Hydra composed -> RunConfig
    schema()                        # the same defaults as a plain dict: Hydra's base config

Unknown keys are refused at every level with the nearest valid name. The node ``deepspeed`` is
DeepSpeed's own JSON and is checked by :mod:`toolkit.deepspeed.ds_config`.
"""

import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from toolkit.config.kinds import known
from toolkit.errors import ConfigError, nearest

Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]  # of what is read: '' would be the working directory
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Dtype = Literal["fp32", "tf32", "bf16", "fp16"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A frozen node that knows exactly its own keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)


class Train(Strict):
    """How long to train and how often to log, evaluate and save; all in optimizer steps."""

    steps: Positive | None = 1000
    epochs: float | None = Field(None, gt=0)  # passes over the training data; with steps too, what ends first counts
    log_every: Positive = 10
    eval_every: Positive | Literal["epoch"] | None = None  # None: only at the end
    eval_samples: Positive | None = 2048  # None: the whole held-out part
    save_every: Positive | None = None  # None: only at the end
    keep_checkpoints: Positive = 3  # besides the best, where the task has a metric to tell
    patience: Positive | None = None  # evaluations without a better task.best before training ends early
    hang_minutes: float | None = Field(30, gt=0)  # no next batch for so long: every rank says where it is, and ends
    lost_seconds: float | None = Field(120, ge=1)  # a rank not heard of for so long ends the job
    compile: bool = False
    tf32: bool = True
    # Count and time DeepSpeed's collectives; the records tell how even memory and work are over the ranks, too
    communication: bool = False

    @model_validator(mode="after")
    def _ends(self) -> "Train":
        if self.steps is None and self.epochs is None:
            raise ValueError("train.steps and train.epochs are both null: training needs an end. Set one of them")
        return self


class Batch(Strict):
    """Samples per optimizer step over all ranks, and per forward pass on one rank."""

    global_size: Positive = 256
    micro_size: Positive = 16
    # A step takes so many tokens (of the longer side of a pair, with padding) instead of global_size samples, cut into
    # global_size / micro_size micro-batches; for task.kind=translate
    tokens: Positive | None = None


class Model(Strict):
    """The Hugging Face BertConfig in its own key names; ``dropout`` sets all its rates, and those of weights."""

    type: Literal["bert", "marian"] = "bert"  # marian: the encoder-decoder of Vaswani et al. 2017
    hidden_size: Positive = 768
    num_hidden_layers: Positive = 12
    decoder_layers: Positive | None = None  # marian; None: as many as the encoder has
    num_attention_heads: Positive = 12
    intermediate_size: Positive = 3072
    max_position_embeddings: Positive = 512  # of a model from scratch; weights have their own
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    initializer_range: float = Field(0.02, gt=0)
    layer_norm_eps: float = Field(1e-12, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    # sdpa becomes eager, with a warning, where the architecture of the weights has none
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    # A hub name, a Hugging Face folder, or a run directory; none: from scratch, which fine-tuning wants to be told
    weights: Name | None = None
    from_scratch: bool = False  # what model.weights=none becomes
    # A translator made of two BERTs: which of its halves begin as model.weights, the others are drawn
    init: Literal["none", "encoder", "both"] = "both"
    new_head: bool = False  # leave out the task's head that the weights have, for other labels
    vocab_size: Positive | None = None  # None: the tokenizer's; another number than its is refused

    @model_validator(mode="before")
    @classmethod
    def _no_weights(cls, value: Any) -> Any:
        """``none`` is None from here on, and that it was said is kept."""
        if not isinstance(value, dict) or not (weights := value.get("weights")):
            return value
        none = str(weights).lower() == "none"
        return {**value, "weights": None if none else weights, "from_scratch": none}


class Tokenizer(Strict):
    """A pretrained tokenizer (``path``: hub name, folder or vocab.txt), or one trained on the corpus."""

    path: Name | None = None
    model: Literal["wordpiece", "bpe", "unigram"] = "wordpiece"  # bpe, unigram: of both languages of translation pairs
    vocab_size: Positive = 30522
    lowercase: bool = True
    # é is e. None: a vocab.txt where it lowercases, as Hugging Face does, a trained one never. Training one with true
    # strips the accents of Latin, Greek and Cyrillic letters, never the vowels and tones of other scripts
    strip_accents: bool | None = None
    min_frequency: Positive = 2
    coverage: float = Field(0.9995, gt=0, le=1)  # share of the text that the characters of a trained one make up
    max_unknown: Fraction = 0.2  # data is refused where a larger share of its characters is unknown; 1: never
    special_in_text: bool = False  # '[SEP]' or '</s>' typed in a text is the special token, not text


class Columns(Strict):
    """The names of a table's columns, or their numbers from 0 where the file has no header."""

    id: str | None = None  # None: the row's number from 0
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None  # multi_label: columns of 0 and 1, one for each label, in the place of label
    tokens: str = "tokens"
    tags: str = "tags"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    prompt: str = "prompt"
    start: str | None = None  # how every ending of a choice begins
    endings: tuple[str, ...] = ("ending0", "ending1", "ending2", "ending3")
    source: str = "source"
    target: str = "target"


class Data(Strict):
    """Where the text comes from and how it becomes samples."""

    format: (
        Literal["python_docs", "text", "jsonl", "parquet", "hub", "csv", "tsv", "columns", "json", "conll", "synthetic"]
        | None
    ) = "python_docs"  # None: by each file's suffix, or the hub
    path: Name | tuple[Name, ...] | None = None  # files, globs, or hub names as owner/name[:config]
    column: str = "text"
    split: str = "train"
    streaming: bool = True  # hub only
    documents: str = "blank_line"  # text only: blank_line, file, or a regex of a document's first line
    language: str = "en"  # ISO code; its rules split paragraphs into sentences
    on_error: Literal["raise", "skip"] = "raise"  # a bad line or file: stop, or count it and go on
    holdout: Fraction = 0.05  # share of the documents (of the rows without data.eval) kept out of training
    max_length: Positive = 128
    max_predictions: Positive = 20
    mask_rate: float = Field(0.15, gt=0, lt=1)
    whole_word: bool = False
    short_rate: Fraction = 0.1
    dynamic: bool = True  # draw pairs and masks anew each epoch
    workers: Annotated[int, Field(ge=0)] = 1
    cache_dir: Name | None = None  # None: <the user's cache>/deepspeed-toolkit/data
    # Tables of labelled rows: files, or hub names as owner/name[:config][@split]
    train: Name | None = None
    eval: Name | dict[str, Name] | None = None  # several by name: the first decides
    test: Name | dict[str, Name] | None = None
    columns: Columns = Columns()
    header: bool | None = True  # csv, tsv, columns: the first line names the columns; None: unless it is all numbers
    labels: tuple[str, ...] | None = None  # in the order of their numbers; None: those of data.train, sorted
    label_separator: str | None = Field(None, min_length=1)  # multi_label: between labels in a cell; None: it is a list
    joiner: Literal[" ", ""] = " "  # tagged words: what stands between them; '' in scripts without spaces
    range: tuple[float, float] | None = None  # regression: the least and the largest score
    # Linear regression: the column to predict, by name or by number from 0 (None: the last), columns to leave out,
    # and how many synthetic rows of how many features with noise of which standard deviation
    target: str | None = None
    drop: tuple[str, ...] = ()
    rows: Positive = 100_000
    features: Positive = 32
    noise: float = Field(1.0, ge=0)
    padding: Literal["longest", "max_length"] = "longest"  # of the micro-batch, or always to data.max_length
    group_by_length: bool = True  # a step's samples are of like length, which saves padding


class Task(Strict):
    """What the model learns."""

    name: str = "pretrain"
    kind: Annotated[str, AfterValidator(known)] = "pretrain"  # one of toolkit/config/kinds.py
    objective: Literal["mlm_nsp", "mlm", "sop"] = "mlm_nsp"
    metrics: tuple[str, ...] = ()
    best: str | None = None  # the metric that chooses the checkpoint to keep; None: the first of metrics
    threshold: Fraction = 0.5  # multi_label: the probability from which a label is said to apply
    # How the files' tags spell entities; they are IOB2 within
    scheme: Literal["iob1", "iob2", "ioe1", "ioe2", "iobes", "bilou", "bmes"] = "iob2"
    stride: Positive = 128  # span_qa: tokens by which the windows of a long context are apart
    max_question: Positive = 64  # tokens
    max_answer: Positive = 30  # tokens
    n_best: Positive = 20
    null_answers: bool = False  # questions may have no answer (SQuAD v2.0)
    # translate: files <prefix>.<source>[.gz] and <prefix>.<target>[.gz] are aligned line by line
    source: str = "source"
    target: str = "target"
    # What a tokenizer of many languages (mBART, M2M100, NLLB) calls them; None: its codes for task.source and .target,
    # of which the language is enough, as de of de_DE and deu of deu_Latn
    source_code: str | None = None
    target_code: str | None = None
    prefix: str = ""  # before each source sentence, as T5 wants it: "translate English to German: "
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # in training; evaluation is the plain cross-entropy
    beams: Positive = 4  # of the translations at the end
    eval_beams: Positive = 1  # of those during training
    # A translation's score is its log-likelihood divided by length ** length_penalty: Hugging Face's rule, where
    # Wu et al. 2016 divide by ((5 + length) / 6) ** alpha. Above 0 it favours longer ones.
    length_penalty: float = 0.6
    max_target: Positive = 128  # tokens of a translation
    loss: Literal["mae", "mse", "huber"] = "mse"  # linear
    huber_delta: float = Field(1.35, gt=0)  # where Huber's loss turns linear, in standard deviations of the target


class Schedule(Strict):
    """The learning rate over the run; ``warmup`` counts steps from 1, below 1 it is a share of train.steps."""

    # none: deepspeed.scheduler decides
    name: Literal["linear", "cosine", "inverse_sqrt", "constant", "none"] = "linear"
    warmup: float = Field(0.01, ge=0)
    decay_steps: Positive | None = None  # where linear and cosine reach 0; None: train.steps

    @field_validator("warmup")
    @classmethod
    def _whole_steps(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("a warm-up of 1 or more counts steps and must be whole")
        return value


class Activation(Strict):
    """What happens to the activations that the backward pass needs."""

    recompute: bool = False  # keep only each layer's input, run its forward again in the backward pass
    offload: bool = False  # what is kept of the layers waits on the host


class Pipeline(Strict):
    """The model cut into stages, one after the other on ranks of their own; micro-batches flow through them."""

    stages: Positive = 1
    schedule: Literal["1f1b", "gpipe", "dualpipev"] = "1f1b"
    # parameters: equally many in each stage; time: as long a forward pass; uniform: as many layers; or the first
    # layer of each stage but the first, e.g. [4] for two stages
    partition: Literal["parameters", "time", "uniform"] | tuple[Positive, ...] = "parameters"


class Machine(Strict):
    """What one device can do, for MFU and plans; None is unknown, peaks are then looked up by its name, or measured."""

    name: str = "this"
    device: Literal["cuda", "cpu", "ipu"] = "cuda"  # AMD's GPUs are cuda to PyTorch, too
    device_name: str | None = None  # words of torch.cuda.get_device_name()
    year: Positive | None = None  # of its first delivery
    memory_gib: float | None = Field(None, gt=0)  # what sheets call GB
    bandwidth_gbs: float | None = Field(None, gt=0)  # GB/s of its memory
    link_gbs: float | None = Field(None, gt=0)  # GB/s to the other devices of the host, one way; sheets add both ways
    peak_tflops: dict[Dtype, float] = {}  # dense, by input type
    launch_us: float | None = Field(None, ge=0)  # that a matrix product takes before it begins
    source: str | None = None
    # The node that it is part of, and how many of these a plan is for
    nodes: Positive = 1
    devices_per_node: Positive = 1
    node_link_gbs: float | None = Field(None, gt=0)  # GB/s from one node to the others, one way, all its ports together
    host_memory_gib: float | None = Field(None, gt=0)
    pcie_gbs: float | None = Field(None, gt=0)  # GB/s between a device and the host, one way
    nvme_gib: float | None = Field(None, gt=0)
    nvme_gbs: float | None = Field(None, gt=0)  # GB/s to and from all drives of a node
    node_source: str | None = None
    # What `toolkit plan --calibrate` adds: the share of peak_tflops that steps reach (else assumptions.py's), and which
    # keys were measured: links among them need no allowance
    efficiency: dict[Dtype, Annotated[float, Field(gt=0, le=1)]] = {}
    measured: tuple[
        Literal["peak_tflops", "launch_us", "efficiency", "bandwidth_gbs", "link_gbs", "pcie_gbs", "nvme_gbs"], ...
    ] = ()


class Planning(Strict):
    """What a run makes of its own plan."""

    enforce: bool = True  # refuse to start where the plan says that memory or drives are too small


Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9./][\w./:@+=-]*$")]  # neither an option nor anything for a shell
SECRET = r"(?i)token(?!izers_)|secret|passw|credential|api_?key|access_?key"
SECRET_VALUE = r"hf_|gh[a-z]_|github_pat_|sk-|xox|AKIA|eyJ"


class Kubernetes(Strict):
    """What only a manifest says."""

    kind: Literal["pytorchjob", "trainjob", "mpijob", "jobset"] = "pytorchjob"
    namespace: Word = "default"
    claim: Word = "runs"  # the PersistentVolumeClaim (ReadWriteMany) that holds output_dir
    node_selector: dict[Word, Word] = {}
    secret: Word | None = None  # a Secret whose keys become environment variables, tokens above all


class Cluster(Strict):
    """The hosts that `toolkit launch` starts a run on; the run itself reads nothing of it."""

    nodes: Positive | None = None  # None: as many as the hostfile has, or machine.nodes
    devices_per_node: Positive | None = None  # ranks on each; None: the hostfile's slots, or 1
    accelerator: Literal["cuda", "cpu"] = "cuda"
    hostfile: str | None = None  # lines of `host slots=8`
    interface: Word | None = None  # the network interface for gloo and NCCL, e.g. eth0
    master_addr: Host | None = None  # None: the first host
    master_port: Annotated[int, Field(gt=1023, lt=65536)] | None = None  # None: 29500; under Slurm by the job's number
    restarts: Annotated[int, Field(ge=0)] = 0  # how often a run that failed or was stopped is started again
    environment: dict[str, str] = {}  # of every rank; no secrets
    image: Word | None = None
    container: Literal["none", "pyxis", "apptainer"] = "none"  # how Slurm runs the image
    workdir: Word = "/workspace"  # in the image: where the recipes are
    mounts: tuple[Annotated[str, Field(pattern=r"^[^\s,:-][^\s,:]*:/[^\s,:]*(:ro)?$")], ...] = ()  # host:container[:ro]
    shm_gib: Positive = 16  # /dev/shm of a container
    slurm: dict[str, str | bool] = {}  # sbatch's options: {partition: gpu, cpus_per_task: 8, exclusive: true}
    kubernetes: Kubernetes = Kubernetes()

    @property
    def variables(self) -> dict[str, str]:
        """What every rank finds in its environment."""
        sockets = {name: self.interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if self.interface}
        return ({"DS_ACCELERATOR": "cpu"} if self.accelerator == "cpu" else {}) | sockets | self.environment

    @field_validator("environment")
    @classmethod
    def _plain_and_public(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if re.search(SECRET, name) or re.match(SECRET_VALUE, text):  # not ValueError: it would show the value
                raise ConfigError(
                    f"cluster.environment.{name}: looks like a secret, and scripts, manifests and logs would show it. "
                    "Export it in the shell or mount it (docs/clusters.md)."
                )
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or not re.fullmatch(r"[\w@%+=:,./ -]*", text):
                raise ValueError(f"{name} must be a name, and its value of letters, digits, blanks and @%+=:,./_-")
        return value

    @field_validator("slurm")
    @classmethod
    def _options(cls, value: dict[str, str | bool]) -> dict[str, str | bool]:
        for name, text in value.items():
            if not re.fullmatch(r"[a-z][a-z_-]*", name) or re.search(r"[\s'\"\\]", str(text)):
                raise ValueError(f"{name} must be an option of sbatch, its value without blanks and quotes")
            if name.replace("_", "-") in ("nodes", "ntasks", "ntasks-per-node"):
                raise ValueError(f"{name} follows from cluster.nodes and cluster.devices_per_node. Drop it")
        return value


class RunConfig(Strict):
    """Everything that defines a run; ``config.yaml`` in the run directory is exactly this."""

    name: str | None = None  # None: derived once on rank 0 from task and time
    output_dir: str = "runs"
    seed: Seed = 42
    seeds: tuple[Seed, ...] = ()  # a training for each; what is held out stays the same
    resume: str = "auto"  # auto, never, or the path of a checkpoint
    train: Train = Train()
    batch: Batch = Batch()
    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    task: Task = Task()
    schedule: Schedule = Schedule()
    activation: Activation = Activation()
    pipeline: Pipeline = Pipeline()
    machine: Machine = Machine()
    plan: Planning = Planning()
    cluster: Cluster = Cluster()
    deepspeed: dict[str, Any] = {}  # DeepSpeed's JSON, checked by toolkit.deepspeed.ds_config

    @cached_property
    def typed(self) -> frozenset[str]:
        """Keys that a command line has set, no preset or saved file; of :func:`load`, neither saved nor compared."""
        return frozenset()

    @property
    def tensor_size(self) -> int:
        """Ranks that share each layer."""
        block = self.deepspeed.get("tensor_parallel")
        size = block.get("autotp_size") if isinstance(block, Mapping) else None
        return size if isinstance(size, int) and size > 0 else 1

    @property
    def split(self) -> int:
        """Ranks that one copy of the model takes; all others repeat it on other data (but for ZeRO)."""
        return self.pipeline.stages * self.tensor_size

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str | None) -> str | None:
        if value is not None and (value.strip(". ") == "" or "/" in value):
            raise ValueError("a run's name is one folder below output_dir, without '/'")
        return value


def schema(model: type[RunConfig] = RunConfig) -> dict[str, Any]:
    """The defaults as a plain dict: what Hydra composes the groups upon."""
    return model().model_dump(mode="json")


def conf_dir() -> Path:
    """The folder of Hydra groups: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    return next(d for d in (package / "conf", package.parent / "conf") if d.is_dir())


def cache_dir(kind: str) -> Path:
    """``~/.cache/deepspeed-toolkit/<kind>``, honouring XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "deepspeed-toolkit" / kind


def load(cfg: Any, model: type[RunConfig] = RunConfig, typed: Iterable[str] = ()) -> RunConfig:
    """Check a composed config (DictConfig or dict) against ``model``; ``typed`` keys of it are the user's own. Raises
    ConfigError naming every bad key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    except OmegaConfBaseException as error:
        what = f"{getattr(error, 'full_key', None) or 'config'}: {str(error.msg).splitlines()[0]}"
        raise ConfigError(f"{what}. Correct it; what is text and no interpolation is typed \\${{…}}.") from error
    try:
        config = model.model_validate(plain)
    except ValidationError as error:
        lines: dict[str, list[str]] = {}
        for key, said in (_explain(one, model) for one in error.errors()):
            lines.setdefault(key, []).append(said)
        raise ConfigError("\n".join(f"{key}: {' or: '.join(said)}." for key, said in lines.items())) from error
    config.__dict__["typed"] = frozenset(typed)
    return config


_OF_A_UNION = re.compile(r"(constrained-)?(str|int|float)|\w+\[.*")  # what pydantic puts behind the key


def _explain(error: Any, model: type[BaseModel]) -> tuple[str, str]:
    """What was set, and what is wrong with it."""
    loc = [part for part in error["loc"] if not _OF_A_UNION.fullmatch(str(part))]
    key = ".".join(map(str, loc))
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, loc[:-1])
        return key, f"unknown key.{nearest(str(loc[-1]), known)} Known: {', '.join(known)}"
    if error["type"] in ("model_type", "dict_type") and isinstance(error["input"], str) and loc == [*error["loc"]]:
        known = _keys_at(model, loc) if error["type"] == "model_type" else ["…"]
        named = ", ".join(f"{key}.{k}" for k in known) + " (a file of them: toolkit check)" * (key == "deepspeed")
        return f"{key}={error['input']}", f"is no value but a node of keys: {named}"
    said = error["msg"].removeprefix("Value error, ").replace("valid tuple", "list, as [a,b]")
    return f"{key}={error['input']!r}", said


def _keys_at(model: type[BaseModel], loc: list[Any]) -> list[str]:
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        options = getattr(annotation, "__args__", (annotation,))
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{'a': {'b': 1}}`` as ``{'a.b': 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        flat |= dotted(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat
