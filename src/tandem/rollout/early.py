"""Groups that are asked in parts, and stopped where the rest would hardly differ from what has come.

A group begins with its first programs. Where their rewards differ, all others follow at once; where they are equal, the
next part does, or none: a sequential test, whose error is the probability that one of the rest would have differed.
What decides are the rewards of a part that has ended, whichever of them came first: the same in each run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.rollout.belief import Belief, shares
from tandem.types import Group, Prompt


@dataclass(slots=True)
class Early:
    """When a group has enough programs.

    >>> from tandem.types import Prompt, Trajectory
    """

    part: int  # programs
    size: int  # of a whole group
    error: float  # a group is stopped where the rest would differ with at most this probability
    belief: Callable[[Prompt], Belief]
    differ: Callable[[Group], bool]  # whether a group has a gradient
    audit: Callable[[Prompt], bool]  # whether a group that should be stopped runs on, to see how often that were wrong
    stopped: set[str] = field(default_factory=set)  # ids of their prompts
    audited: set[str] = field(default_factory=set)  # of those that should have been and ran on

    def next(self, group: Group) -> int:
        """How many more programs a group of `len(group.programs)` gets; 0 ends it."""
        begun = len(group.programs)
        if begun >= self.size:
            return 0
        if group.prompt.id in self.audited or self.differ(group):
            return self.size - begun
        if self.decided(group):
            if not self.audit(group.prompt):
                self.stopped.add(group.prompt.id)
                return 0
            self.audited.add(group.prompt.id)
            return self.size - begun
        return min(self.part, self.size - begun)

    def decided(self, group: Group) -> bool:
        """Whether the rest would differ from what has come, all of it equal, with at most `error`."""
        known = [share for share in shares(group) if share is not None]
        if not known:
            return False
        right = sum(known)
        belief = self.belief(group.prompt).after(right, len(known) - right)
        if right < len(known) - right:
            belief = Belief(belief.wrong, belief.right)
        return 1.0 - belief.all_right(self.size - len(group.programs)) <= self.error
