#!/usr/bin/env bash
# torchrun restarts all ranks after one dies, and the new ranks call the old ones' addresses.
# PyTorch 2.13.0 (CPU, gloo), NumPy 2.4.6, Python 3.11; seen on 2026-11-28.
#
# `torchrun --max-restarts 1`: when a rank is killed, all ranks are started once more. One expects
# them to find each other as they did the first time. They meet in a store that the agent holds,
# and it is the same store, with all that was written, as _create_c10d_store no longer adds a
# prefix per attempt ("We create a new TCPStore for every retry so no need to add prefix"), while
# the agent's rendezvous makes a store only the first time. So a rank that comes to
# init_process_group before another one reads the address which the other's predecessor left.
# Seen: the second start fails ("Gloo connectFullMesh failed ... Connection refused"); once it
# only waited, for over a minute, until it was stopped. Here three ranks come half a second
# apart, as with any slow import or a busy machine. With two ranks it may also go well.
# Who is hurt: a long training that relies on its restarts. One rank runs out of memory, the
# restart is used up at once, and the job ends with an error about the network.
# What helps: a PrefixStore of one's own, named by the attempt, as below (on one machine: several
# agents may count their restarts differently). With PyTorch 2.2.2 the restarts went well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat >"$folder/train.py" <<'PY'
import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

attempt, options = os.environ["TORCHELASTIC_RESTART_COUNT"], {}
time.sleep(int(os.environ["RANK"]) / 2)
if sys.argv[1] == "own prefix":
    store, rank, size = next(dist.rendezvous("env://"))
    options = dict(store=dist.PrefixStore(attempt, store), rank=rank, world_size=size)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10), **options)
for step in range(20):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 3
    if attempt == "0" and step == 5 and dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
dist.destroy_process_group()
PY
cat >"$folder/show.py" <<'PY'
import os
import re
import subprocess
import sys

torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
train = os.path.join(os.path.dirname(__file__), "train.py")
env, trials, good, errors = {**os.environ, "OMP_NUM_THREADS": "1"}, 2, {}, ""
for way in ("as usual", "own prefix"):
    command = [*torchrun, "--max-restarts", "1", train, way]
    runs = [subprocess.run(command, env=env, capture_output=True, text=True) for _ in range(trials)]
    for run in runs:
        assert "failed (exitcode: " in run.stderr  # the first start did end by a death
    good[way] = sum(run.returncode == 0 for run in runs)
    print(f"{way}: {good[way]} of {trials} restarts went well", flush=True)
    if way == "as usual":
        errors = "".join(run.stderr for run in runs)
said = re.search(r"Gloo connectFullMesh failed with \S+ (.*)", errors)
print("it says:", re.sub(r", remote=.*", "", said[1]) if said else "nothing of the mesh")
if not said or good["as usual"] == trials or good["own prefix"] < trials:
    raise SystemExit("the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/show.py"
