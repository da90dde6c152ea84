#!/usr/bin/env bash
# sbx's DQN always builds two hidden layers of net_arch[0] units; the rest of net_arch is ignored.
# sbx-rl 0.28.0, stable-baselines3 2.9.2, Gymnasium 1.3.0, JAX 0.10.2, flax 0.12.8; seen on 2026-11-28.
#
# sbx is Stable-Baselines3 in JAX and takes the same arguments. policy_kwargs={"net_arch": [...]}
# lists the hidden layers there, one number each, and does so in sbx's own PPO too. One expects
# DQN with [64, 128, 256] to have these three layers, and [32] to have one.
# Seen: 64, 64 and 32, 32, without a message. [64, 1] trains to the very same numbers as [64, 999].
# Without net_arch the layers are 256, 256, where Stable-Baselines3's DQN has 64, 64.
# A search over net_arch thus compares the same network with itself, and finds differences that are
# only seeds; a table of sizes, or of sbx against Stable-Baselines3 "with the same arguments", is
# about other networks than it says. A bottleneck such as [256, 8] is not there at all.
# What helps: look at the shapes in model.policy.qf_state.params. Two equal layers are what it can
# build; any other form needs a policy class with a `build` of one's own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile numpy==2.4.6 gymnasium==1.3.0 torch==2.13.0 stable-baselines3==2.9.2 \
    jax==0.10.2 flax==0.12.8 optax==0.2.8 tfp-nightly==0.26.0.dev20261027 sbx-rl==0.28.0
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PY'
import jax
import numpy as np
import sbx
import stable_baselines3


def hidden(params):
    """The hidden layers' sizes, read off the kernels of a flax network."""
    kernels = [p for p in jax.tree_util.tree_leaves(params) if p.ndim == 2]
    return [k.shape[1] for k in kernels[:-1]]


def dqn(arch):
    options = {} if arch is None else {"policy_kwargs": {"net_arch": arch}}
    ours = sbx.DQN("MlpPolicy", "CartPole-v1", buffer_size=500, **options)
    theirs = stable_baselines3.DQN("MlpPolicy", "CartPole-v1", buffer_size=500, **options)
    kernels = [p for p in theirs.q_net.parameters() if p.ndim == 2]
    return hidden(ours.policy.qf_state.params), [len(k) for k in kernels[:-1]]


def trained(arch):
    """All weights after a short training."""
    model = sbx.DQN("MlpPolicy", "CartPole-v1", seed=1, learning_starts=50, policy_kwargs={"net_arch": arch})
    model.learn(150)
    assert model._n_updates > 20
    return np.concatenate([np.ravel(p) for p in jax.tree_util.tree_leaves(model.policy.qf_state.params)])


changed = False
print("net_arch: layers of sbx's DQN, of Stable-Baselines3's")
expected = {
    (64, 128, 256): ([64, 64], [64, 128, 256]),
    (256, 8): ([256, 256], [256, 8]),
    (32,): ([32, 32], [32]),
    None: ([256, 256], [64, 64]),
}
for arch, sizes in expected.items():
    seen = dqn(arch and list(arch))
    print(f"  {arch and list(arch)}: {seen[0]}, {seen[1]}")
    changed |= seen != sizes
ppo = sbx.PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [64, 128, 256]})
sizes = hidden(ppo.policy.actor_state.params)
print(f"sbx's PPO with [64, 128, 256]: {sizes}")
one, many = trained([64, 1]), trained([64, 999])
same = np.array_equal(one, many)
print(f"[64, 1] and [64, 999] train to the same {len(one)} weights:", same)
if changed or sizes != [64, 128, 256] or not same:
    raise SystemExit("the behaviour has changed")
PY
