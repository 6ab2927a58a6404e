"""`tandem bench`: speed, always as a ratio to a peer or to the machine's limit."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Work(str, Enum):
    ENGINE = "engine"
    LEARNER = "learner"
    TREE = "tree"
    STEP = "step"
    DISTIL = "distil"
    AGENTS = "agents"
    SFT = "sft"
    DPO = "dpo"
    PARITY = "parity"
    PROFILE = "profile"
    SWEEP = "sweep"
    GPU = "gpu"
    SANDBOX = "sandbox"
    PUBLISH = "publish"
    AHEAD = "ahead"
    SCHEDULE = "schedule"
    ISOLATION = "isolation"
    PROGRAMS = "programs"
    STRUCTURED = "structured"
    SERVE = "serve"
    SOAK = "soak"
    LORA = "lora"
    QUANTISE = "quantise"
    NUMERICS = "numerics"
    SPECULATE = "speculate"


class Part(str, Enum):
    START = "start"
    OVERHEAD = "overhead"
    LOAD = "load"
    SWEEP = "sweep"


PEERED = tuple(map(Work, "engine learner tree step agents sft dpo parity serve quantise numerics speculate".split()))
DRAWN = (Work.SWEEP, Work.SERVE, Work.SPECULATE)  # have a picture
ALONE = tuple(work for work in Work if work not in PEERED)  # have no peers
WORKS_HELP = (
    "What to measure; tree: the learner on turns that share their context, beside copies; distil: a step of it beside "
    "SFT and the teacher's forward pass; agents: programs with slow "
    "tools; sft: chats as long as GSM8K's, packed, with the peak of memory; dpo: pairs as long; "
    "parity: the price of exactness; profile: where the time goes, by operation; "
    "sweep: decoding over the number of sequences and over the context; "
    "gpu: random Llamas on a CUDA device; sandbox: starts, commands, what a thousand leave behind; "
    "publish: weights to another process, whole and what a step changed; "
    "ahead: sampling while learning beside the loop in steps, its journal's cost, a kill; "
    "schedule: what a decision by shares takes; isolation: two tenants of one engine, and what each gets; "
    "programs: agents that share too little memory, by policy (takes ten minutes); "
    "structured: answers of a given form beside the same without; "
    "serve: the server over the engine alone, and beside a peer's server (takes twelve minutes with one); "
    "lora: training an adapter beside training all weights, and decoding over eight of them; "
    "quantise: CPU seconds of rounding to the nearest and by GPTQ; "
    "numerics: decoding, prompts, long contexts and an update in 8 bits beside bf16; "
    "speculate: drafts of each drafter beside none, and what a step takes with them (takes ten minutes); "
    "soak: the server at mixed load with faults; every call is accounted for, and memory stays."
)
PEER_HELP = (
    "A command that does the same work and prints its figures as JSON lines; of serve, one that serves the same model "
    "to OpenAI's clients on port {port}. With one, numerics is tandem in 8 bits, its bf16 and the peers, in turn."
)


def bench(
    work: Annotated[Work, typer.Argument(metavar="WORK", help=WORKS_HELP)],
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="CMD", help=PEER_HELP),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of tandem and every peer; medians count.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="PNG", help="Where a sweep's picture is written.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="Of serve: what of it is measured. All of it.")] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="MD", help="Of serve: a page that its tables are written into.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Of soak: for how long. 3600.")] = None,
) -> int:
    """Measure the engine, the learner or a whole step beside its peers, or see what the time is spent on."""
    from tandem.errors import ConfigError, WorldError

    if peer and work in ALONE:
        peered = ", ".join(other.value for other in PEERED)
        raise ConfigError(f"--peer is given to `bench {work.value}`, which has no peers. Use one of {peered}.")
    if out is not None:
        _check_picture(work, out)
    _check_flags(work, part, page, seconds)
    if out is not None and part and Part.SWEEP not in part:
        raise ConfigError("--out draws the sweep of `bench serve`, which --part leaves out. Add --part sweep.")
    if work is Work.SERVE:
        result = _serve(peer or [], rounds, part or list(Part))
    elif work is Work.SOAK:
        from tandem.bench.soak import soak

        result = soak(seconds or 3600.0, _note)
    else:
        result = _run(work, peer or [], rounds)
    if json:
        print(jsonlib.dumps(result, indent=1))
    else:
        from tandem.cli.bench_tables import SHOWN, show

        alike = peer and work in (Work.QUANTISE, Work.NUMERICS, Work.SPECULATE)
        (show if alike else SHOWN.get(work.value, show))(result)
        if limits := result.get("limits"):
            rates = limits["matrix FLOP/s"] / 1e12, limits["memory bytes/s"] / 1e9
            print(f"limits: {rates[0]:.2f} TFLOP/s bf16, {rates[1]:.1f} GB/s read")
    if result.get("failure"):
        raise WorldError(result["failure"])
    if page is not None:
        from tandem.report.serving import written

        _write("--page", page, written(page.read_text(encoding="utf-8"), result).encode())
    if out is not None:
        _write("--out", out, _png(work, result))
    return 0


def _png(work: Work, result: dict[str, Any]) -> bytes:
    if work is Work.SERVE:
        from tandem.report.serving import serving_png

        return serving_png(result)
    if work is Work.SPECULATE:
        from tandem.report.speculation import speculation_png

        return speculation_png(result)
    from tandem.report.throughput import throughput_png

    return throughput_png(result["rows"])


def _write(flag: str, path: Path, what: bytes) -> None:
    from tandem.errors import WorldError

    try:
        path.write_bytes(what)
    except OSError as error:
        raise WorldError(f"{flag} {path} could not be written: {error.strerror}.") from error


def _note(said: str) -> None:
    """On the way; what was found comes at the end."""
    print(said, file=sys.stderr, flush=True)


def _check_flags(work: Work, part: list[Part] | None, page: Path | None, seconds: float | None) -> None:
    """ConfigError for a flag of another work, and for a page without its marks."""
    from tandem.errors import ConfigError

    for flag, given, owner in (
        ("--part", part, Work.SERVE),
        ("--page", page, Work.SERVE),
        ("--seconds", seconds, Work.SOAK),
    ):
        if given and work is not owner:
            raise ConfigError(f"{flag} is given to `bench {work.value}`. It is one of `bench {owner.value}`.")
    if page is not None:
        from tandem.report.serving import written

        try:
            written(page.read_text(encoding="utf-8"), {})
        except (OSError, ValueError) as error:
            raise ConfigError(f"--page {page} can't take the tables: {error}. Give docs/serving.md.") from error


def _serve(peers: list[str], rounds: int, parts: list[Part]) -> dict[str, Any]:
    from tandem.bench.child import peer_program
    from tandem.bench.serve import measure
    from tandem.errors import ConfigError
    from tandem.run.served import check_installed

    check_installed()
    if len(peers) > 1:
        raise ConfigError(f"--peer is given {len(peers)} times. Of `bench serve`, one server is a peer.")
    peer = peer_program(peers[0]) if peers else None
    return measure(peer, rounds, [part.value for part in parts], _note)


def _check_picture(work: Work, out: Path) -> None:
    """ConfigError where no picture can be written there, as far as that shows before the measurement."""
    from tandem.errors import ConfigError

    if work not in DRAWN:
        drawn = ", ".join(other.value for other in DRAWN)
        raise ConfigError(f"--out is given to `bench {work.value}`, which draws no picture. Use one of {drawn}.")
    if os.path.isdir(out):
        raise ConfigError(f"--out {out} is a folder. Give a file in it, such as {out / 'sweep.png'}.")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} does not end in .png, and the picture is a PNG. Name it {out.stem}.png.")
    if not os.path.isdir(out.parent):
        raise ConfigError(f"--out {out}: there is no folder {out.parent}. Make it first, or choose another.")
    if not os.access(out if os.path.exists(out) else out.parent, os.W_OK):
        raise ConfigError(f"--out {out} may not be written. Choose another place.")


def _run(work: Work, peers: list[str], rounds: int) -> dict[str, Any]:
    if work is Work.PROFILE:
        from tandem.bench.profile import profile

        return profile()
    if work is Work.SWEEP:
        from tandem.bench.sweep import sweep

        return sweep()
    if work is Work.SANDBOX:
        from tandem.bench.sandbox import sandbox

        return sandbox()
    if work is Work.PUBLISH:
        from tandem.bench.publish import publish

        return publish()
    if work is Work.AHEAD:
        from tandem.bench.ahead import ahead

        return ahead()
    if work is Work.SCHEDULE:
        from tandem.bench.tenants import schedule

        return schedule()
    if work is Work.ISOLATION:
        from tandem.bench.tenants import isolation

        return isolation()
    if work is Work.STRUCTURED:
        from tandem.bench.structured import structured

        return structured()
    if work is Work.LORA:
        from tandem.bench.lora import lora

        return lora(rounds)
    if work is Work.QUANTISE and not peers:
        from tandem.bench.quantise import quantise

        return quantise(rounds)
    if work is Work.NUMERICS and not peers:
        from tandem.bench.numerics import numerics

        return numerics(rounds)
    if work is Work.SPECULATE and not peers:
        from tandem.bench.speculate import speculate

        return speculate(rounds)
    if work is Work.PROGRAMS:
        from tandem.bench.programs import programs

        return programs(rounds=rounds)
    from tandem.bench.beside import bench as beside

    return beside(work.value, peers, rounds)
