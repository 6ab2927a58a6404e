"""The tree of tenants: exact accounts, and what is owed when somebody comes, goes, or is given another weight."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.config import EngineConfig
from tandem.engine.costs import PICO
from tandem.engine.share import UNIT, Shares, Terms, Tree, read_shares, shares_of, tree_of
from tandem.errors import ConfigError

weights = st.floats(1e-3, 1e6, allow_nan=False)


def tree(credit_s: float = 0.1, **tenants: Terms) -> Tree:
    return Tree(Shares(tenants, credit_s=credit_s))


@given(st.lists(st.integers(0, 10**13), max_size=60), weights)
def test_a_virtual_time_is_all_that_was_charged_over_the_weight(charges: list[int], weight: float) -> None:
    """Rounding that adds up: after a day of steps a tenant has had more or less than it was charged."""
    made = tree(a=Terms(weight), b=Terms(3.0))
    leaf = made.leaf("a", "p")
    made.enter(leaf)
    made.enter(made.leaf("b", "p"))
    for charge in charges:
        made.pay(leaf, charge)
        made.check_integrity()
    node = made.tenant("a")
    assert node.time == sum(charges) * UNIT // node.weight and node.weight == max(1, round(weight * UNIT))
    assert leaf.time == sum(charges) and made.root.had == node.had == leaf.had == sum(charges)


def test_what_siblings_are_owed_adds_up_to_nothing() -> None:
    """Lag that is made up: all are owed something, or all have had too much."""
    made = tree(a=Terms(1.0), b=Terms(2.0), c=Terms(5.0))
    for name in "abc":
        made.enter(made.leaf(name, "p"))
    for name, seconds in (("a", 3), ("b", 1), ("c", 4)):
        made.pay(made.leaf(name, "p"), seconds * PICO)
    lags = {name: made.tenant(name).lag / PICO for name in "abc"}
    assert lags == pytest.approx({"a": -2.0, "b": 1.0, "c": 1.0}, abs=1e-6)  # 8 s: 1, 2 and 5 were theirs


def test_who_idles_for_a_moment_keeps_its_debt() -> None:
    """A tenant that had twice its share goes away for a request, and is served as if it had had nothing."""
    made = tree(a=Terms(), b=Terms())
    a, b = made.leaf("a", "p"), made.leaf("b", "p")
    made.enter(a)
    made.enter(b)
    made.pay(a, 4 * PICO)
    made.leave(a)
    made.pay(b, PICO)
    made.enter(made.leaf("a", "other"))
    assert made.tenant("a").time - made.tenant("b").time == 3 * PICO
    made.leave(made.leaf("a", "other"))
    made.pay(b, 9 * PICO)
    made.enter(made.leaf("a", "other"))
    assert made.tenant("b").time - made.tenant("a").time == pytest.approx(0.1 * PICO)  # paid back, and a credit


def test_a_program_keeps_its_debt_too() -> None:
    """A program that ends and is asked again has a new account, and what it owes is forgotten."""
    made = tree()
    one, other = made.leaf("t", "one"), made.leaf("t", "other")
    made.enter(one)
    made.enter(other)
    made.pay(one, 2 * PICO)
    made.leave(one)
    assert made.leaf("t", "one") is one and one.time == 2 * PICO
    made.pay(other, 5 * PICO)
    made.enter(made.leaf("t", "third"))
    made.leave(made.leaf("t", "third"))  # somebody left: who owes nothing any more is forgotten
    assert made.leaf("t", "one") is not one


@given(st.floats(0, 5), weights, st.integers(0, 10**14))
def test_nobody_comes_back_to_more_than_a_credit(credit_s: float, weight: float, served: int) -> None:
    """A tenant saves up over a night, and has the engine to itself for the morning."""
    made = tree(credit_s, a=Terms(weight), b=Terms())
    a, b = made.leaf("a", "p"), made.leaf("b", "p")
    made.enter(a)
    made.leave(a)
    made.enter(b)
    made.pay(b, served)
    made.enter(made.leaf("a", "p"))
    node, now = made.tenant("a"), made.tenant("b").time
    assert node.time == max(0, now - int(credit_s * PICO) * UNIT // node.weight)


@given(st.lists(weights, min_size=2, max_size=5), weights, st.lists(st.integers(0, 10**13), min_size=5, max_size=5))
def test_another_weight_leaves_what_is_owed(own: list[float], other: float, charges: list[int]) -> None:
    """A weight that is doubled halves a debt or a claim."""
    names = [f"t{number}" for number in range(len(own))]
    made = tree(**dict(zip(names, map(Terms, own), strict=True)))
    for name, charge in zip(names, charges, strict=False):
        made.enter(made.leaf(name, "p"))
        made.pay(made.leaf(name, "p"), charge)
    before = {name: made.tenant(name).lag for name in names}
    v = made.root.now
    made.promise({"t0": Terms(other)})
    made.check_integrity()
    node = made.tenant("t0")
    assert node.weight == max(1, round(other * UNIT))
    assert (v - node.time) * node.weight // UNIT == pytest.approx(before["t0"], abs=2 + node.weight / UNIT)


def test_weights_are_raised_to_guarantees() -> None:
    """A guarantee among many siblings is a share like any other, or its tenant gets more than either says."""
    terms = {"a": Terms(1.0, guarantee=0.4), "b": Terms(1.0), "c": Terms(8.0)}
    made = tree(**terms)
    parts = {}
    for name in terms:
        made.enter(made.leaf(name, "p"))
    parts = {name: made.tenant(name).weight / made.root.total for name in terms}
    assert parts == pytest.approx({"a": 0.4, "b": 0.6 / 9, "c": 0.6 * 8 / 9}, rel=1e-3)
    made.leave(made.leaf("c", "p"))
    parts = {name: made.tenant(name).weight / made.root.total for name in "ab"}
    assert parts == pytest.approx({"a": 0.5, "b": 0.5}, rel=1e-3)  # by weight it has more than was guaranteed
    made.check_integrity()


def test_guarantees_of_all_leave_nothing_to_weights() -> None:
    """A division by what is left where nothing is."""
    made = tree(a=Terms(guarantee=0.75), b=Terms(100.0, guarantee=0.25), c=Terms(5.0))
    for name in "abc":
        made.enter(made.leaf(name, "p"))
    parts = {name: made.tenant(name).weight / made.root.total for name in "abc"}
    assert parts == pytest.approx({"a": 0.75, "b": 0.25, "c": 0.0}, abs=1e-3)


def test_a_cap_fills_with_time_and_no_further_than_a_second() -> None:
    """A tenant at its cap is held back for ever, or gets an hour's worth at once after an hour."""
    made = tree(a=Terms(cap=0.25))
    made.elapse(0.0)
    made.enter(made.leaf("a", "p"))
    made.pay(made.leaf("a", "p"), PICO)
    assert made.tenant("a").bucket == -0.75 * PICO and made.wakes_s() == pytest.approx(3.0, abs=1e-3)
    made.elapse(4.0)
    assert made.tenant("a").bucket == 0.25 * PICO and made.wakes_s() == 0.0
    made.elapse(3600.0)
    assert made.tenant("a").bucket == 0.25 * PICO


def test_a_team_and_a_program_of_one_name_are_two() -> None:
    """A client names its program as its tenant's team is named, and is charged to that."""
    made = tree(org=Terms(), **{"org/team": Terms(2.0)})
    assert made.leaf("org", "team") is not made.tenant("org/team")
    assert made.leaf("org/team", "p").parent is made.tenant("org/team")


GOOD = {
    "tenants": {"acme": {"weight": 4, "cap": 0.9}, "acme/research": {"guarantee": 0.5}, "": {"weight": 0.1}},
    "cost": {"base_s": 0.01, "decode_token_s": 0.002},
    "credit_s": 1,
}


def test_a_tree_is_read_from_toml_and_json(tmp_path: Path) -> None:
    """One of the two formats is read otherwise, or what is left out has no default."""
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    (tmp_path / "a.toml").write_text(
        "credit_s = 1\n[tenants]\nacme = {weight = 4, cap = 0.9}\n"
        '"acme/research" = {guarantee = 0.5}\n"" = {weight = 0.1}\n[cost]\nbase_s = 0.01\ndecode_token_s = 0.002\n'
    )
    one, other = read_shares(str(tmp_path / "a.json")), read_shares(str(tmp_path / "a.toml"))
    assert one == other and one.tenants["acme"] == Terms(4.0, 0.0, 0.9) and one.tenants["acme/research"].weight == 1.0
    assert one.cost is not None and one.cost.decode_token_s == 0.002 and (one.credit_s, one.slack_s) == (1.0, 0.05)
    assert read_shares("") == Shares()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tenant": {}}, r"key 'tenant'.*tenants"),
        ({"tenants": []}, r"tenants of file is \[\]"),
        ({"tenants": {"a": 3}}, r"tenant 'a': it is 3; wanted a table of weight, guarantee, cap"),
        ({"tenants": {"a": {"wieght": 3}}}, r"tenant 'a'.*wieght"),
        ({"tenants": {"a": {"weight": 0}}}, r"tenant 'a'.*weight is 0"),
        ({"tenants": {"a": {"cap": 1.5}}}, r"tenant 'a'.*cap is 1.5"),
        ({"tenants": {"a//b": {}}}, r"'a//b' has an empty part"),
        ({"tenants": {"a": {"guarantee": 0.6}, "b": {"guarantee": 0.5}}}, r"of the engine add up to 1.1.*'b'"),
        ({"tenants": {"a/x": {"guarantee": 0.6}, "a/y": {"guarantee": 0.5}}}, r"of 'a' add up to 1.1"),
        ({"tenants": {"a": {"guarantee": 0.6, "cap": 0.5}}}, r"'a' has a guarantee of 0.6 and a cap of 0.5"),
        ({"cost": {"base_s": "x"}}, r"cost.*base_s"),
        ({"credit_s": "1"}, r"credit_s of file is '1'; wanted seconds"),
        ({"slack_s": -1}, r"slack_s is -1"),
    ],
)
def test_a_wrong_tree_is_refused_by_place(change: dict[str, object], match: str) -> None:
    """A misspelt promise is no promise, and nobody is told."""
    with pytest.raises(ConfigError, match=match):
        shares_of({**GOOD, **change}, "file")


def test_the_page_reads_word_for_word(tmp_path: Path) -> None:
    """A tree that a reader copies from docs/configs.md and that is refused."""
    page = (Path(__file__).parents[2] / "docs" / "configs.md").read_text()
    (text,) = [text for text in re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL) if "[tenants]" in text]
    (tmp_path / "page.toml").write_text(text)
    found = read_shares(str(tmp_path / "page.toml"))
    assert found.tenants["acme/support"] == Terms(1.0, guarantee=0.3) and found.tenants["guests"].cap == 0.25
    assert found.cost is not None and found.cost.held_token_s == 1e-5
    assert read_shares(tree_of(str(tmp_path / "page.toml"))) == found


def test_a_file_that_is_not_there_or_no_table_is_refused(tmp_path: Path) -> None:
    """A traceback in place of the file's name."""
    with pytest.raises(ConfigError, match="nowhere.toml can't be read"):
        read_shares(str(tmp_path / "nowhere.toml"))
    (tmp_path / "bad.toml").write_text("tenants = ")
    with pytest.raises(ConfigError, match="bad.toml can't be read"):
        read_shares(str(tmp_path / "bad.toml"))
    with pytest.raises(ConfigError, match="holds no table"):
        shares_of([1], "file")
    with pytest.raises(ConfigError, match="engine.shares is 'a.toml', and engine.order is 'arrival'"):
        EngineConfig(shares="a.toml")


def test_a_tree_that_takes_the_place_of_another_keeps_debts_and_promises() -> None:
    """After a step that raised, who was ahead of the others begins level with them, above its cap, or with terms that
    a router has changed since."""
    made = tree(a=Terms(2.0), b=Terms(1.0), c=Terms(1.0, cap=0.5))
    leaves = {name: made.leaf(name, "p") for name in "abc"}
    for leaf in leaves.values():
        made.enter(leaf)
    made.promise({"a": Terms(4.0), "b": Terms(1.0, guarantee=0.25)})
    made.pay(leaves["a"], 8 * PICO)
    made.pay(leaves["b"], PICO)
    made.pay(leaves["c"], 6 * PICO)
    made.pay(made.leaf("b", "idle"), PICO)
    other = made.leaf("b", "q")
    made.enter(other)
    made.pay(other, PICO // 2)

    new = tree(a=Terms(2.0), b=Terms(1.0), c=Terms(1.0, cap=0.5))
    new.inherit(made)
    new.check_integrity()
    assert new.root.live == 0 and new.root.had == made.root.had
    assert new.tenant("c").bucket == made.tenant("c").bucket < 0
    assert new.leaf("b", "idle").time - new.tenant("b").clock == made.leaf("b", "idle").time - made.tenant("b").now
    for name in "abc":
        node, was = new.tenant(name), made.tenant(name)
        assert (node.own, node.guarantee, node.cap, node.had) == (was.own, was.guarantee, was.cap, was.had)
        assert abs(node.lag - was.lag) <= 2  # picoseconds
    assert new.tenant("c").lag < 0 < new.tenant("a").lag
    for name in "abc":
        new.enter(new.leaf(name, "again"))
        new.check_integrity()
    assert new.tenant("c").lag < -PICO and new.tenant("b").guarantee == 0.25
