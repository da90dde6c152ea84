#!/usr/bin/env bash
# breakable-bottles-v0 says MultiBinary for the dropped bottles and gives how many lie there: 2, 3.
# mo-gymnasium 1.3.2, Gymnasium 1.4.0, NumPy 2.4.6; seen on 2026-11-28.
#
# The text and the space say one bit for each of three places: whether a bottle lies there. So one
# expects zeros and ones, and 360 observations (the environment's num_observations). Seen: a count.
# A second bottle that falls in the same place gives 2, a third gives 3, till the episode ends.
# Under random play that is about 1 episode in 20, so no checker that looks at the first steps
# sees it. FlattenObservation passes the 2 on, outside its own space too. A table that packs the
# bits into an index takes (2, 0, 0) for (0, 1, 0), and learns there what belongs elsewhere; the
# environment's own get_obs_idx makes it (1, 0, 0), and hides the count.
# The penalty, on the other hand, knows only "none" and "some": the first bottle costs 1, each
# further one nothing. With unbreakable_bottles=True the last one that is picked up gives +1, where
# the reward space ends at 0: who scales by its bounds leaves the range, and who clips to them
# turns a potential that should sum to 0 into a loss. And the agent starts at the destination,
# place 4, not at 0 as the text has it.
# What helps: a Box of counts as one's own space, or np.minimum(bottles, 1), which loses how many
# there still are; and -1 to 1 as the bounds of the third reward.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 gymnasium==1.4.0 mo-gymnasium==1.3.2
"$folder/venv/bin/python" -W ignore - <<'PY'
import gymnasium
import mo_gymnasium
import numpy as np


def play(unbreakable, episodes=200):
    """Random play: episodes with an observation outside, counts and penalties seen, start."""
    env = mo_gymnasium.make("breakable-bottles-v0", unbreakable_bottles=unbreakable)
    bare, random = env.unwrapped, np.random.default_rng(0)
    outside, counts, third, further, starts = 0, set(), set(), set(), set()
    for episode in range(episodes):
        seen, info = env.reset(seed=episode)
        starts.add(seen["location"])
        inside, over = True, False
        while not over:
            before = sum(seen["bottles_dropped"])
            seen, reward, terminated, truncated, info = env.step(int(random.integers(3)))
            over = terminated or truncated
            inside &= env.observation_space.contains(seen)
            counts |= set(seen["bottles_dropped"])
            third.add(int(reward[2]))
            if sum(seen["bottles_dropped"]) > before > 0:
                further.add(int(reward[2]))
        outside += not inside
    return outside, counts, third, further, starts, float(bare.reward_space.high[2])


changed = False
for unbreakable in (False, True):
    outside, counts, third, further, starts, high = play(unbreakable)
    print(f"unbreakable_bottles={unbreakable}: of 200 episodes, {outside} leave the observation space")
    print(f"  counts {sorted(counts)}; third reward {sorted(third)} where the space ends at {high}")
    print(f"  third reward when a further bottle falls: {sorted(further)}; start at {sorted(starts)}")
    changed |= outside == 0 or max(counts) < 2 or further != {0} or starts != {4}
    changed |= third != ({-1, 0, 1} if unbreakable else {-1, 0}) or high != 0

# The same through FlattenObservation, from the first episode in which a 2 turns up.
env = gymnasium.wrappers.FlattenObservation(mo_gymnasium.make("breakable-bottles-v0"))
random, found = np.random.default_rng(0), None
env.reset(seed=0)
while found is None:
    flat, _, terminated, truncated, _ = env.step(int(random.integers(3)))
    if flat.max() > 1:
        found = flat
    elif terminated or truncated:
        env.reset()
inside = env.observation_space.contains(found)
print(f"flattened: {found.tolist()}, inside {env.observation_space}: {inside}")
if changed or inside:
    raise SystemExit("the behaviour has changed")
PY
