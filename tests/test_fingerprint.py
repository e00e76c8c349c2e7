"""What differs between the hosts of a job is found and said; test_hosts.py has two real ones."""

import json

from launching import python

from toolkit.config.compose import compose
from toolkit.job import fingerprint

SAME = {"configuration": "c1", "python": "3.11.7", "torch": "2.13.0", "commit": "a1", "code": "b1"}


def test_ranks_that_agree_are_not_mentioned() -> None:
    assert fingerprint.differences([("n1", SAME), ("n2", dict(SAME))]) == []


def test_each_host_and_thing_that_differs_is_named_once() -> None:
    old = SAME | {"torch": "2.12.0", "code": "b0"}
    torch, code = fingerprint.differences([("n1", SAME), ("n1", SAME), ("n2", old), ("n2", old)])
    assert torch.startswith("host n2 (rank 2, 3): torch 2.12.0, but rank 0's host n1 has 2.13.0. Install the same")
    assert code.startswith("host n2 (rank 2, 3): code b0, but rank 0's host n1 has b1. Put every node on the same")


def test_a_configuration_has_one_hash_and_another_has_another() -> None:
    first, same, other = (fingerprint.of(compose(o)) for o in (["seed=1"], ["seed=1"], ["seed=2"]))
    assert first == same != other


def test_a_hosts_fingerprint_is_a_line_of_json_and_follows_the_code() -> None:
    printed = python("-m", "toolkit.job.fingerprint").stdout
    assert json.loads(printed).keys() == fingerprint.here().keys()
    assert json.loads(printed)["torch"].startswith("2.")
