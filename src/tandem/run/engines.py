"""The engines of a run that sample, as its rollouts ask them: one by its driver, several by a router."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from tandem.engine.driver import Drivable, Driver
from tandem.engine.engine import Engine
from tandem.engine.share import read_shares
from tandem.rollout.balance import Balance
from tandem.rollout.router import Replica, Router
from tandem.run.account import Account
from tandem.run.apart import RemoteEngine
from tandem.run.parts import Parts
from tandem.types import WeightVersion


def named(parts: Parts) -> dict[str, Engine]:
    """By the names that the ledger and rows have: those that sample first."""
    engines = dict.fromkeys((*parts.sampling, parts.exact_engine))
    return {f"engine {number}": engine for number, engine in enumerate(engines, start=1)}


def living(parts: Parts) -> list[Engine]:
    """Those that sample and did not die."""
    return [engine for engine in parts.sampling if not engine.dead]


def serves(parts: Parts) -> WeightVersion:
    """What they draw with."""
    return next((engine.version for engine in living(parts)), parts.engine.version)


def endpoint(
    parts: Parts,
    account: Account,
    note: Callable[[str], None],
    driven: Callable[[Engine], Drivable] = lambda engine: engine,
) -> Driver | Router:
    """What rollouts ask. `driven`: what a driver steps in place of an engine.

    Of an engine that died, what it had drawn beyond what it handed over has `crashed`; the others go on.
    """
    taken = Counter[str]()  # tokens that workers of an engine took with them, each of which another has replaced

    def crashed(name: str, tokens: int) -> None:
        taken[name] += tokens
        account.ledger.lose("crashed", tokens)

    for name, engine in named(parts).items():
        if isinstance(engine, RemoteEngine):
            engine.crashed = partial(crashed, name)
    if not parts.others:
        return Driver(driven(parts.engine))
    engines = {name: engine for name, engine in named(parts).items() if engine in parts.sampling}

    def died(replica: Replica, error: Exception) -> None:
        engines[replica.name].give_up()
        account.engine_died(replica.name, replica.returned_tokens + taken[replica.name])
        left = sum(not engine.dead for engine in engines.values())
        note(f"{replica.name} died, and what it had is asked of the {left} that are left: {error}")

    config = parts.engine.scheduler.config
    balance = None
    if config.order == "shares":
        balance = Balance(read_shares(config.shares).tenants)
    return Router(
        [_replica(name, engine, driven(engine)) for name, engine in engines.items()],
        config.answer_s,
        died,
        lambda tokens: account.ledger.lose("crashed", tokens),
        balance=balance,
    )


def sampled_by(parts: Parts, temperature: float) -> Driver | Router:
    """What asks the engines that sample, at that temperature, for who keeps no ledger and brings no weights."""
    if parts.served is not None and parts.publisher.version is not None:
        parts.served.agree(parts.publisher.version, temperature)
    if not parts.others:
        return Driver(parts.engine)
    engines = {f"engine {number}": engine for number, engine in enumerate(parts.sampling, start=1)}
    replicas = [_replica(name, engine, engine) for name, engine in engines.items()]
    return Router(replicas, parts.engine.scheduler.config.answer_s, lambda replica, _: engines[replica.name].give_up())


def _replica(name: str, engine: Engine, driven: Drivable) -> Replica:
    config, pool = engine.scheduler.config, engine.scheduler.pool
    capacity = engine.runner.layout.capacity_tokens(pool.num_pages, config.page_tokens)
    return Replica(name, Driver(driven), lambda: engine.version, capacity, config.page_tokens)
