"""Counts and first reasons, whole losses refused, losses of more than half told."""

import pytest

from megatron_medllm.account import Account
from megatron_medllm.errors import UserError


def filled() -> Account:
    account = Account("documents")
    account.keep("a", 3)
    account.lose("a", "not JSON", "a.jsonl:2: not JSON: column 7")
    account.lose("a", "not JSON", "a.jsonl:9: not JSON: column 1")
    account.lose("a", "too short", "a.jsonl:4: 3 characters", count=2)
    account.lose("b", "not UTF-8", "b.txt:1: not UTF-8", count=5)
    return account


def test_counts_and_the_first_of_each_kind_are_told():
    assert filled().lines() == [
        "a: 3 documents kept",
        "b: 0 documents kept",
        "a: lost 2 (not JSON), first a.jsonl:2: not JSON: column 7",
        "a: lost 2 (too short), first a.jsonl:4: 3 characters",
        "b: lost 5 (not UTF-8), first b.txt:1: not UTF-8",
        "warning: a lost 4 of 7 documents (mostly: not JSON)",
        "warning: b lost 5 of 5 documents (mostly: not UTF-8)",
    ]


def test_half_is_not_more_than_half():
    account = Account("pairs")
    account.keep("tier", 2)
    account.lose("tier", "copy", "p:1: copy", count=2)
    assert account.warnings() == []
    account.lose("tier", "copy", "p:2: copy")
    assert account.warnings() == ["tier lost 3 of 5 pairs (mostly: copy)"]


def test_a_subject_without_anything_left_stops_the_stage():
    account = filled()
    account.require("mend it", subject="a")
    with pytest.raises(UserError) as caught:
        account.require("set `encoding`")
    assert str(caught.value) == (
        "b: none of 5 documents is left (not UTF-8: 5, first b.txt:1: not UTF-8); set `encoding`"
    )
    account.keep("b")
    account.require("mend it")
    account.subject("c")
    with pytest.raises(UserError, match=r"^c: no documents at all; give it some$"):
        account.require("give it some")


def test_nothing_lost_leaves_no_kind():
    account = Account("rows")
    account.lose("s", "too long", "", count=0)
    account.keep("s")
    assert account.lines() == ["s: 1 rows kept"]


def test_a_manifest_gives_it_back_and_accounts_add_up():
    account = filled()
    assert Account.from_json(account.to_json()).to_json() == account.to_json()
    account.add(filled())
    assert account.subjects["a"].kept == 6
    assert account.subjects["a"].lost["not JSON"].count == 4
    assert account.subjects["a"].lost["not JSON"].first == "a.jsonl:2: not JSON: column 7"
