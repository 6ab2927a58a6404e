"""What a scheduler does with drafts: adds them to what it planned, and hears which of them stood."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.engine.branches import Branches, apart
from tandem.engine.config import DraftConfig
from tandem.engine.draft import Drafter
from tandem.engine.drafters import drafter_of
from tandem.engine.lengths import Lengths
from tandem.engine.tally import UNDRAFTED, Tally, by_hit, by_position
from tandem.errors import TandemWarning

if TYPE_CHECKING:
    from tandem.engine.batch import Batch, Sequence, Stats, Work


class Drafting:
    """A drafter in an engine. One that raises is heard of no more (`off`), and the engine goes on without drafts.

    Of engine.draft.lengths measured, `lengths` says how many drafts each sequence gets, and whether there are any.
    """

    def __init__(self, config: DraftConfig, stats: Stats, drafter: Drafter | None = None) -> None:
        """drafter: in place of the one that the config names."""
        self.config = config
        self.drafter = drafter or drafter_of(config)
        self.lengths = Lengths(config.most) if config.lengths == "measured" and config.most else None
        self.vocab_size = 1 << 31  # ids that a draft may have; one that is none is dropped, and what follows it
        self.clock: Callable[[], float] = time.perf_counter
        self.off = ""  # why nothing is drafted any more
        self._stats = stats
        self._drafted_s = 0.0  # in the plan of the batch
        self._why = ""  # it has no drafts; "" where nothing could have any
        self._works: list[
            tuple[int, int, int, int, int]
        ] = []  # of it: sequence, drafts, those tried, that stood, found
        self._seen = (0, 0, 0, 0)  # of the drafter's counts

    @property
    def on(self) -> bool:
        """Whether the next step may have drafts."""
        return self.config.most > 0 and not self.off and (self.lengths is None or self.lengths.on)

    def remember(self, file: Path) -> None:
        """Times of steps are found there, and kept."""
        if self.lengths is not None:
            self.lengths = Lengths(self.config.most, file)

    def keep(self) -> None:
        """Between phases: times are kept, where there are new ones."""
        if self.lengths is not None and self.lengths.unkept >= 64:
            self.lengths.keep()

    def into(self, stats: Stats) -> Drafting:
        """It counts there from now on."""
        self._stats = stats
        return self

    def add(self, decodes: list[Work], live: Mapping[str, Sequence], budget: int, rows: int, branches: Branches) -> int:
        """Adds drafts to works of one token, as far as pages and a budget of tokens allow; returns the tokens left.

        rows: of the step without them. What is drafted of a sequence beside its first drafts goes to `branches`."""
        self._drafted_s, self._why, began_s = 0.0, "room", self.clock()
        sequences, limit = [live[work.request.id] for work in decodes], min(self.config.most, budget)
        most = [max(0, min(limit, sequence.limit - len(sequence.tokens) - 1)) for sequence in sequences]
        if self.lengths is not None and any(most):
            most = self.lengths.ask([sequence.arrival for sequence in sequences], most, rows)
            self._why = self.lengths.why
        if not any(most):
            return budget
        paths = self._drafts(sequences, most, began_s)
        proposals = self._proposals(sequences, paths)
        for work, sequence, (drafts, *_), drawn_from in zip(decodes, sequences, paths, proposals, strict=True):
            if drafts:
                pages, known = sequence.pages, len(sequence.tokens)
                assert pages is not None
                drafts = drafts[: min(budget, pages.room_for_drafts(known))]
                pages.cover(known + len(drafts))
                work.tokens += drafts
                work.draws += len(drafts)
                work.proposals = drawn_from if drafts else None
                budget -= len(drafts)
        for work, count, (_, *others) in zip(decodes, most, paths, strict=True):
            for drafts in apart([work.tokens[1:], *others], count)[1:] if others else ():
                if work.draws > 1 and len(drafts) < budget and branches.add(work, drafts):
                    budget -= 1 + len(drafts)
        return budget

    def widths(self, sequences: list[Sequence]) -> list[int]:
        """How many drafts side by side each sequence may have now."""
        return [self.config.branches] * len(sequences)

    def _drafts(self, sequences: list[Sequence], most: list[int], began_s: float) -> list[list[list[int]]]:
        """Of each sequence one list of drafts, perhaps empty, and where there may be several, others."""
        try:
            if self.config.branches > 1:
                paths = self.drafter.branches(sequences, most, self.widths(sequences))
            else:
                paths = [[drafts] for drafts in self.drafter.draft(sequences, most)]
            assert len(paths) == len(sequences), f"{len(paths)} lists of drafts for {len(sequences)} sequences"
            pairs = zip(paths, most, strict=True)
            paths = [[self._valid(one[:count]) for one in several or [[]]] for several, count in pairs]
        except Exception as error:  # noqa: BLE001 - recorded boundary: drafts are guesses, and the run needs none
            self._turn_off(error)
            return [[[]] for _ in sequences]
        self._drafted_s = self.clock() - began_s
        given = [len(several[0]) for several in paths]
        self._stats.draft_s += self._drafted_s
        self._stats.offered_tokens += sum(given)
        self._why = "room" if any(given) else "unoffered"
        if self.lengths is not None:
            self.lengths.drafted(most, given, self._drafted_s)
        return paths

    def _proposals(self, sequences: list[Sequence], paths: list[list[list[int]]]) -> list[Any]:
        """`Work.proposals` of each; where they cannot be, the drafts are taken back."""
        if self.config.verify == "match" or self.off:
            return [None] * len(sequences)
        try:
            found = self.drafter.probabilities(sequences)
            for (drafts,), q_NV in zip(paths, found, strict=True):
                if q_NV is not None and drafts:
                    q_NV = q_NV[: len(drafts)]
                    given = [float(q_V[draft]) for q_V, draft in zip(q_NV, drafts, strict=True)]
                    assert min(given) > 0 and float((q_NV.sum(1) - 1).abs().max()) < 1e-3, "drafts of no probability"
            return [() if q_NV is None else q_NV for q_NV in found]
        except Exception as error:  # noqa: BLE001 - recorded boundary: as above
            self._turn_off(error)
            for several in paths:
                several[:] = [[]]
            return [None] * len(sequences)

    def _valid(self, drafts: list[int]) -> list[int]:
        """Up to the first that is no id of the vocabulary."""
        if drafts and not (min(drafts) >= 0 and max(drafts) < self.vocab_size):
            first = next(i for i, token in enumerate(drafts) if not 0 <= token < self.vocab_size)
            self._stats.invalid_drafts += len(drafts) - first
            return drafts[:first]
        return drafts

    def stood(self, sequence: Sequence, drafted: int, accepted: int, ended: bool) -> None:
        """Of the drafts that a sequence ran the first `accepted` were drawn, and with the last of them it ended, or
        not."""
        tried = accepted if ended else drafted
        self._works.append((sequence.arrival, drafted, tried, accepted, sequence.cached_tokens))

    def took(self, batch: Batch, seconds: float) -> None:
        """A batch was resolved, and took so long since its plan began, or since the one before was resolved."""
        if not self.config.most:
            return
        stats, draws = self._stats, batch.num_draws
        if self._works:
            names, drafted, tried, accepted, found = map(list, zip(*self._works, strict=True))
            stats.drafts += len(names)
            stats.drafted_tokens += sum(drafted)
            stats.accepted_tokens += sum(accepted)
            stats.drafted_at += by_position(drafted, max(drafted))
            stats.accepted_at += by_position(accepted, max(drafted))
            stats.drafted_found += by_hit(found, drafted)
            stats.accepted_found += by_hit(found, accepted)
            if self.lengths is not None:
                self.lengths.stood(names, tried, accepted)
        elif why := "raised" if self.off else "unpaid" if not self.on else self._why:
            stats.undrafted += Tally(name == why for name in UNDRAFTED)
        drafter = self.drafter
        now = drafter.found_tokens, drafter.ingested_tokens, drafter.seen_tokens, drafter.covered_tokens
        if now != self._seen:
            stats.draft_found_tokens += now[0] - self._seen[0]
            stats.draft_ingested_tokens += now[1] - self._seen[1]
            stats.draft_seen_tokens += now[2] - self._seen[2]
            stats.draft_covered_tokens += now[3] - self._seen[3]
            self._seen = now
        if self.lengths is not None and draws:
            alone = batch.num_tokens == draws
            self.lengths.took(len(batch.works), batch.num_tokens, seconds - self._drafted_s, alone)
        self._drafted_s, self._why = 0.0, ""
        self._works.clear()

    def ended(self, sequence: Sequence) -> None:
        """A sequence ended."""
        if self.config.most and not self.off:
            try:
                self.drafter.ended(sequence)
            except Exception as error:  # noqa: BLE001 - recorded boundary: as above
                self._turn_off(error)
        if self.lengths is not None:
            self.lengths.forget(sequence.arrival)

    def _turn_off(self, error: Exception) -> None:
        self.off = f"{type(error).__name__}: {error}"
        said = f"the drafter raised and is switched off, texts stay the same: {self.off}"
        warnings.warn(TandemWarning(said), stacklevel=2)
