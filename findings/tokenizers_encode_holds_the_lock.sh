#!/usr/bin/env bash
# tokenizers 0.23.3: Tokenizer.encode holds the interpreter's lock while it encodes, so a thread for it helps nobody: with
# a text of a megabyte all other threads stand still until it is done. encode_batch of the same text alone gives the same
# ids and lets them run. (Its threads are rayon's: a process that forks afterwards is warned, or told to set
# TOKENIZERS_PARALLELISM.)
# Output seen with Python 3.11: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$folder/expected" <<'END'
the same ids: True
encode leaves other threads their turn: False
encode_batch leaves other threads their turn: True
END
"$folder/venv/bin/python" - > "$folder/seen" <<'END'
import threading
import time

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE(unk_token="?"))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
text = "some words, 12 and more of them. " * 60_000
tokenizer.train_from_iterator([text[:3000]], trainers.BpeTrainer(vocab_size=300, special_tokens=["?"], show_progress=False))


def encoded(act):
    """What it gives, and the longest time that another thread had no turn, of the time that it took."""
    gaps, over = [0.0], threading.Event()

    def count():
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    other = threading.Thread(target=count)
    other.start()
    time.sleep(0.05)
    began = time.perf_counter()
    ids = act()
    took = time.perf_counter() - began
    over.set()
    other.join()
    return ids, max(gaps) / took


alone, held = encoded(lambda: tokenizer.encode(text).ids)
batch, free = encoded(lambda: tokenizer.encode_batch([text])[0].ids)
print("the same ids:", alone == batch)
print("encode leaves other threads their turn:", held < 0.5)
print("encode_batch leaves other threads their turn:", free < 0.5)
END
diff "$folder/expected" "$folder/seen"
