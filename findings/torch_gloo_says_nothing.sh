#!/usr/bin/env bash
# torch 2.13.0, backend gloo, two ways to be told nothing:
# - dist.irecv(...).is_completed() stays False for ever, also when all bytes have long arrived in the tensor. Only wait()
#   makes it True. A loop that polls a receive between two pieces of work, as Work's documentation suggests, never takes
#   anything; what can be polled is the store (Store.check).
# - A broadcast compares no sizes: a rank whose tensor is twice as long as the root's returns without an error, the rest
#   of its tensor as it was. Sizes have to be told beforehand.
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/expected" <<'END'
irecv: arrived True, is_completed after 1 s False False False, after wait True
broadcast of 4 elements to a rank that has 8: ones 4, no error
END
cat > "$folder/two.py" <<'END'
import os
import sys
import time

import torch
import torch.distributed as dist

rank = int(sys.argv[1])
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
dist.init_process_group("gloo", rank=rank, world_size=2)
if rank == 0:
    dist.send(torch.ones(4), 1)
    dist.broadcast(torch.ones(4), 0)
else:
    into = torch.zeros(4)
    work = dist.irecv(into, 0)
    time.sleep(1)
    said = []
    for _ in range(3):
        said.append(str(work.is_completed()))
        time.sleep(0.2)
    arrived = bool(into.all())
    work.wait()
    print(f"irecv: arrived {arrived}, is_completed after 1 s {' '.join(said)}, after wait {work.is_completed()}")
    longer = torch.zeros(8)
    dist.broadcast(longer, 0)
    print(f"broadcast of 4 elements to a rank that has 8: ones {int(longer.sum())}, no error")
dist.barrier()
dist.destroy_process_group()
END
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/python" -W ignore "$folder/two.py" 0 "$port" &
"$folder/venv/bin/python" -W ignore "$folder/two.py" 1 "$port" > "$folder/seen"
wait
diff "$folder/expected" "$folder/seen"
