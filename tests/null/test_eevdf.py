"""Who is dealt a row, against EEVDF as it is defined (Stoica and Abdel-Wahab 1995), one level at a time and slowly."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tandem.engine.costs import PICO, StepCost
from tandem.engine.deal import QUANTA
from tandem.engine.share import PROGRAM, Node, Terms
from tandem.sim.tenants import Loads

# Whole under each weight, and no multiple of each other: nothing hangs on how a division is rounded.
COST = StepCost(base_s=7.16e-3, prefill_token_s=1e-4, context_token_s=0.0, decode_token_s=1.036e-3)
BASE, ROW = round(COST.base_s * PICO), round(COST.decode_token_s * PICO)


@dataclass
class Client:
    """As the paper has it: what it asks for next is eligible from virtual time `eligible` on. It may have clients."""

    number: int
    weight: Fraction
    eligible: Fraction
    name: str = ""
    rows: int = 0
    clients: list[Client] = field(default_factory=list)

    @property
    def asks(self) -> bool:
        return bool(self.rows) or any(one.asks for one in self.clients)


class Step:
    """Rows of a step of so many picoseconds, each client asking for a sixteenth of it at a time; at each level alike.

    Virtual time is that of the fluid system, in which all active clients are served at once: it grows by what was
    served over the weights of all. It begins where the lags of all, w (V - v), add up to nothing.
    """

    def __init__(self, root: Client, slice_: int) -> None:
        self.found, self.left, self.quantum = list[str](), slice_, max(1, slice_ // QUANTA)
        self.now: dict[int, Fraction] = {}
        self.serve(root, slice_)

    def serve(self, client: Client, most: int) -> int:
        served = 0
        while served < most and self.left > 0 and client.asks:
            if not client.clients:
                if self.found and ROW > self.left:
                    self.left = 0
                    break
                self.found.append(client.name)
                client.rows, self.left, served = client.rows - 1, self.left - ROW, served + ROW
                continue
            weights = sum(one.weight for one in client.clients)
            first = sum((one.weight * one.eligible for one in client.clients), Fraction()) / weights
            now = self.now.setdefault(client.number, first)
            asking = [one for one in client.clients if one.asks]
            if eligible := [one for one in asking if one.eligible <= now]:
                chosen = min(eligible, key=lambda one: (one.eligible + self.quantum / one.weight, one.number))
            else:  # who is owed wants nothing: the others have it
                chosen = min(asking, key=lambda one: (one.eligible, one.number))
            got = self.serve(chosen, min(self.quantum, most - served))
            chosen.eligible += got / chosen.weight
            self.now[client.number] = now + got / weights
            served += got
        return served


def client(node: Node, rows: dict[str, int], given: set[Node]) -> Client:
    """Of a tenant and those below it; the base is its whose part ends the step, and theirs above it."""
    weight = Fraction(node.own, 1000)
    below = [client(child, rows, given) for child in node.children.values() if not child.name.startswith(PROGRAM)]
    before = Fraction(node.time) + (BASE / weight if node in given else 0)
    return Client(node.number, weight, before, node.path, rows.get(node.path, 0), below)


def slices(root: Node, rows: dict[str, int]) -> tuple[Fraction, Node | None]:
    """The longest that a step may be and whose part ends it; None: all run."""
    found: list[tuple[Fraction, int, Node]] = []

    def look(node: Node, part: Fraction) -> int:
        tenants = [child for child in node.children.values() if not child.name.startswith(PROGRAM)]
        total = sum(child.own for child in tenants)
        below = sum(look(child, part * Fraction(child.own, total)) for child in tenants) or rows[node.path]
        if node is not root:
            found.append(((BASE + ROW * below) / part, node.depth, node))
        return below

    whole = BASE + ROW * look(root, Fraction(1))
    length, _, node = min(found, key=lambda one: one[:2])
    assume(all(other[0] != length or other[2] is node or node in other[2].way for other in found))
    return (length, node) if length < whole else (Fraction(whole), None)


FLAT = ["t0", "t1", "t2", "t3", "t4", "t5"]
DEEP = ["a/x", "a/y", "a/z/u", "a/z/v", "b/x", "b/y", "c"]
weights = st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0])


def trees(leaves: list[str]) -> st.SearchStrategy[tuple[dict[str, int], dict[str, float]]]:
    """Rows of some of the leaves, and weights of all nodes."""
    nodes = sorted({"/".join(leaf.split("/")[:depth]) for leaf in leaves for depth in range(1, 4)})
    some = st.dictionaries(st.sampled_from(leaves), st.integers(1, 40), min_size=2)
    return st.tuples(some, st.fixed_dictionaries(dict.fromkeys(nodes, weights)))


@given(trees(FLAT) | trees(DEEP))
@settings(max_examples=60, deadline=None)
def test_rows_are_dealt_in_the_order_of_the_definition(tree: tuple[dict[str, int], dict[str, float]]) -> None:
    """Who is owed nothing is served, or of those that are owed another than the one of the earliest deadline."""
    rows, own = tree
    used = {"/".join(leaf.split("/")[:depth]) for leaf in rows for depth in range(1, 4)}
    terms = {node: Terms(weight) for node, weight in own.items() if node in used}
    load = Loads(rows, terms, COST, prompt=1, new=500, max_sequences=400, credit_s=1e3)
    while load.scheduler.waiting or any(len(one.tokens) - one.computed > 1 for one in load.scheduler.running):
        load.step()
    root = load.deals.tree.root
    for _ in range(10):
        length, whose = slices(root, rows)
        batch = load.scheduler.plan(load.now)
        if whose is not None:  # else all run, in whichever order
            wanted = Step(client(root, rows, set(whose.way)), int(length) - BASE)
            assert ["/".join(node.name for node in leaf.way[:-1]) for leaf in batch.leaves] == wanted.found
        load.step()
