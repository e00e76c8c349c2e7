"""`toolkit check`: files as people have them, what is found in which line, and DeepSpeed's own verdict beside it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cli.main import main
from toolkit.deepspeed import ds_config, rules
from toolkit.deepspeed.check import FILE_RULES, NOTES, check
from toolkit.errors import ConfigError, PlanError
from toolkit.plan.shapes import named_shape

RIGHT = """{
  "train_batch_size": 64,
  "train_micro_batch_size_per_gpu": 4,
  "gradient_accumulation_steps": 2,
  "_comment": "DeepSpeed reads no key that it does not know here",
  "gradient_clipping": 1.0,
  "steps_per_print": 100,
  "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
  "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 2e-4, "warmup_num_steps": 1e3}},
  "bf16": {"enabled": true},
  "zero_optimization": {
    "stage": 3, "overlap_comm": true, "reduce_bucket_size": 5e7, "stage3_param_persistence_threshold": 1e5,
    "offload_optimizer": {"device": "cpu", "pin_memory": true}
  },
  "data_efficiency": {"data_sampling": {"metrics": [{"name": "length"}, {"name": "rarity"}]}},
  "activation_checkpointing": {"partition_activations": true},
  "flops_profiler": {"enabled": false, "profile_step": 3},
  "wall_clock_breakdown": false
}
"""
TRAINER = """{
  "train_micro_batch_size_per_gpu": "auto",
  "fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2},
  "bf16": {"enabled": "auto"},
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
  "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": "auto"}},
  "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
}
"""
OVERLAP = '{"train_batch_size": 8,\n "zero_optimization": {"stage": 2,\n  "overlap_comm": true%s}}'
ADAM = '{"train_batch_size": 8,\n "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},\n "scheduler": {"type": '

# what the file is, rule, line, a part of the message
TABLE = [
    ('{"train_batch_size": 8,\n "fp16": {"enabled" true}}', "syntax", 2, "no JSON: Expecting ':' delimiter"),
    ("", "syntax", 1, "no JSON: Expecting value"),
    ('[{"train_batch_size": 8}]', "syntax", 1, "no object"),
    ('{"train_batch_size": ' + "9" * 5000 + "}", "syntax", 1, "no JSON that can be read"),
    ("[" * 100_000, "syntax", 1, "no JSON that can be read"),
    ('{"hidden_size": 768,\n "model_type": "bert"}', "not_deepspeed", 1, "hardly one key is DeepSpeed's"),
    ('{"train_batch_size": 8, // all ranks\n "x": "http://a#b"}', "hjson", 1, "a comment: DeepSpeed reads Hjson"),
    ('{"train_batch_size": 8, /*\n*/ "fp16": {"enabled": true,\n }}', "hjson", 2, "a comma before a closing bracket"),
    (
        '{"train_batch_size": 8, "bf16": {},\n "train_batch_size": 16}',
        "duplicate_key",
        2,
        "train_batch_size is given twice, first in line 1: DeepSpeed refuses",
    ),
    ("{}", "batch_missing", None, "both missing"),
    ('{"train_batch_size":\n 10,\n "train_micro_batch_size_per_gpu": 4}', "batch_multiple", 1, "no number of ranks"),
    ('{"train_batch_size": 8,\n\n "gradient_clip": 1}', "unknown_key", 3, "Did you mean 'gradient_clipping'?"),
    ('{"train_batch_size": 8,\n "gradient clip": 1}', "unknown_key", 2, "Did you mean 'gradient_clipping'?"),
    ('{"train_batch_size": 8,\n "pipeline": {\n "stage": 2}}', "unknown_key", 3, "Did you mean 'stages'?"),
    (
        '{"train_batch_size": 8, "zero_optimization": {\n "cpu_offload_params": true}}',
        "unknown_key",
        2,
        "Did you mean 'offload_param'?",
    ),
    ('{"train_batch_size": 8,\n "zero_optimization": {\n "cpu_offload": true}}', "replaced_key", 3, "renamed"),
    ('{"train_batch_size": 8,\n "amp": {"enabled": false}}', "removed_key", 2, "Use DeepSpeed 'fp16', 'bf16'"),
    ('{"train_batch_size": 8,\n "optimizer": {\n "type": "ZeroOneAdam"}}', "removed_optimizer", 3, "Use AdamW."),
    ('{"train_batch_size": 8,\n "zero_optimization": true}', "zero_flag", 2, 'the old form of {"stage": 1}'),
    ('{"train_batch_size": 8,\n "steps_per_print": "auto"}', "auto", 2, "nothing, Hugging Face's Trainer neither"),
    (TRAINER, "auto_filled", 2, "is filled in by Hugging Face's Trainer and accelerate only"),
    ('{"train_batch_size": 8,\n "fp16": {"loss_scale": 0}}', "enabled", 2, "fp16 without effect: it is off"),
    (
        '{"train_batch_size": 8,\n "zero_optimization": {"stage": 1,\n "offload_param": {\n "device": "cpu"}}}',
        "param_offload_stage",
        4,
        "Use zero_optimization.stage=3, or zero_optimization.offload_optimizer.device=cpu.",
    ),
    (ADAM + '"WarmupDecayLR", "params": {"total_num_steps": 9999}}}', "scheduler_rate", 3, "replaces optimizer.params"),
    (ADAM + '"WarmupLR", "params": {\n "warmup_max_lr": 0.01}}}', "two_rates", 4, "warmup_max_lr=0.01 replaces"),
    (ADAM + '"OneCycle", "params": {"cycle_min_lr": 1e-5,\n "cycle_max_lr": 1}}}', "two_rates", 4, "cycle_max_lr=1"),
    (OVERLAP % "", "bucket_overlap", 2, "is not below the 110,000,000 parameters"),
    ('{"train_batch_size": 8,\n "zero_optimization": {"stage": 3}}', "bucket_overlap", 2, "nothing overlaps"),
    (OVERLAP.replace("true", "false") % "", "overlap_off", 3, "Set it to true"),
]  # fmt: skip


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "ds_config.json"
    file.write_text(text)
    return file


@pytest.mark.parametrize(("text", "rule", "line", "message"), TABLE, ids=lambda v: str(v)[:30])
def test_what_is_wrong_is_found_in_its_line(
    text: str, rule: str, line: int | None, message: str, tmp_path: Path
) -> None:
    found = check(write(tmp_path, text), parameters=110_000_000)
    assert (rule, line) in [(f.rule, f.line) for f in found if message in f.text]
    assert all(f.level == ("note" if f.rule in NOTES else "problem") for f in found)


def test_every_rule_of_files_has_a_row() -> None:
    own = {"auto_filled", "duplicate_key", "hjson", "not_deepspeed", "syntax", "zero_flag"}
    assert not {*FILE_RULES, *own} - {row[1] for row in TABLE}
    assert not NOTES - {*FILE_RULES, *own, *rules.RULES, "replaced_key"}


@pytest.mark.parametrize("world", [None, 8])
def test_a_right_file_has_nothing_to_find(world: int | None, tmp_path: Path) -> None:
    assert check(write(tmp_path, RIGHT), world=world, parameters=7_000_000_000) == []


def test_batches_are_multiplied_only_where_the_ranks_are_known(tmp_path: Path) -> None:
    odd = RIGHT.replace("64", "65")
    assert [f.rule for f in check(write(tmp_path, odd), world=8)] == ["batch_product"]
    assert [f.rule for f in check(write(tmp_path, odd))] == ["batch_multiple"]


def test_ranks_that_share_a_model_count_once(tmp_path: Path) -> None:
    file = write(tmp_path, RIGHT.replace('"bf16"', '"tensor_parallel": {"autotp_size": 2},\n  "bf16"'))
    assert check(file, world=16) == []
    assert [(f.rule, f.line) for f in check(file, world=15)] == [("ranks", 10)]


def test_our_own_presets_have_no_problem() -> None:
    for file in (Path(__file__).parent / "golden").glob("*.json"):
        assert not [f for f in check(file, world=2, parameters=110_000_000) if f.level == "problem"], file


def test_a_removed_optimizer_is_told_once(tmp_path: Path) -> None:
    text = '{"train_batch_size": 8, "optimizer": {"type": "OneBitAdam"}, "zero_optimization": {"stage": 3}}'
    assert [f.rule for f in check(write(tmp_path, text), world=8)] == ["removed_optimizer"]


def test_an_unknown_key_is_told_once(tmp_path: Path) -> None:
    text = '{"train_batch_size": 8, "compile": {"backend": "inductor"}, "a.b": {"c": "auto"}}'
    assert [f.rule for f in check(write(tmp_path, text))] == ["unknown_key", "unknown_key"]


def test_values_that_others_fill_in_break_no_rule(tmp_path: Path) -> None:
    assert [f.rule for f in check(write(tmp_path, TRAINER))] == ["auto_filled"]


def test_messages_for_files_use_deepspeeds_words() -> None:
    for name, (_, say) in rules.RULES.items():
        for preset, key in rules.IN_A_FILE.items():
            say = say.replace(preset, key)
        assert not re.search(r"(?<![\w.])(zero|offload|precision|optimizer|schedule|parallel|train\.\w+)=", say), name


def test_deepspeed_itself_is_of_the_same_mind(tmp_path: Path) -> None:
    """Of its refusals none is missed; of what it takes, only what it ignores in silence is called a problem."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    in_silence = {"unknown_key", "removed_optimizer", "auto", "enabled", "param_offload_stage", "scheduler_rate"}
    for text in [RIGHT, *(row[0] for row in TABLE if len(row[0]) < 1000 and row[0] and '"auto"' not in row[0])]:
        problems = {f.rule for f in check(write(tmp_path, text), world=1) if f.level == "problem"}
        try:
            DeepSpeedConfig(str(tmp_path / "ds_config.json"))
        except Exception:
            assert problems, text
        else:
            assert problems <= in_silence, text


@pytest.mark.parametrize(("text", "code"), [(RIGHT, 0), (TRAINER, 0), ('{"train_batch_size": 8,\n "x": 1}', 2)])
def test_the_exit_code_tells_problems_from_notes(
    text: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, text)
    for arguments in (["check", str(file)], ["check", str(file), "--json"]):
        if code:
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == code
        else:
            main(arguments)
    *lines, last = capsys.readouterr().out.split("{\n", 1)[0].splitlines()
    assert last.startswith(f"{file}: {'1' if code else 'no'} problem")
    assert not code or lines == [f"{file}:2: problem: x: DeepSpeed knows no such key. Drop it."]


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", str(write(tmp_path, '{"train_batch_size": 8,\n "x": 1}')), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["problems"], found["notes"], found["deepspeed"]) == (1, 0, ds_config.known()["deepspeed"])
    assert found["findings"][0]["line"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world", "0"], "--world 0: there is one at least"),
        (["--parameters", "nan"], "--parameters nan"),
        (["--model", "bert_bas"], "Did you mean 'bert_base'?"),
    ],
)
def test_bad_options_give_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["check", str(write(tmp_path, RIGHT)), *options])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_that_is_not_there_or_no_text_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("binary", "missing", "."):
        with pytest.raises(ConfigError, match="cannot be read"):
            check(tmp_path / name)


def test_a_models_size_comes_from_a_preset_or_a_folder(tmp_path: Path) -> None:
    assert named_shape("bert_base").parameters == pytest.approx(110e6, rel=0.02)
    assert named_shape("transformer_base").type == "marian"
    for kind, message in {"llama": "a llama model's size is not known here", "bert": "lacks a size"}.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "hidden_size": 64}))
        with pytest.raises(PlanError, match=message):
            named_shape(str(tmp_path))


def test_checking_a_file_loads_no_torch(tmp_path: Path) -> None:
    file = write(tmp_path, RIGHT)
    code = f"import sys; from toolkit.cli.main import main; main(['check', {str(file)!r}, '--parameters', '7e9'])"
    code += "; sys.exit(bool({'torch', 'deepspeed', 'transformers', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
