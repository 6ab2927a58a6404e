"""Whether programs fare worse than they may under a policy: seconds to their first token, and what they find again."""

from __future__ import annotations

from collections import deque

from tandem.engine.config import ProgramsConfig

LOOKED_AT, EVERY = 512, 64  # requests, the latest, and between two looks


class Guard:
    """The latest requests for which a policy's decisions were carried out."""

    def __init__(self, config: ProgramsConfig) -> None:
        self.config = config
        self._seen: deque[tuple[float, int, int]] = deque(maxlen=LOOKED_AT)  # (seconds to a token, found, known)
        self._count = 0

    def told(self, waited_s: float, found: int, known: int) -> str:
        """Of one more request; why the policy is to stand back, or nothing."""
        most, least = self.config.guard_first_s, self.config.guard_cached
        if not (most or least):
            return ""
        self._seen.append((waited_s, found, known))
        self._count += 1
        if self._count % EVERY:
            return ""
        waited = sorted(one[0] for one in self._seen)
        p99, ran = waited[int(0.99 * (len(waited) - 1))], sum(one[2] for one in self._seen)
        share = sum(one[1] for one in self._seen) / ran if ran else 1.0
        if not (most and p99 > most or share < least):
            return ""
        return f"{p99:.3g} s to the first token (p99, at most {most:g}), {share:.1%} found (at least {least:.0%})"
