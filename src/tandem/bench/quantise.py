"""`bench quantise`: CPU seconds of quantising the measured model, by phase; and what methods cost in quality, on texts.

    python -m tandem.bench.quantise CALIBRATION.txt HELDOUT.txt [METHOD:FORMAT ...]

prints a JSON object for each, with perplexity and KL on the second file: a table of docs/numerics.md. Seconds are those
of the process, which other work on the machine hardly moves.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tandem.bench.fidelity import fidelity
from tandem.bench.sft import chats
from tandem.bench.work import MODEL
from tandem.kernels.quantise import nearest
from tandem.models.checkpoint import open_checkpoint
from tandem.models.decoder import Decoder
from tandem.models.parts import layer_slots
from tandem.numerics.blocks import format_of
from tandem.run.texts import SEQUENCE_TOKENS, pieces
from tandem.surgery.quantise import Method, quantised

FORMAT, SEQUENCES, HELD = "int4_g64", 128, 64  # groups that divide its widths, as peers want them
TABLE = tuple(
    f"{method}:{form}"
    for form in ("int4_g128", "int4_g32", "int3_g32", "nvfp4", "mxfp4")
    for method in ("nearest", "gptq", "awq", "hadamard", "hadamard+gptq", "rotation", "rotation+gptq")
)


def quantise(rounds: int) -> dict[str, Any]:
    """Medians: the nearest as codes of bf16 matrices, the nearest with what they read back as, and GPTQ over SEQUENCES
    pieces of words and numbers."""
    checkpoint = open_checkpoint(MODEL)
    tensors, tokenizer = dict(checkpoint.tensors()), checkpoint.load_tokenizer()
    said = (str(message["content"]) for row in chats(1000) for message in row["messages"])  # type: ignore[attr-defined]
    tokens = tokenizer.encode(" ".join(said))
    texts = [tokens[index * SEQUENCE_TOKENS : (index + 1) * SEQUENCE_TOKENS] for index in range(SEQUENCES)]
    form = format_of(FORMAT)
    matrices = [
        torch.cat([tensors[one.name] for one in slot.stored]).bfloat16()
        for slot in layer_slots(checkpoint.spec)
        if slot.columns is not None
    ]

    def by(name: str) -> None:
        quantised(checkpoint.spec, tensors, Method.read(name), form, texts)

    works: dict[str, Callable[[], object]] = {
        "nearest, codes alone": lambda: [nearest(matrix, form) for matrix in matrices],
        "nearest": lambda: by("nearest"),
        "gptq": lambda: by("gptq"),
    }
    rows = []
    for name, work in works.items():
        spent = []
        for _ in range(rounds):
            start = time.process_time()
            work()
            spent.append(time.process_time() - start)
        rows.append({"work": f"{FORMAT}, {name}", "cpu_s": statistics.median(spent)})
    return {"bench": "quantise", "rounds": rounds, "sequences": SEQUENCES, "tokens": SEQUENCE_TOKENS, "rows": rows}


def table(calibration: Path, heldout: Path, wanted: Sequence[str] = TABLE) -> None:
    """A line of JSON for each METHOD:FORMAT."""
    checkpoint = open_checkpoint(MODEL)
    tensors, tokenizer = dict(checkpoint.tensors()), checkpoint.load_tokenizer()
    texts = pieces(calibration, SEQUENCES, tokenizer, checkpoint.spec.max_position).taken
    held = pieces(heldout, HELD, tokenizer, checkpoint.spec.max_position).taken
    teacher = Decoder(checkpoint.spec, "bfloat16").load(tensors.items())
    for name in wanted:
        method, _, form = name.partition(":")
        made = quantised(checkpoint.spec, tensors, Method.read(method), format_of(form), texts)
        student = Decoder(made.spec, "bfloat16").load(made.tensors.items())
        found = dataclasses.asdict(fidelity(student, teacher, held))
        told = {"method": method, "format": form, "sqnr_db": made.sqnr_db, "cpu_s": sum(made.cpu_s.values())}
        print(json.dumps(told | found), flush=True)


if __name__ == "__main__":
    table(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or TABLE)
