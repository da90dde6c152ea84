#!/usr/bin/env bash
# CARL's CartPole lists the cart's mass as a context feature, and the mass changes nothing.
# carl-bench 1.1.1, Gymnasium 0.29.1, NumPy 2.4.6; seen on 2026-11-28.
#
# CARL makes benchmarks for generalisation: one names a physical property, and gets environments
# in which it differs. `masscart` is a feature from 0.1 to 10, and is written into each
# observation. So one expects a cart of 10 to be pushed about less than a cart of 0.1.
# Seen: both move alike, bit for bit. CARL writes the new value into Gymnasium's CartPole, where
# total_mass and polemass_length were computed from the old one when it was made, and nothing
# looks at masscart again. `masspole` and `length` do half of their work, for the same reason:
# the equations find the new numbers in one place, and the products of the old ones in others.
# CARL's Pendulum has a feature `gravity` likewise without effect; its gravity is `g`.
# Who trains with it: a policy "generalises" over the cart's mass perfectly, an ablation shows
# that telling it the mass is of no use, and a pole's length is that of no pole. No message.
# What helps: after reset, compute both products anew in env.env.unwrapped, as is done below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 gymnasium==0.29.1 carl-bench==1.1.1
"$folder/venv/bin/python" -W ignore - 2>"$folder/warnings" <<'PY' || { cat "$folder/warnings" >&2; exit 1; }
import numpy as np
from carl.envs import CARLCartPole, CARLPendulum


def play(kind, feature, value, action, repair=False):
    """Eight steps of one action from one seed; where it got to, without the context."""
    env = kind(contexts={0: {**kind.get_default_context(), feature: value}})
    obs, _ = env.reset(seed=1)
    assert np.isclose(obs["context"][feature], value)  # this is what the agent is told
    if repair:
        pole = env.env.unwrapped
        pole.total_mass = pole.masspole + pole.masscart
        pole.polemass_length = pole.masspole * pole.length
    for _ in range(8):
        obs = env.step(action)[0]
    return obs["obs"]


def differ(kind, feature, low, high, action, **options):
    two = [play(kind, feature, value, action, **options) for value in (low, high)]
    return not np.array_equal(*two)


seen = {
    "CartPole, masscart 0.1 or 10": differ(CARLCartPole, "masscart", 0.1, 10.0, 1),
    "CartPole, the same, repaired": differ(CARLCartPole, "masscart", 0.1, 10.0, 1, repair=True),
    "CartPole, force_mag 5 or 20": differ(CARLCartPole, "force_mag", 5.0, 20.0, 1),
    "Pendulum, gravity 1 or 20": differ(CARLPendulum, "gravity", 1.0, 20.0, np.ones(1)),
    "Pendulum, g 1 or 20": differ(CARLPendulum, "g", 1.0, 20.0, np.ones(1)),
}
for name, differs in seen.items():
    print(f"{name}: {'another path' if differs else 'the same path, bit for bit'}")
masses = {m: play(CARLCartPole, "masspole", m, 1)[1] for m in (0.1, 1.0)}
proper = play(CARLCartPole, "masspole", 1.0, 1, repair=True)[1]
print(f"velocity with masspole 0.1: {masses[0.1]:.3f}, 1: {masses[1.0]:.3f}; repaired: {proper:.3f}")
if list(seen.values()) != [False, True, True, False, True] or masses[1.0] == proper:
    raise SystemExit("the behaviour has changed")
PY
