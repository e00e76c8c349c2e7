"""A hostfile is DeepSpeed's, and what it names goes to ssh and to shells."""

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from toolkit.cluster.launchers.job import slots
from toolkit.errors import ConfigError

WRONG = [
    ("alpha slots=2\n-oProxyCommand=reboot slots=1\n", "hosts, line 2: '-oProxyCommand=reboot slots=1': must be `host"),
    ("-V slots=2\n", "hosts, line 1: '-V slots=2': must be"),  # a name but for its dash
    ("-l@alpha slots=2\n", "hosts, line 1: '-l@alpha slots=2': must be"),
    ("alpha;reboot slots=2\n", "hosts, line 1: .*must be"),
    ("$(reboot) slots=2\n", "hosts, line 1: .*must be"),
    ("alpha\n", "hosts, line 1: 'alpha': must be"),
    ("alpha slots=0\n", "hosts, line 1: 'alpha slots=0': must be"),
    ("alpha slots=2\n\nalpha slots=1\n", "hosts, line 3: .*a second line for this host"),
    ("# none\n\n", "--hostfile .*hosts: no host in it"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_hostfile_that_is_wrong_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        slots("--hostfile", tmp_path / "hosts")


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# the cluster\n\n  node-1.lan   slots=8 # first\nnode_2 slots=4\n")
    found = slots("--hostfile", tmp_path / "hosts")
    assert list(found.items()) == [("node-1.lan", 8), ("node_2", 4)]
    assert found == dict(fetch_hostfile(str(tmp_path / "hosts")))
