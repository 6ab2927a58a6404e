"""Who pays for a step: its rows at their cost, its base by those that are owed most; see engine/deal.py."""

from __future__ import annotations

from collections.abc import KeysView
from itertools import chain

from tandem.engine.share import UNIT, Node, Tree


def bill(tree: Tree, leaves: list[Node], base: int, stamp: int, content: KeysView[Node]) -> None:
    """Charges leaves, and all above them: `charged` says what their rows cost, `owes` what they held, until now.

    content: those that ran all that they had. Afterwards `charged` has the leaf's part of the base too.
    """
    levels = _above(tree.root, leaves, stamp)
    tree.root.charged += base
    for node in chain(*levels[:-1]):
        if node.open and node.charged:
            pour(node.open, node.charged - sum([child.charged for child in node.open]), content)
    for node in chain(*levels):
        tree.charge(node, node.charged + node.owes)
        node.owes = 0


def _above(root: Node, leaves: list[Node], stamp: int) -> list[list[Node]]:
    """By depth, the leaves and all above them, each with the sums of what is below; `open` has who ran of these."""
    levels: list[list[Node]] = [[] for _ in range(1 + max([leaf.depth for leaf in leaves], default=0))]
    levels[0].append(root)
    root.charged, root.open = 0, []
    for leaf in leaves:
        levels[leaf.depth].append(leaf)
        leaf.open = []
    for depth in range(len(levels) - 1, 0, -1):
        for node in levels[depth]:
            parent = node.parent
            assert parent is not None
            if parent.stamp != stamp and parent is not root:
                parent.stamp, parent.charged, parent.open = stamp, 0, []
                levels[depth - 1].append(parent)
            parent.owes += node.owes
            if node.charged:
                parent.open.append(node)
                parent.charged += node.charged
    return levels


def pour(children: list[Node], more: int, content: KeysView[Node]) -> None:
    """Adds so much to what children are charged, to those whose virtual time will be least, until they are level.

    First to those that ran all that they had, up to the mean: who is owed and wanted more gets rows for it, later.
    """
    if more <= 0:
        return
    if len(children) == 1:
        children[0].charged += more
        return
    first = min([child.time for child in children])
    levels = [(child.time - first + child.charged * UNIT // child.weight, child.weight, child) for child in children]
    total = sum([child.weight for child in children])
    mean = (sum([time * weight for time, weight, _ in levels]) + more * UNIT) // total
    left = more
    low = [level for level in levels if level[0] < mean and level[2] in content]
    if low and len(low) < len(levels):
        due = sum([(mean - time) * weight for time, weight, _ in low])
        part = min(left, due // UNIT)
        left -= part
        _fill(low, part)
        levels = [(c.time - first + c.charged * UNIT // c.weight, c.weight, c) for c in children]
    _fill(levels, left)


def _fill(levels: list[tuple[int, int, Node]], more: int) -> None:
    if more <= 0:
        return
    levels.sort(key=lambda level: level[0])
    weight, count, level = 0, 0, more * UNIT  # sum w, and sum w v + what is poured
    for time, each, _ in levels:
        if count and level <= time * weight:
            break
        weight += each
        level += time * each
        count += 1
    left = more
    for time, each, child in levels[1:count]:
        due = min(left, max(0, level * each // weight - time * each) // UNIT)
        child.charged += due
        left -= due
    levels[0][2].charged += left
