"""The grammar of what is typed: what is a flag, what an override, and what Hydra makes of both."""

import re

import pytest
from hydra._internal.utils import get_args_parser

from toolkit.config.compose import compose
from toolkit.config.overrides import permissive, setting, split, values
from toolkit.errors import ConfigError

FLAGS = [
    (["--config-path", "/x/runs/lr=1"], {"config_path": "/x/runs/lr=1"}),
    (["--config-path=/x/runs/lr=1"], {"config_path": "/x/runs/lr=1"}),
    (["-cp", "/x/runs/lr=1"], {"config_path": "/x/runs/lr=1"}),
    (["-cp=/x"], {"config_path": "/x"}),
    (["--config-name", "a=1"], {"config_name": "a=1"}),
    (["-cn", "config"], {"config_name": "config"}),
    (["-cn=config"], {"config_name": "config"}),
    (["--config-dir", "/x/y=2"], {"config_dir": "/x/y=2"}),
    (["--multirun"], {"multirun": True}),
    (["-m"], {"multirun": True}),
    (["--cfg", "job"], {"cfg": "job"}),
    (["--cfg=job", "--resolve"], {"cfg": "job", "resolve": True}),
    (["-c", "job"], {"cfg": "job"}),
    (["--info"], {"info": "all"}),
    (["--info", "defaults-tree"], {"info": "defaults-tree"}),
    (["-i"], {"info": "all"}),
    (["--cfg", "job", "--package", "train"], {"cfg": "job", "package": "train"}),
    (["-c=job", "-p", "a.b"], {"cfg": "job", "package": "a.b"}),
    (["--help"], {"help": True}),
    (["--hydra-help"], {"hydra_help": True}),
    (["-cp", "/x/lr=1", "-cn", "config", "-m"], {"config_path": "/x/lr=1", "config_name": "config", "multirun": True}),
]
OVERRIDES = [
    "lr=1", "data.path='/a b/*.txt'", 'task="sst2"', "data.documents='^= .* =$'", "~x", "~deepspeed.a=1", "+x=1",
    "++a.b=[1,2]", "a={b:1,c:[2]}", "zero=stage1,stage2", "zero@here=stage1", "data=files/sst2", "hydra/launcher=basic",
    "experiment=null", "lr=-1", "x=",
]  # fmt: skip


@pytest.mark.parametrize(("flags", "meant"), FLAGS, ids=[" ".join(flags) for flags, _ in FLAGS])
def test_a_flag_keeps_its_value_wherever_it_stands_among_overrides(flags: list[str], meant: dict[str, object]) -> None:
    half = len(OVERRIDES) // 2
    around = [[*flags, *OVERRIDES], [*OVERRIDES, *flags], [*OVERRIDES[:half], *flags, *OVERRIDES[half:]]]
    if flags[-1] in ("--info", "-i"):  # it takes the next word, also in Hydra
        around = around[1:2]
    for arguments in around:
        typed = split(arguments)
        assert (typed.overrides, typed.flags) == (OVERRIDES, flags)
        found = get_args_parser().parse_args([*typed.overrides, *typed.flags])  # as hydra.main reads them
        assert found.overrides == OVERRIDES
        assert {name: getattr(found, name) for name in meant} == meant
        assert typed.multirun == ("multirun" in meant)


def test_flags_on_both_sides_and_an_override_like_a_flags_value() -> None:
    typed = split(["lr=1", "--config-path", "lr=1", "lr=1", "-m", "seed=1,2"])
    assert typed.overrides == ["lr=1", "lr=1", "seed=1,2"] and typed.flags == ["--config-path", "lr=1", "-m"]
    assert typed.config == "--config-path" and split(["-cn", "config"]).config == "--config-name"
    assert split(["seed=1"]).config is None and split([]).overrides == []


def test_a_flag_that_hydra_does_not_know_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        split(["seed=1", "--multirn"])
    assert ended.value.code == 2 and "--multirn" in capsys.readouterr().err


def test_every_key_is_let_through_and_hydras_own_syntax_stays() -> None:
    kept = ["+x=1", "++a.b=2", "~data.path", "~x=1", "zero=stage1,stage2", "zero=choice(stage1,stage3)", "zero=glob(*)",
            "hydra.verbose=true", "hydra/launcher=submitit_slurm", "data=files/sst2", "experiment=[smoke]",
            'task="sst2"', "zero@here=stage1", "here@there=x"]  # fmt: skip
    assert permissive(kept) == kept
    given = ["seed=1", "a.b='x=y'", "train.steps=1,2", "hydrate=1", "deepspeed.optimizer={type: SGD}", "a-b=1", "x="]
    assert permissive(given) == [f"++{o}" for o in given]
    assert permissive(["experiment=null", "loss@here=null"]) == ["experiment=[]", "loss@here=[]"]


@pytest.mark.parametrize("value", ["stage9", "'stage9'", '"stage9"', "[stage1,stage9]", "stage1,stage9", "2", "true",
                                   "stage1,'stage9'", "choice(stage1,stage9)", "stage1,null"])  # fmt: skip
def test_an_option_that_is_not_there_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^zero={re.escape(value)}: no such option\..*zero has: stage0, stage1, "):
        permissive([f"zero={value}"])


@pytest.mark.parametrize("override", ["a=b=c", "train.steps", "=", "data.path=(x", "x=[1"])
def test_what_is_no_override_is_one_line(override: str) -> None:
    with pytest.raises(ConfigError, match="no override of Hydra's: ") as error:
        permissive([override])
    assert str(error.value).startswith(f"{override}: ") and "\n" not in str(error.value)


def test_null_and_quoted_options_compose() -> None:
    plain = compose([])
    assert compose(["experiment=null", "loss=null"]) == plain
    assert compose(["experiment=smoke", "experiment=null"]) == plain, "the last counts"
    assert "zero_optimization" not in compose(["zero=null"]).deepspeed
    assert compose(['task="sst2"']) == compose(["task='sst2'"]) == compose(["task=sst2"]) != plain


def test_the_last_value_of_a_key_counts() -> None:
    given = ["zero='stage3'", "+seed=1", "seed=2", "loss=mae", "~loss", "experiment=null", "task=[a,b]"]
    assert values(given) == {"zero": "stage3", "seed": 2, "loss": None, "experiment": None, "task": ["a", "b"]}


TEXTS = ["/a/b.txt", "/a b/*.txt", "it's", '"quoted"', "a=b,c", "null", "1e3", "é#$()", "a\\b"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_setting_is_just_its_text(text: str) -> None:
    assert values([setting("data.path", text)]) == {"data.path": text}
    assert compose([setting("data.path", text)]).data.path == text
