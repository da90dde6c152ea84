#!/usr/bin/env bash
# Crafter: one seed has many games.
# crafter 1.8.3, numpy 2.4.6, Python 3.11; seen on 2026-11-28.
# crafter.Env(seed=...) takes a seed, and all that it draws comes from one RandomState made from
# that seed. So the same seed and the same actions should give the same pictures, at least in one
# process. They do not: the copies part after some dozens or hundreds of steps.
# Each chunk of the map keeps its creatures in a Python set. To remove one, Crafter draws an index
# and applies it to a list made from the set. The order of a set of objects follows their
# addresses in memory, so the draw is the same and the creature is not. PYTHONHASHSEED is no help.
# Two trainings with one seed differ, and nothing reports it; short tests of equality may pass.
# What helps: give the sets an order. This script does so by World.chunks: the copies then agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q crafter==1.8.3 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import crafter
import numpy as np


def play(seed, steps=300):
    env, draws = crafter.Env(seed=seed), np.random.default_rng(1)
    pictures = [env.reset()]
    for _ in range(steps):
        action = int(draws.integers(1, 5)) if draws.random() < 0.7 else 6  # walk, or sleep
        picture, _, done, _ = env.step(action)
        pictures.append(picture)
        if done:
            break
    return np.array(pictures)


def seeds_that_differ():
    other = []
    for seed in range(3):
        first = play(seed)
        kept = [object() for _ in range(1000)]  # other objects in memory, as any program has
        if not np.array_equal(first, play(seed)):
            other.append(seed)
        del kept
    return other


as_it_is = bool(seeds_that_differ())
print("as it is, did a seed give two games?", as_it_is)

place = lambda world, item: next(i for i, x in enumerate(world._objects) if x is item)
crafter.engine.World.chunks = property(lambda world: {
    chunk: sorted(items, key=lambda item: place(world, item))
    for chunk, items in world._chunks.items()
})
ordered = bool(seeds_that_differ())
print("with the sets in order, did a seed give two games?", ordered)
if not as_it_is or ordered:
    raise SystemExit("the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
