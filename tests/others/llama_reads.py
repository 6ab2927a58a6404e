"""What llama.cpp makes of GGUF files, for test_llama.py: `llama_reads.py FOLDER`, once.

Of each FOLDER/NAME.gguf, FOLDER/NAME.npz gets the ids of text.txt, the logits of the ids in ids.json [T, V], and 12
more tokens, each the likeliest. FOLDER/coded.npz gets FOLDER/weights.npy [N, K] as its own quantisers write it, by
type.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4")
NUMBERS = dict(zip(NAMES, (10, 11, 12, 13, 14, 20, 2, 3, 6, 7, 8, 39, 40), strict=True))


def read(path: Path, text: str, ids: list[int]) -> dict[str, np.ndarray]:
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    own = model.tokenize(text.encode(), add_bos=False, special=True)
    ids = [one % model.n_vocab() for one in ids]
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    more = []
    for _ in range(12):
        more.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(more[-1:])
    return {"text": np.array(own), "logits": logits, "more": np.array(more)}


def coded(weights: np.ndarray) -> dict[str, np.ndarray]:
    own = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(own.glob("libggml-base.so*"))))
    run = library.ggml_quantize_chunk
    run.restype = ctypes.c_size_t
    run.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    found = {}
    for name, number in NUMBERS.items():
        raw = np.zeros(weights.size * 2, np.uint8)
        size = run(number, weights.ctypes.data, raw.ctypes.data, 0, *weights.shape, None)
        found[name] = raw[:size].reshape(len(weights), -1)
    return found


def main(folder: Path) -> None:
    text, ids = (folder / "text.txt").read_text(), json.loads((folder / "ids.json").read_text())
    for path in sorted(folder.glob("*.gguf")):
        np.savez(path.with_suffix(".npz"), **read(path, text, ids))
    np.savez(folder / "coded.npz", **coded(np.load(folder / "weights.npy")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
