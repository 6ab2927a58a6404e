"""Who is owed how much of an engine: a tree of tenants, and what each has had of its share.

A node is an organisation, a team, a user, ... down to the programs, which are leaves. What a leaf is charged is charged
to all nodes above it, so a node competes with its siblings alone, whatever is below it. Every node has a weight and a
virtual time: the device-seconds that it was charged, over its weight. Of the siblings that have work (*active*),

    V = sum w v / sum w,      lag = w (V - v):  device-seconds that a node is owed, their sum is 0,

and who is owed is *eligible*; of these the earliest virtual deadline goes first, that of the quantum that it would have
next (Stoica and Abdel-Wahab's EEVDF, 1995; as in Linux since 6.6). engine/deal.py does that for the rows of a step.

* A node that comes back from idle has the virtual time that it left with, so a debt stays; what it was owed is cut to
  `credit_s`, so nobody saves up. The same holds for one that has work and ran all of it: it wanted no more.
* A weight that changes keeps the node's lag: v' = V - (V - v) w / w'.
* A guarantee is the least part of what its parent gets that a node has while it has work: weights are raised to that.
* A cap is the most of the engine's time that it may have, over any second or more: what it may have accrues with time.

Exact: charges are whole picoseconds, weights whole thousandths, and what a division leaves over is carried to the next
charge of the node. So v is the floor of charges over weight, however many there were, and nothing drifts; the sums
behind V are those of the v that they are of, to the unit.
"""

from __future__ import annotations

import json
import tomllib
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from tandem.config import Amount, load, section
from tandem.engine.costs import PICO, StepCost
from tandem.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence

UNIT = 1000  # weights are whole thousandths; a virtual time is picoseconds over them, times this
BURST_S = 1.0  # of what a cap allows, that may be had at once
MOST = 1 << 16  # nodes, beyond which tenants that were not named are forgotten when they are idle; and of debtors
PROGRAM = "\0"  # begins the name of a leaf


@dataclass(frozen=True, slots=True)
@section("tenants")
class Terms:
    """What a tenant was promised.

    >>> Terms(weight=4.0).guarantee
    0.0
    """

    weight: Annotated[float, Interval(ge=1e-3, le=1e6)] = 1.0  # its part, beside those of its siblings that have work
    guarantee: Annotated[float, Interval(ge=0, le=1)] = 0.0  # least part of what its parent gets, while it has work
    cap: Annotated[float, Interval(gt=0, le=1)] = 1.0  # most of the engine's time


@dataclass(frozen=True, slots=True)
@section("shares")
class Shares:
    """A tree of tenants, and what service costs. A tenant that is not named has weight 1 under who is."""

    tenants: Mapping[str, Terms] = field(default_factory=dict)  # by path: "acme", "acme/research", "acme/research/ann"
    cost: StepCost | None = None  # None: measured on the engine as it starts
    credit_s: Amount = 0.1  # most that a node is owed when it comes back, in device-seconds
    slack_s: Amount = 0.05  # of service that a program may be ahead of a sibling and start first, for its cached prefix

    def __post_init__(self) -> None:
        least: dict[str, float] = {}
        for path, terms in self.tenants.items():
            if path != "" and not all(path.split("/")):
                raise ConfigError(f"tenants: the path {path!r} has an empty part. Write it as org/team/user.")
            parent = path.rpartition("/")[0] if "/" in path else None
            above = f"of {parent!r}" if parent is not None else "of the engine"
            least[above] = least.get(above, 0.0) + terms.guarantee
            if least[above] > 1 + 1e-9:
                raise ConfigError(
                    f"tenants: the guarantees {above} add up to {least[above]:g} with that of {path!r}, and 1 is all. "
                    "Lower one of them."
                )
            if parent is None and terms.guarantee > terms.cap:
                raise ConfigError(
                    f"tenants: {path!r} has a guarantee of {terms.guarantee:g} and a cap of {terms.cap:g}, which is "
                    "less. Raise the cap or lower the guarantee."
                )


def read_shares(path: str) -> Shares:
    """What engine.shares names: a file, TOML or JSON, or the tree as JSON; "": all have weight 1. ConfigError."""
    return shares_of(json.loads(tree_of(path)), path) if path else Shares()


def tree_of(path: str) -> str:
    """What such a file says, as JSON, which engine.shares may be too: for who has no such file."""
    try:
        text = path if path.startswith("{") else Path(path).read_text(encoding="utf-8")
        return json.dumps(tomllib.loads(text) if path.endswith(".toml") else json.loads(text))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"engine.shares: {path} can't be read as a tree of tenants: {error}") from error


def shares_of(tree: Any, source: str) -> Shares:
    """What such a file says. ConfigError with the place.

    >>> shares_of({"tenants": {"acme": {"weight": 4}}}, "shares.toml").tenants["acme"].weight
    4.0
    """
    known = ("tenants", "cost", "credit_s", "slack_s")
    if not isinstance(tree, Mapping):
        raise ConfigError(f"engine.shares: {source} holds no table. Allowed keys: {', '.join(known)}.")
    for name in tree:
        if name not in known:
            raise ConfigError(f"engine.shares: {source} has the key {name!r}.{nearest(str(name), known)}")
    named = tree.get("tenants", {})
    if not isinstance(named, Mapping):
        raise ConfigError(f"engine.shares: tenants of {source} is {named!r}; wanted a table of paths.")
    values: dict[str, Any] = {
        "tenants": {path: _part(Terms, terms, f"{source}: tenant {path!r}") for path, terms in named.items()}
    }
    if "cost" in tree:
        values["cost"] = _part(StepCost, tree["cost"], f"{source}: cost")
    for name in ("credit_s", "slack_s"):
        if name in tree:
            if isinstance(tree[name], bool) or not isinstance(tree[name], int | float):
                raise ConfigError(f"engine.shares: {name} of {source} is {tree[name]!r}; wanted seconds.")
            values[name] = float(tree[name])
    try:
        return Shares(**values)
    except ConfigError as error:
        raise ConfigError(f"engine.shares: {source}: {error}") from error


def _part(cls: Any, given: Any, where: str) -> Any:
    from tandem.config import dump

    try:
        if not isinstance(given, Mapping):
            raise ConfigError(f"it is {given!r}; wanted a table of {', '.join(dump(cls()))}.")
        return load(cls, {**dump(cls()), **given})
    except ConfigError as error:
        raise ConfigError(f"engine.shares: {where}: {error}") from error


class Node:
    """A node of the tree. What deal.py notes of a step is at the end, and stands while `stamp` is that of the step."""

    __slots__ = (
        "bucket", "cap", "charged", "children", "chunks", "clock", "debtors", "demand", "depth", "given", "guarantee",
        "guarantees", "had", "inner", "later", "live", "moment", "name", "number", "open", "opened", "owes", "own",
        "parent", "place", "queue", "queued", "ready", "refused", "rest", "rows", "stamp", "stays", "step_moment",
        "step_time", "tenants", "time", "total", "wait_tokens", "waiting", "waits", "way", "weight",
    )  # fmt: skip

    def __init__(self, name: str, parent: Node | None, number: int, terms: Terms | None) -> None:
        given = terms or Terms()
        self.name, self.parent, self.number = name, parent, number
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.way: tuple[Node, ...] = () if parent is None else (*parent.way, self)  # from below the root
        self.stays = terms is not None  # it was named; others go when they are idle and owe nothing
        self.own = self.weight = max(1, round(given.weight * UNIT))  # as promised, and with guarantees
        self.guarantee, self.cap = given.guarantee, given.cap
        self.guarantees = False  # whether a child has one
        self.bucket = int(BURST_S * self.cap * PICO)  # what a cap allows now
        self.children: dict[str, Node] = {}
        self.tenants = 0  # of these, no programs
        self.refused = (0, -1)  # of a tenant: in which step it last found no room, and after how many changes
        self.live = 0  # requests below it
        self.waiting = 0  # of those, the ones that wait
        self.wait_tokens = 0  # of their prompts
        self.waits: list[Sequence] = []  # of a leaf: they, the first to start first
        self.had = 0  # picoseconds that it was charged
        self.time: int = 0 if parent is None else parent.now  # v
        self.rest = 0  # of the last division
        self.total = self.moment = 0  # of active children: sum w, sum w v
        self.clock = 0  # V when the last of them left
        self.queue: list[tuple[int, int, Node]] = []  # children with requests that wait, by a time that may be old
        self.queued = False
        self.debtors: list[tuple[int, int, Node]] = []  # idle children that are ahead of V, by v
        self.owes = 0  # of a leaf: picoseconds for keys and values that it holds, to be charged with the next step
        self.stamp = self.opened = 0
        self.demand = self.given = self.charged = 0  # picoseconds of rows: that could run, that run, that ran
        self.rows: list[tuple[int, Sequence]] = []  # of a leaf: rows that draw, with their costs
        self.place = 0  # of these, how many run
        self.chunks: list[Sequence] = []  # of a leaf: those with more than a row to run
        self.open: list[Node] = []  # leaves with rows below it, and
        self.inner: list[Node] = []  # others
        self.ready: list[tuple[int, int, Node]] = []  # children that are eligible, by deadline
        self.later: list[tuple[int, int, Node]] = []  # others, by virtual time
        self.step_time = self.step_moment = 0  # with what runs in this step

    @property
    def now(self) -> int:
        """V of its children, rounded down."""
        return self.moment // self.total if self.total else self.clock

    @property
    def path(self) -> str:
        return "/".join([node.name for node in self.way])

    @property
    def lag(self) -> int:
        """Picoseconds that it is owed, beside its active siblings."""
        assert self.parent is not None
        return (self.parent.now - self.time) * self.weight // UNIT


class Tree:
    """The tree of one engine."""

    def __init__(self, shares: Shares) -> None:
        self.shares = shares
        self.credit = int(shares.credit_s * PICO)
        self._count = 0
        self.size = 0  # nodes
        self.root = self._node("", None, Terms())
        self.capped: list[Node] = []
        self.elapsed_s: float | None = None  # when caps were last filled
        for path in sorted(shares.tenants, key=lambda path: (path.count("/"), path)):
            self.tenant(path)

    def _node(self, name: str, parent: Node | None, terms: Terms | None) -> Node:
        self._count += 1
        self.size += 1
        node = Node(name, parent, self._count, terms)
        if parent is not None:
            parent.children[name] = node
            parent.tenants += not name.startswith(PROGRAM)
            if node.guarantee:
                parent.guarantees = True
            if node.cap < 1:
                self.capped.append(node)
        return node

    def _limit(self, node: Node, cap: float) -> None:
        """Another cap: what was had beyond the one before is to be waited for, at the new one."""
        if (node.cap < 1) != (cap < 1):
            if cap < 1:
                self.capped.append(node)
            else:
                self.capped.remove(node)
        if node.cap < 1 or cap < 1:
            node.bucket = min(node.bucket, int(BURST_S * cap * PICO))
        node.cap = cap

    def tenant(self, path: str) -> Node:
        """The node of a path, made where there is none."""
        node, given, so_far = self.root, self.shares.tenants, ""
        for part in path.split("/"):
            so_far = f"{so_far}/{part}" if node is not self.root else part
            found = node.children.get(part)
            node = found if found is not None else self._node(part, node, given.get(so_far))
        return node

    def leaf(self, tenant: str, program: str) -> Node:
        """The node of a program. Its name can't be that of a team: programs hang under a name of their own."""
        above = self.tenant(tenant)
        name = PROGRAM + program
        found = above.children.get(name)
        return found if found is not None else self._node(name, above, None)

    # Who has work.

    def enter(self, leaf: Node) -> None:
        """A request more at a leaf."""
        node, parent = leaf, leaf.parent
        while parent is not None:
            node.live += 1
            if node.live == 1:
                self._lift(node, parent, parent.now, counted=False)
                parent.total += node.weight
                parent.moment += node.weight * node.time
                if parent.guarantees:
                    self._balance(parent)
            node, parent = parent, parent.parent
        self.root.live += 1

    def leave(self, leaf: Node) -> None:
        """A request fewer."""
        node, parent = leaf, leaf.parent
        while parent is not None:
            node.live -= 1
            assert node.live >= 0, f"{node.path} has fewer requests than none"
            if node.live == 0:
                parent.clock = parent.now
                parent.total -= node.weight
                parent.moment -= node.weight * node.time
                heappush(parent.debtors, (node.time, node.number, node))
                if parent.guarantees:
                    self._balance(parent)
                self._forget(parent)
            node, parent = parent, parent.parent
        self.root.live -= 1

    def lift(self, nodes: Iterable[Node]) -> None:
        """What active nodes are owed is their credit at most: they ran all that they had, or can't run what they have.

        By V before any of them is lifted.
        """
        now: dict[Node, int] = {}
        for node in nodes:
            parent = node.parent
            if parent is not None and node.live:
                if parent not in now:
                    now[parent] = parent.now
                if node.time < now[parent]:
                    self._lift(node, parent, now[parent], counted=True)

    def _lift(self, node: Node, parent: Node, now: int, counted: bool) -> None:
        least = now - self.credit * UNIT // node.weight
        if node.time < least:
            if counted:
                parent.moment += node.weight * (least - node.time)
            node.time, node.rest = least, 0

    def _forget(self, parent: Node) -> None:
        """Idle children that are not ahead of V any more owe nothing and are owed nothing."""
        debtors, now = parent.debtors, parent.now
        while debtors and (debtors[0][0] <= now or len(debtors) > MOST):
            _, _, node = heappop(debtors)
            program = node.name.startswith(PROGRAM)
            gone = node.live == 0 and not node.stays and not node.children and (program or self.size > MOST)
            if gone and node.time > now and len(debtors) <= MOST:  # it was charged since
                heappush(debtors, (node.time, node.number, node))
            elif gone and parent.children.get(node.name) is node:
                del parent.children[node.name]
                parent.tenants -= not program
                self.size -= 1

    def wait(self, leaf: Node, sequence: Sequence) -> None:
        """A request of a leaf waits."""
        insort(leaf.waits, sequence, key=lambda one: (-one.request.priority, one.arrival))
        tokens = len(sequence.request.tokens)
        for node in leaf.way:
            parent = node.parent
            node.waiting += 1
            node.wait_tokens += tokens
            if not node.queued and parent is not None:
                node.queued = True
                heappush(parent.queue, (node.time, node.number, node))
        self.root.waiting += 1
        self.root.wait_tokens += tokens

    def wait_no_more(self, leaf: Node, sequence: Sequence) -> None:
        """A request that waited runs, or is gone."""
        leaf.waits.remove(sequence)
        tokens = len(sequence.request.tokens)
        for node in leaf.way:
            node.waiting -= 1
            node.wait_tokens -= tokens
        self.root.waiting -= 1
        self.root.wait_tokens -= tokens

    # What it had.

    def pay(self, leaf: Node, pico: int) -> None:
        """Charges a leaf and all above it; less than nothing is a refund."""
        node: Node | None = leaf
        while node is not None:
            self.charge(node, pico)
            node = node.parent

    def charge(self, node: Node, pico: int) -> None:
        """Charges one node."""
        node.had += pico
        parent = node.parent
        if parent is None:
            return
        step, node.rest = divmod(pico * UNIT + node.rest, node.weight)
        node.time += step
        if node.live:
            parent.moment += node.weight * step
        if node.cap < 1:
            node.bucket -= pico

    def inherit(self, other: Tree) -> None:
        """The accounts of another tree and what its tenants were promised; of its requests, none. For a new tree."""
        self.root.clock, self.root.had, self.elapsed_s = other.root.now, other.root.had, other.elapsed_s
        nodes = {other.root: self.root}
        for was in other.nodes(programs=True):
            assert was.parent is not None
            parent, now = nodes[was.parent], was.parent.now
            if was.name.startswith(PROGRAM) and was.time <= now:
                continue  # it owes nothing
            found = parent.children.get(was.name)
            node = nodes[was] = found if found is not None else self._node(was.name, parent, None)
            node.own = node.weight = was.own
            node.guarantee = was.guarantee
            parent.guarantees = parent.guarantees or node.guarantee > 0
            self._limit(node, was.cap)
            node.time = now - (now - was.time) * was.weight // node.own
            node.had, node.clock, node.bucket = was.had, was.now, was.bucket
            heappush(parent.debtors, (node.time, node.number, node))

    # Weights, guarantees, caps.

    def promise(self, terms: Mapping[str, Terms]) -> None:
        """Other terms, by path, from now on; what each is owed stays (engine/cluster.py)."""
        parents = set[Node]()
        for path, one in terms.items():
            node = self.tenant(path)
            parent = node.parent
            assert parent is not None
            node.own = max(1, round(one.weight * UNIT))
            node.guarantee = one.guarantee
            parent.guarantees = parent.guarantees or one.guarantee > 0
            self._limit(node, one.cap)
            if not node.live:
                node.time = parent.now - (parent.now - node.time) * node.weight // node.own
                node.weight = node.own
            parents.add(parent)
        for above in sorted(parents, key=lambda node: node.number):
            self._balance(above)

    def _balance(self, parent: Node) -> None:
        """Effective weights of active children: their own, those with a guarantee raised to it."""
        active = [node for node in parent.children.values() if node.live]
        raised = self._raised(active) if parent.guarantees else {}
        now = parent.now
        for node in active:
            weight = raised.get(node, node.own)
            if weight != node.weight:
                parent.total += weight - node.weight
                parent.moment -= node.weight * node.time
                node.time = now - (now - node.time) * node.weight // weight
                node.rest = 0
                node.weight = weight
                parent.moment += weight * node.time

    @staticmethod
    def _raised(active: list[Node]) -> dict[Node, int]:
        """Of those whose weight gives less than their guarantee: the weight that gives it."""
        held: list[Node] = []
        free = list(active)
        while True:
            left = 1.0 - sum(node.guarantee for node in held)
            total = sum(node.own for node in free)
            short = [node for node in free if node.own * max(left, 0.0) < node.guarantee * total * (1 - 1e-12)]
            if not short:
                break
            held += short
            free = [node for node in free if node not in short]
        if not held:
            return {}
        total = total if free and left > 1e-9 else 1_000_000
        scale = total / left if free and left > 1e-9 else total / max(1e-9, 1.0 - left)
        return {node: max(1, round(node.guarantee * scale)) for node in held} | (
            {} if left > 1e-9 else dict.fromkeys(free, 1)
        )

    def elapse(self, now_s: float) -> None:
        """Time goes on: caps allow more."""
        if self.capped:
            if self.elapsed_s is not None and now_s > self.elapsed_s:
                for node in self.capped:
                    most = int(BURST_S * node.cap * PICO)
                    node.bucket = min(most, node.bucket + int((now_s - self.elapsed_s) * node.cap * PICO))
            self.elapsed_s = now_s

    def wakes_s(self) -> float:
        """Seconds until a node that its cap holds back may have something; 0 where none is."""
        held = [-node.bucket / (node.cap * PICO) + 1e-6 for node in self.capped if node.live and node.bucket <= 0]
        return min(held, default=0.0)

    # What it tells.

    def loads(self) -> dict[str, float]:
        """Requests that are live, by tenant, for engine/cluster.py."""
        found = {}
        for node in self.nodes():
            own = node.live - sum([child.live for child in node.children.values() if child.children])
            if own:
                found[node.path] = float(own)
        return found

    def nodes(self, programs: bool = False) -> Iterator[Node]:
        """All but the root, those above first."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            if node is not self.root:
                yield node
            stack += [child for child in node.children.values() if programs or not child.name.startswith(PROGRAM)]

    def check_integrity(self) -> None:
        """AssertionError unless every sum is that of what it is of."""
        for node in [self.root, *self.nodes(programs=True)]:
            active = [child for child in node.children.values() if child.live]
            assert node.total == sum(child.weight for child in active), node.path
            assert node.moment == sum(child.weight * child.time for child in active), node.path
            if node.children:
                assert node.live == sum(child.live for child in active), node.path
                assert node.waiting == sum(child.waiting for child in active), node.path
            else:
                assert node.waiting == len(node.waits) <= node.live, node.path
