"""`engine.order=shares`: the rows of a step, dealt out by the tree of engine/share.py.

A step is a slice of device-seconds. Its rows are taken one quantum at a time: from the root down, of the children that
are eligible the one of the earliest deadline, until the slice is full or nothing is left. A quantum is a sixteenth of
the slice, and a row at least; a prompt's chunk is taken in quanta too. Rows that draw, chunks and requests that wait
compete alike, so that who comes back from idle starts in the next step.

How long a slice is. A step has a part that is the same whatever is in it, so a long one is cheap by the row, and a
short one is soon over. A tenant i whose rows cost m_i, with a part s_i of the engine, would alone on an engine of that
part make a step in (base + m_i) / s_i. No step is longer than the least of these over the tenants that have rows: so
whose rows all run in every step waits for none of its tokens longer than it would there, and the others have in that
time no less than their part. Where one tenant alone has work, s_i is 1 and the step is full.

What is charged. Rows are charged at what they cost, to the leaf that they are of. The base of a step goes to those that
have rows in it and are owed most then, until they are level, at each level of the tree; first to those that ran all
that they had, since the others can be given rows for what they are owed. So who makes steps short pays
for their bases, and a tenant whose slice it was has had exactly its part. Keys and values
that a leaf holds are charged by time, whether it runs or not. Each holder pays for a page that it computed, or found
while nobody held it.

Memory and places are shared by what is held. A request that finds no room takes it where that leaves the one who gives
with no less for its weight than the one who takes: of the siblings on both ways down from where they part,
(held + needed) / w <= (held' - freed) / w'. That can't be turned round by the next request, so nobody preempts in
circles. The same choice, without the condition, says who gives way when those that run need pages: from the subtree
that holds most for its weight, the cheapest to compute again. Where places are what lacks and pages are not, held is
the number of those that run. A tenant that finds no room looks again when somebody came or went, or after AGAIN steps;
others are asked meanwhile.

Of programs of one tenant that wait, the one with most of its prompt in the cache starts first, where that is ahead of
the one whose turn it is by no more than `slack_s` of service.

Everything finishes. The oldest of those that run is never preempted, and the oldest of all that live becomes it once it
runs. Whoever has a row that could run is owed more with each step that leaves it out, and nobody else can be owed as
much for long: charges are positive and credits bounded, so its row runs after finitely many steps, if its caps let it.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import chain
from typing import TYPE_CHECKING

from tandem.engine.batch import scores
from tandem.engine.bill import bill
from tandem.engine.costs import PICO, Prices, StepCost
from tandem.engine.order import Order
from tandem.engine.share import UNIT, Node, Shares, Tree
from tandem.engine.slice import first, longest
from tandem.engine.table import Start, Table
from tandem.engine.yields import Price, held_below, who_yields, within

if TYPE_CHECKING:
    from tandem.engine.batch import Batch, Sequence
    from tandem.engine.config import EngineConfig

QUANTA = 16  # of a slice
PASSES = 1024  # requests that a step looks at and that have to wait for a prefix, or for their program's turn
AGAIN = 64  # steps after which a tenant whose request found no room looks again, where nobody came or went
SOON = 1  # the same, where its room is that of rows which came before it in the step
REFUSALS = 16  # tenants that find no room, after which a step starts nobody
NEAR = 8  # requests whose prefixes are compared, where slack_s allows


class Deals(Order):
    """The order of one engine by shares. `cost`: what its steps cost, until `cost` is set to what was measured."""

    def __init__(self, config: EngineConfig, shares: Shares, capacity_tokens: int) -> None:
        super().__init__(config)
        self.tree = Tree(shares)
        self.capacity_tokens = capacity_tokens
        self._page_tokens = config.page_tokens
        self.measured = shares.cost is not None
        self.cost = (shares.cost or StepCost()).priced(capacity_tokens)
        self.prices = Prices.of(self.cost)
        self.slack = int(shares.slack_s * PICO)
        self._stamp = 0
        self._held_s: float | None = None  # until when what is held was charged
        self._leaves: list[Node] = []  # of what runs
        self._content: dict[Node, None] = {}  # nodes of which all runs in this step, those below first
        self._left = self._quantum = 0
        self._blocked = False  # nobody more starts in this step
        self._stuck: list[Node] = []  # tenants that found no room since somebody came or went
        self._refusals = 0  # of them, in this step
        self._passed = 0
        self._offered: list[Node] = []  # children that wait, taken from their queues for this step
        self._taken = False
        self._changes = 0  # requests that came, started, gave way or went
        self._steps = 0
        self._held: tuple[int, int, bool, dict[Node, int]] = (
            0,
            -1,
            False,
            {},
        )  # below nodes, in which step, after which
        self._refused = (0, -1)  # in which step nobody found room, and after how many changes

    def price(self, cost: StepCost) -> None:
        """What steps cost, as it was measured, from now on."""
        self.cost, self.measured = cost.priced(self.capacity_tokens), True
        self.prices = Prices.of(self.cost)

    def inherit(self, other: Deals) -> None:
        """What steps cost and what tenants had, of an engine that this one takes the place of."""
        if other.measured:
            self.price(other.cost)
        self.tree.inherit(other.tree)

    @property
    def wakes_s(self) -> float:
        return self.tree.wakes_s()

    # Who waits, who runs, who is gone.

    def submitted(self, sequence: Sequence) -> None:
        super().submitted(sequence)
        self._changes += 1
        request = sequence.request
        sequence.leaf = self.tree.leaf(request.tenant, request.program_id or request.id)
        self.tree.enter(sequence.leaf)
        self.waits(sequence)

    def waits(self, sequence: Sequence) -> None:
        assert sequence.leaf is not None
        self._changes += 1
        self.tree.wait(sequence.leaf, sequence)

    def starts(self, sequence: Sequence) -> None:
        assert sequence.leaf is not None
        self._changes += 1
        self.tree.wait_no_more(sequence.leaf, sequence)
        self.tree.lift(sequence.leaf.way)  # what it could not have, it is not owed for ever

    def gone(self, sequence: Sequence, waited: bool) -> None:
        leaf = sequence.leaf
        assert leaf is not None
        self._changes += 1
        if waited:
            self.tree.wait_no_more(leaf, sequence)
        if leaf.live == 1 and leaf.owes:
            self.tree.pay(leaf, leaf.owes)
            leaf.owes = 0
        self.tree.leave(leaf)

    def hold(self, tenant: str, program: str, tokens: int, seconds: float) -> None:
        """Charges a program for keys and values that it keeps while it acts."""
        self.tree.pay(self.tree.leaf(tenant, program), int(self.prices.held * tokens * seconds))

    # What runs in a step.

    def deal(self, table: Table, draws: list[Sequence], prompts: list[Sequence], now_s: float) -> None:
        """Chooses among running sequences with a row that draws, those with prompts to run, and who waits."""
        self.tree.elapse(now_s)
        elapsed_s = 0.0 if self._held_s is None else max(0.0, now_s - self._held_s)
        self._held_s = now_s
        root = self.tree.root
        self._gather(draws, prompts, table.tokens, elapsed_s)
        self._left = longest(root, self.prices, self._stamp) - self.prices.base
        self._quantum = max(1, self._left // QUANTA)
        self._steps += 1
        self._blocked = self._lately(self._refused)
        self._passed, self._refusals, self._taken = 0, 0, False
        tokens = sum([len(one.tokens) - one.computed for one in prompts])
        # Where not all fits, who waits may come before who runs.
        more = 0 if self._blocked else self.prices.prefill * root.wait_tokens
        if root.demand + more <= self._left and tokens <= table.tokens and not self.tree.capped:
            self._all(table, tokens)
        elif root.open or root.inner or root.waiting:
            self._open(table, root)
            self._take(table, root, self._left)
        for node in self._offered:
            parent = node.parent
            if node.waiting and parent is not None:
                heappush(parent.queue, (node.time, node.number, node))
            else:
                node.queued = False
        self._offered.clear()
        if self._refusals and sum([node.waiting for node in self._stuck]) == root.waiting:
            self._refused = (min([node.refused[0] for node in self._stuck]), self._changes)
        self._content = self._satisfied()

    def _lately(self, refused: tuple[int, int]) -> bool:
        """Whether there can be no room yet since that step: nobody came or went."""
        step, changes = refused
        return changes == self._changes and self._steps - step < AGAIN

    def _no_room(self, tenant: Node, begun: Start) -> None:
        """A request of a tenant found none: its others look no more for a while. One that has tenants below looks."""
        self._refusals += 1
        self._blocked = self._blocked or self._refusals >= REFUSALS
        if tenant.tenants:
            return
        if self._stuck and self._stuck[-1].refused[1] != self._changes:
            self._stuck = []
        if tenant not in self._stuck:
            self._stuck.append(tenant)
        tenant.refused = (self._steps + (SOON - AGAIN if begun is Start.LATER else 0), self._changes)

    def _satisfied(self) -> dict[Node, None]:
        """Nodes that have no row and no request but those that run in this step."""
        wanting, content, seen = set[Node](), dict[Node, None](), set[Node]()
        for leaf in self._leaves:
            if leaf.waits or leaf.chunks or leaf.place < len(leaf.rows):
                wanting.update(leaf.way)
            else:
                content[leaf] = None
        for leaf in self._leaves:
            parent = leaf.parent
            while parent is not None and parent not in seen:
                seen.add(parent)
                if parent not in wanting and not parent.waiting:
                    content[parent] = None
                parent = parent.parent
        return content

    def _gather(self, draws: list[Sequence], prompts: list[Sequence], tokens: int, elapsed_s: float) -> None:
        """Notes at each leaf what could run of it, and sums up."""
        self._stamp = stamp = self._stamp + 1
        (_, _, context, decode, held), head = self.prices, self.prices.head
        held *= elapsed_s * self._page_tokens
        leaves: list[Node] = []
        for sequence in chain(draws, prompts):
            leaf, pages = sequence.leaf, sequence.pages
            assert leaf is not None and pages is not None
            if leaf.stamp != stamp:
                leaf.stamp = stamp
                leaf.demand = leaf.given = leaf.place = 0
                leaf.rows, leaf.chunks = [], []
                leaves.append(leaf)
            rows = len(sequence.tokens) - sequence.computed
            if rows == 1:
                cost = decode + context * (sequence.computed + 1) + (head if sequence.request.likely else 0)
                leaf.rows.append((cost, sequence))
            else:
                cost = self._cost(sequence, sequence.computed, min(rows, tokens))
                leaf.chunks.append(sequence)
            leaf.demand += cost
            if held:
                leaf.owes += int(held * (pages.blocks - sequence.found))
        self._leaves = leaves
        levels: list[list[Node]] = [[] for _ in range(1 + max([leaf.depth for leaf in leaves], default=0))]
        root = self.tree.root
        self._touch(root)
        for leaf in leaves:
            levels[leaf.depth].append(leaf)
        for depth in range(len(levels) - 1, 0, -1):
            for node in levels[depth]:
                parent = node.parent
                assert parent is not None
                if node.cap < 1 and node.bucket <= 0:
                    continue
                if parent.stamp != stamp:
                    self._touch(parent)
                    levels[depth - 1].append(parent)
                (parent.open if node.rows or node.chunks else parent.inner).append(node)
                parent.demand += node.demand
        if self._ranked:
            for leaf in leaves:
                leaf.rows.sort(key=lambda row: (-row[1].request.priority, row[1].arrival))
                leaf.chunks.sort(key=lambda one: (-one.request.priority, one.arrival))

    def _touch(self, node: Node) -> None:
        node.stamp = self._stamp
        node.demand = node.given = node.place = 0
        node.open, node.inner = [], []

    def _all(self, table: Table, tokens: int) -> None:
        """Everything that runs fits, with so many tokens of prompts. Who waits looks for room first, among all that."""
        runs = [(one, one.pages) for leaf in self._leaves for one in chain([row[1] for row in leaf.rows], leaf.chunks)]
        for leaf in self._leaves:
            leaf.place = len(leaf.rows)
            leaf.chunks = []
            node: Node | None = leaf
            while node is not None:
                node.given += leaf.demand
                node = node.parent
            self._left -= leaf.demand
            self._taken = True
        root = self.tree.root
        if root.waiting and not self._blocked:
            table.tokens -= tokens
            self._open(table, root)
            self._take(table, root, self._left)
            table.tokens += tokens
        for sequence, pages in runs:
            if sequence.pages is not pages:  # it gave way
                continue
            if len(sequence.tokens) - sequence.computed == 1:
                table.draw(sequence)
            else:
                table.chunk(sequence, table.tokens)

    def _open(self, table: Table, node: Node) -> None:
        """Its children that have something to run, by eligibility."""
        node.opened = self._stamp
        if node.stamp != self._stamp:
            self._touch(node)
        node.ready, node.later = [], []
        node.step_moment = node.moment
        for child in chain(node.open, node.inner):
            child.step_time = child.time + child.given * UNIT // child.weight
            node.step_moment += child.weight * (child.step_time - child.time)
            if child.inner or child.open or child.place < len(child.rows) or child.chunks or child.waiting:
                node.later.append((child.step_time, child.number, child))
        heapify(node.later)
        self._offer(table, node)

    def _offer(self, table: Table, node: Node) -> None:
        """One more child that only waits competes."""
        while not self._blocked and not self._lately(node.refused) and (child := self._next(table, node)) is not None:
            self._offered.append(child)
            fresh = child.stamp != self._stamp
            if fresh and not (child.cap < 1 and child.bucket <= 0):
                if child.children:
                    self._touch(child)
                else:
                    child.stamp = self._stamp
                    child.demand = child.given = child.place = 0
                    child.rows, child.chunks = [], []
                child.step_time = child.time
                heappush(node.later, (child.time, child.number, child))
                return

    def _next(self, table: Table, node: Node) -> Node | None:
        """The child that waits and was served least; of programs, the one with most in the cache of those near it.

        Taken from its queue.
        """
        child = first(node)
        if child is None:
            return None
        heappop(node.queue)
        if not self.slack or child.children or child.stamp == self._stamp:
            return child
        last = child.time + self.slack * UNIT // child.weight
        near = [child]
        while len(near) < NEAR and (other := first(node)) is not None:
            if other.time > last or other.children or other.stamp == self._stamp:
                break
            heappop(node.queue)
            near.append(other)
        if len(near) > 1:
            child = max(near, key=lambda one: (table.cached(one.waits[0]), -one.time, -one.number))
            for other in near:
                if other is not child:
                    heappush(node.queue, (other.time, other.number, other))
        return child

    def _take(self, table: Table, node: Node, most: int) -> int:
        """Rows of a node's children, for at most so many picoseconds and a row at least; what they cost."""
        if not node.children:
            return self._rows(table, node, most)
        if node.opened != self._stamp:
            self._open(table, node)
        ready, later, total, taken = node.ready, node.later, node.total, 0
        quantum = self._quantum
        while taken < most and self._left > 0:
            while later and later[0][0] * total <= node.step_moment:
                time, number, child = heappop(later)
                heappush(ready, (time + quantum * UNIT // child.weight, number, child))
            if not ready and not later:
                break
            source = ready or later
            _, number, child = source[0]
            waited = not child.rows and not child.chunks and not child.open and not child.inner
            got = self._take(table, child, min(quantum, most - taken))
            heappop(source)
            if got:
                taken += got
                child.given += got
                step = got * UNIT // child.weight
                child.step_time += step
                node.step_moment += child.weight * step
                if child.ready or child.later if child.children else child.place < len(child.rows) or self._more(child):
                    heappush(later, (child.step_time, number, child))
            if waited:
                self._offer(table, node)
        return taken

    def _more(self, leaf: Node) -> bool:
        assert leaf.parent is not None
        return bool(leaf.chunks or leaf.waits and not (self._blocked or self._lately(leaf.parent.refused)))

    def _rows(self, table: Table, leaf: Node, most: int) -> int:
        """Rows of a program: those that draw, then its prompts, then what waits."""
        taken, rows = 0, leaf.rows
        while leaf.place < len(rows):
            cost, sequence = rows[leaf.place]
            if sequence.pages is None:  # it gave way in this step
                leaf.place += 1
                continue
            if cost > self._left and self._taken:
                self._left = 0
                return taken
            leaf.place += 1
            table.draw(sequence)
            self._taken = True
            self._left -= cost
            taken += cost
            if taken >= most:
                return taken
        while taken < most and self._left > 0:
            if not leaf.chunks:
                if not self._start(table, leaf):
                    break
            got = self._chunk(table, leaf, max(0, min(most - taken, self._left)))
            taken += got
        return taken

    def _chunk(self, table: Table, leaf: Node, most: int) -> int:
        """A quantum of the first of its prompts."""
        sequence = leaf.chunks[0]
        if sequence.pages is None:
            leaf.chunks.pop(0)
            return 0
        place = table.place(sequence)
        each = self.prices.decode if sequence.request.scored else self.prices.prefill
        each += self.prices.context * (place + 1)
        left = len(sequence.tokens) - place
        tokens = min(left, max(1, most // each))
        cost = self._cost(sequence, place, tokens)
        if self._taken and each > self._left:
            self._left = 0
            return 0
        got = table.chunk(sequence, tokens)
        if got < tokens or got == left:
            leaf.chunks.pop(0)
        if not got:
            return 0
        cost = self._cost(sequence, place, got)
        self._taken = True
        self._left -= cost
        return cost

    def _cost(self, sequence: Sequence, start: int, count: int) -> int:
        return self.prices.rows(start, count, scores(sequence.request, start, count))

    def _start(self, table: Table, leaf: Node) -> bool:
        """The first request of a program that can start, does; and is a prompt to run from then on."""
        tenant = leaf.parent
        assert tenant is not None
        if self._blocked or table.tokens <= 0 or self._lately(tenant.refused):
            return False
        for sequence in filter(table.allows, leaf.waits.copy()):
            begun = table.start(sequence)
            if begun is Start.BEGUN:
                leaf.chunks.append(sequence)
                return True
            if begun is Start.WAITS:
                self._passed += 1
                if self._passed < PASSES:
                    continue
                self._blocked = True
            else:
                self._no_room(tenant, begun)
            return False
        return False

    # What ran.

    def ran(self, batch: Batch) -> None:
        """Charges a step that runs, and what was held until it was planned."""
        self._stamp = stamp = self._stamp + 1
        prices, ran = self.prices, list[Node]()
        for work, leaf in zip(batch.works, batch.leaves, strict=True):
            cost = prices.rows(work.start, len(work.tokens), work.scores, work.told)
            if leaf.stamp != stamp:
                leaf.stamp, leaf.charged = stamp, cost
                ran.append(leaf)
            else:
                leaf.charged += cost
        batch_ran = len(ran)
        for leaf in self._leaves:
            if leaf.owes and leaf.stamp != stamp:
                leaf.stamp, leaf.charged = stamp, 0
                ran.append(leaf)
        bill(self.tree, ran, prices.base if batch_ran else 0, stamp, self._content.keys())
        batch.charges = [(leaf, leaf.charged) for leaf in ran[:batch_ran]]
        self.tree.lift(self._content)

    def failed(self, batch: Batch) -> None:
        """Gives back what a step was charged that gave nothing."""
        for leaf, pico in batch.charges:
            self.tree.pay(leaf, -pico)

    # Who gives way.

    def gives_way(self, running: list[Sequence], price: Price) -> Sequence:
        return min(within(self.tree.root, held_below(running), running), key=price)

    def yields(
        self, sequence: Sequence, needed: int, running: list[Sequence], spare: list[Sequence], price: Price
    ) -> Sequence | None:
        """Who of the spare ones gives its pages to a request that needs so many blocks; None where nobody has to.

        Where it needs 0 of them, it needs a place.
        """
        if self._held[:3] != (self._steps, self._changes, not needed):
            self._held = self._steps, self._changes, not needed, held_below(running, places=not needed)
        return who_yields(self.tree.root, sequence, needed, self._held[3], spare, price)
