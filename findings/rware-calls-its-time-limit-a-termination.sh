#!/usr/bin/env bash
# rware (the robots' warehouse) reports its time limit as `terminated`; `truncated` is never True.
# rware 2.0.0, Gymnasium 1.4.0, NumPy 2.4.6; seen on 2026-11-28.
#
# Gymnasium splits the end of an episode in two: `terminated` where the task itself ends, after
# which nothing more can be earned, and `truncated` for a limit outside it, such as one of time.
# A warehouse never ends by itself; its 500 steps are such a limit, and rware 2 has moved to
# Gymnasium's five results. So one expects (False, True) after 500 steps.
# Seen: (True, False). The same with max_inactivity_steps, and whatever the robots have done.
# Observations do not show the time that is left. A learner that bootstraps at truncations and
# not at terminations is thus told that every state may be worth nothing from the next step on,
# and its values, and with them its advantages, are wrong by what a cut-off shift would still
# have earned. No message says so, and a learner that does treat the two alike sees no difference.
# What helps: max_steps=None, and Gymnasium's own limit: gymnasium.make(id, max_steps=None,
# max_episode_steps=500), which answers (False, True).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 gymnasium==1.4.0 rware==2.0.0
"$folder/venv/bin/python" -W ignore - <<'PY'
import gymnasium
import rware


def end(**options):
    """Two robots that stand still: when the episode ends, and the two flags then."""
    env = gymnasium.make("rware-tiny-2ag-v2", disable_env_checker=True, **options)
    env.reset(seed=1)
    for step in range(1, 1000):
        *_, terminated, truncated, _ = env.step((0, 0))
        if terminated or truncated:
            return step, bool(terminated), bool(truncated)


print("ends after (steps, terminated, truncated)")
tries = {
    "as it is": (end(), (500, True, False)),
    "max_inactivity_steps=30": (end(max_inactivity_steps=30), (30, True, False)),
    "Gymnasium's limit instead": (
        end(max_steps=None, max_episode_steps=500),
        (500, False, True),
    ),
}
for name, (seen, _) in tries.items():
    print(f"  {name}: {seen}")
if any(seen != expected for seen, expected in tries.values()):
    raise SystemExit("the behaviour has changed")
PY
