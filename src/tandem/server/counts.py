"""What has been asked, by tenant and by program."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from tandem.server.desk import Open
from tandem.types import Completion

REMEMBERED = 4096  # programs, and tenants: those that nothing was heard of for longest are forgotten


@dataclass(slots=True)
class Row:
    """Of a program or a tenant."""

    tenant: str
    running: int = 0  # answers on their way
    answers: int = 0  # that ended
    tokens: int = 0  # drawn
    context: int = 0  # tokens of its last request with its answer
    heard_s: float = 0.0  # of anything


class Counts:
    """Rows of both."""

    def __init__(self) -> None:
        self.tenants: OrderedDict[str, Row] = OrderedDict()
        self.programs: OrderedDict[tuple[str, str], Row] = OrderedDict()
        self.watchers = 0

    def began(self, opened: Open) -> None:
        for row in self._rows(opened):
            row.running += 1
            row.context = max(row.context, len(opened.request.tokens))

    def ended(self, opened: Open, completion: Completion | None) -> None:
        for row in self._rows(opened):
            row.running = max(0, row.running - 1)  # it may have been forgotten since
            row.answers += 1
            if completion is not None:
                row.tokens += len(completion.columns)
                row.context = len(opened.request.tokens) + len(completion.columns)

    def _rows(self, opened: Open) -> list[Row]:
        request = opened.request
        tenant = self.tenants.setdefault(request.tenant, Row(request.tenant))
        program = self.programs.setdefault((request.tenant, request.program_id), Row(request.tenant))
        self.tenants.move_to_end(request.tenant)
        self.programs.move_to_end((request.tenant, request.program_id))
        for table in (self.tenants, self.programs):
            if len(table) > REMEMBERED:
                table.popitem(last=False)
        tenant.heard_s = program.heard_s = time.monotonic()
        return [tenant, program]
