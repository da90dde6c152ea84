# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26,<2.5", "torch>=2.13,<=2.13.0"]
# ///
# Thrust 1.0, MIT licence, copyright 2026 the Thrust authors
"""Thrust: PPO in one file, to be read from top to bottom, copied from, and run.

PPO, Proximal Policy Optimization, trains a neural network to act. It lets the network play,
works out which of its actions led to more reward than expected, and makes those a little more
probable. Only a little at a time, because what was learned from one way of playing stops being
true once the way of playing has changed.

This file is the whole of it: a game (balancing a pole on a cart, many of them at once), worker
processes that play games in parallel, the networks, the arithmetic that says which actions
deserve the credit, the loss, the training loop and a command line. It needs NumPy and PyTorch,
nothing else; with Gymnasium it trains on other games too, and with torchrun in several
processes. It is not a framework: no recurrent networks, no replay memory, no self-play, no
hyperparameter sweeps, no callbacks, no plugins.

    python thrust.py           train; within seconds the pole stays up for all of its 500 steps
    python thrust.py --help    every knob and its default

PPO in six steps. The training loop, at the end of part 7, carries the same numbers.

    1. Collect.    Let the policy play T steps in N environments at once; keep all of it.
    2. Value.      Ask a second network how much reward it expected from each state onwards.
    3. Advantage.  Work out, for every action, how much better it went than expected.
    4. Improve.    Go over the data a few times, in small shuffled batches: make actions that
                   went better than expected more probable and the others less, but stop pushing
                   where a probability has moved far enough; and correct the second network.
    5. Report.     Log what happened; every few rounds, save a checkpoint. The data is not used
                   again: it was played by a policy that no longer exists.
    6. Repeat      from 1 until the budget of steps is spent; then evaluate the final policy.

The parts. The code of each uses only what stands above it (but for calls into part 9), and
under its heading each says what it needs where it is copied to: imports, and other parts
together with theirs.

    1. Config         the knobs               5. RolloutBuffer  storage, and advantages (GAE)
    2. CartPole       the game                6. PPO            the loss and the update
    3. EnvPool        games in processes      7. Training       the loop, checkpoints, resume
    4. ActorCritic    the two networks        8. Command line   flags, exit codes
                                              9. Page           to look at what was learned

Words. An *environment* is a game. What the player sees of its *state* is an *observation*, or
obs (of CartPole it sees everything); what it does is an *action*, and what it is paid for one
step a *reward*. Together they are one *transition*. An *episode* is one game from start to end,
a *rollout* some number of steps that need not end anywhere. The *policy*, written
π(action|state), gives each action a probability, and the player draws from those. The *return*
is the sum of the rewards of an episode; the *value* of a state is the sum of rewards that the
policy can expect from there, later ones counting less. An *epoch* is one pass over a rollout,
in pieces called *minibatches*.

The main letters, the same in every part:

    N  environments played side by side        γ  discount: a reward k steps away counts γᵏ
    T  steps in one rollout of each of them    λ  how much advantages rely on rewards that were
    B  = T·N, the transitions in a rollout        seen, and not on expected ones (part 5)
    M  transitions in one minibatch            ε  how far a probability may move before nothing
    O  numbers in one observation                 pushes it further (part 6)
    A  actions to choose from                  δ  one step's surprise (part 5)
    V  estimated value                         Â  estimated advantage

Shapes stand at the ends of lines, as in `# (T, N, O)`. Arrays that remember time are (T, N);
those that an update trains on are flat, (B,) or (M,), because by then order no longer matters.

Sources: PPO, Schulman et al. 2017, arXiv:1707.06347. GAE, Schulman et al. 2015,
arXiv:1506.02438. What matters in practice, Andrychowicz et al. 2020, arXiv:2006.05990. Time
limits, Pardo et al. 2018, arXiv:1712.00378. Adam, Kingma and Ba 2014, arXiv:1412.6980.
Orthogonal weights, Saxe et al. 2013, arXiv:1312.6120. The pole, Barto, Sutton and Anderson
1983, "Neuronlike adaptive elements that can solve difficult learning control problems".
"""

import argparse
import base64
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import multiprocessing as mp
import os
import pathlib
import pkgutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
import zipfile
from typing import Any, ClassVar, Iterator, NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn
from torch.optim.adam import adam

# ==============================================================================================
# 1. Config
# Needs: import dataclasses; from typing import Any
#
# Every number that a user may want to turn stands here once: its default, and the text that
# --help prints. The command line (part 8) is generated from this class, and so is the
# config.json that a run leaves behind.
#
# The defaults solve CartPole in seconds. They were found by trial, on seeds of their own; what
# follows is the median of twelve more, in environment steps until the pole stayed up:
#
#   N = 64, T = 32, M = 512   At these sizes a call into torch costs as much as its arithmetic,
#                             so large batches are cheap. With twice the environments, or half
#                             the rollout, some seeds failed, or more was lost than saved.
#   3 epochs                  94 thousand steps, in 552 gradient steps. A fourth epoch needed
#                             fewer of the first, 84 thousand, but more of the second, 656.
#   λ = 0.95                  With 0.9, 115 thousand.
#   learning rate 6e-3        20 times the common one: CartPole can be learned in large changes
#                             of the weights, as long as the rate then falls towards zero for
#                             careful ones. With 5e-3 or 7e-3, 100 thousand.
# ==============================================================================================


def knob(default: Any, help: str, kind: type | None = None) -> Any:
    """A field with a help text; `kind` is what its flag is converted to, if not the default's
    type (an optional float, or one element of a tuple)."""
    metadata = {"help": help, "kind": kind or type(default)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Immutable; `dataclasses.replace` makes a changed copy. Raises
    ValueError with one sentence that names the field, the value and the rule."""

    env: str = knob("CartPole", "CartPole, any id that Gymnasium knows, or module:callable")
    seed: int = knob(0, "the number that every random draw of the run is derived from")
    num_envs: int = knob(64, "environments played side by side (N); more: steadier gradients")
    num_steps: int = knob(32, "steps of each per rollout (T); few: shortsighted advantages")
    total_steps: int = knob(200_000, "steps to train for, in all environments together")
    minibatch_size: int = knob(512, "transitions per gradient step (M); small: noisy gradients")
    epochs: int = knob(3, "passes over each rollout; many: its data no longer fits the policy")
    learning_rate: float = knob(6e-3, "Adam's step size; too large: what was learned is lost")
    anneal: bool = knob(True, "lower the learning rate linearly, update by update, towards 0")
    gamma: float = knob(0.98, "discount γ; about the next 1/(1-γ) steps count")
    gae_lambda: float = knob(
        0.95, "λ; 0: advantages rely on expected rewards, 1: on those seen"
    )
    clip: float = knob(0.2, "ε: a probability is pushed no further than this, as a fraction")
    ent_coef: float = knob(0.0, "reward for being undecided; raise it to explore for longer")
    vf_coef: float = knob(0.5, "weight of the value network's mean squared error")
    max_grad_norm: float = knob(0.5, "gradients longer than this are scaled down to it")
    target_kl: float | None = knob(
        None, "end an update once the policy has moved this far (KL, part 6)", float
    )
    norm_obs: bool = knob(False, "shift and scale observations by mean and standard deviation")
    norm_reward: bool = knob(False, "scale rewards by the standard deviation of returns")
    hidden: tuple[int, ...] = knob((64, 64), "widths of each network's hidden layers", int)
    workers: int = knob(0, "processes that step the environments; 0: this one does (part 3)")
    device: str = knob("cpu", "where the networks live and learn: cpu, cuda or mps")
    threads: int = knob(1, "torch's threads; networks this small are slower with more")
    checkpoint_every: int = knob(10, "updates from one checkpoint to the next")
    eval_episodes: int = knob(100, "episodes of the evaluation after training")

    @property
    def batch_size(self) -> int:
        """B: transitions in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Rollouts that fit into total_steps; what is left over is not played."""
        return self.total_steps // self.batch_size

    def __post_init__(self) -> None:
        def require(names: str, possible: Any, rule: str) -> None:
            for name in names.split():
                value = getattr(self, name)
                try:
                    fits = possible(value)
                except TypeError:  # not even comparable
                    fits = False
                if not fits:
                    raise ValueError(f"{name} = {value!r} is not allowed: it must be {rule}")

        def whole(value: Any) -> bool:
            return type(value) is int and value >= 1

        for name, value in vars(self).items():  # NumPy's numbers become Python's, to be saved
            plain = value.tolist() if hasattr(value, "tolist") else value
            object.__setattr__(self, name, tuple(plain) if isinstance(plain, list) else plain)
        # Each rule is put so that NaN fails it: every comparison with NaN is false.
        sizes = "num_envs num_steps total_steps minibatch_size epochs threads checkpoint_every"
        require(sizes + " eval_episodes", whole, "a whole number, at least 1")
        require(
            "seed workers", lambda v: type(v) is int and v >= 0, "a whole number, 0 or more"
        )
        require("env device", lambda v: isinstance(v, str) and v, "a name")
        require("anneal norm_obs norm_reward", lambda v: type(v) is bool, "True or False")
        require("hidden", lambda v: all(map(whole, v)), "whole numbers, at least 1 each")
        # Sizes that are surely typing errors end here, and not in an allocation deep inside.
        vast = "num_envs num_steps eval_episodes"
        require(vast, lambda v: v <= 10**6, "at most a million")
        require("hidden", lambda v: max(v, default=0) <= 10**5, "at most 100,000 each")
        require("threads", lambda v: v <= 1024, "at most 1,024")
        require("gamma gae_lambda", lambda v: 0 <= v <= 1, "from 0 to 1")
        require("clip", lambda v: 0 < v < 1, "above 0 and below 1")
        huge = 1e308  # and not infinity: 10**400 is below that, but no float holds it
        require("ent_coef vf_coef", lambda v: 0 <= v < huge, "finite and 0 or more")
        require("learning_rate max_grad_norm", lambda v: 0 < v < huge, "finite and above 0")
        rule = "finite and above 0, or not given at all"
        require("target_kl", lambda v: v is None or 0 < v < huge, rule)
        require("workers", lambda v: v <= self.num_envs, f"at most num_envs, {self.num_envs}")
        rollout = f"num_envs * num_steps = {self.batch_size}"
        require("minibatch_size", lambda v: v <= self.batch_size, f"at most {rollout}")
        require("total_steps", lambda v: v >= self.batch_size, f"at least {rollout}")


# ==============================================================================================
# 2. CartPole
# Needs: import math; import numpy as np; from typing import Any, ClassVar, NamedTuple
#
# A pole stands on a cart, hinged at its foot. At every step, 50 times a second, the player
# pushes the cart with a fixed force to the left (action 0) or to the right (action 1), and is
# paid 1. The game is lost when the pole leans by more than 12 degrees or the cart leaves the
# track.
#
# Why N poles at once, and not one? A NumPy call costs about half a microsecond before it
# touches a number. One pole at a time pays that forty times per step; N poles in one array pay
# it forty times for all of them. Each quantity is one row of N numbers ("structure of arrays"),
# so that every call runs over contiguous memory; and `out=` writes into memory that exists.
#
# An episode can end in two ways, and the difference matters later (part 5):
#
#   terminated   the game itself is over: the pole fell. No reward can follow from here.
#   truncated    the game was cut off: here, after 500 steps. The pole still stands, and more
#                reward would have followed; it is just not going to be played.
#
# Both flags belong to the step that ended the episode, not to the one after. A game that ended
# begins anew within that same step ("auto-reset"; Gymnasium calls this mode SAME_STEP), so that
# the batch never has holes. `obs` is then the first observation of the next episode, and the
# last one of the episode that ended is in `info["final_obs"]`, in the same row.
#
# The numbers are those of CartPole-v1 in Gymnasium, the library in which most environments are
# published, bit for bit: same seeds, same start states, same observations. So the order of
# operations below is Gymnasium's: a tidier formula would round differently, and a balanced pole
# soon amplifies a last bit into another game.
#
# The methods, too, are those of Gymnasium's vector environments. Any environment that has them
# can replace CartPole in the pool (part 3), which has them itself, and in training. `state` and
# `set_state` are Thrust's own: with them, a run can be resumed exactly.
# ==============================================================================================

StepResult = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class Box(NamedTuple):
    """Arrays of real numbers from `low` to `high`, with the attributes of Gymnasium's Box."""

    low: np.ndarray
    high: np.ndarray
    shape: tuple[int, ...]
    dtype: Any = np.dtype(np.float32)


class Discrete(NamedTuple):
    """Whole numbers start ... start + n - 1, with the attributes of Gymnasium's Discrete."""

    n: int
    start: int = 0
    shape: tuple[int, ...] = ()
    dtype: Any = np.dtype(np.int64)


class CartPole:
    """N independent CartPoles, with the interface of a Gymnasium vector environment.

    Observations are float32 (N, 4): cart position x (m), cart velocity ẋ (m/s), pole angle θ
    (rad, clockwise), pole angular velocity θ̇ (rad/s). Actions are integers (N,), 0 or 1.
    Rewards are float64 (N,), always 1. What `reset` and `step` return are views into this
    object, valid until its next call: copy what you keep.

    Bit for bit Gymnasium's SyncVectorEnv of CartPole-v1 in SAME_STEP mode. The equations are
    Barto, Sutton and Anderson's, frictionless, as corrected by Florian 2007, "Correct equations
    for the dynamics of the cart-pole system". Raises ValueError for sizes below 1.
    """

    # Arrays without axes: of a Python number, NumPy would have to make one at every call, which
    # takes as long as to multiply 64 numbers by it.
    GRAVITY = np.array(9.8)  # m/s²
    POLE_MASS = np.array(0.1)  # kg
    TOTAL_MASS = np.array(0.1 + 1.0)  # kg, with the cart
    FOUR_THIRDS = np.array(4.0 / 3.0)
    HALF_LENGTH = np.array(0.5)  # m, from the hinge to the pole's centre of mass
    POLE_MOMENT = np.array(0.1 * 0.5)  # kg·m, mass times half length
    FORCES = np.array([-10.0, 10.0])  # N, of action 0 and action 1
    TAU = np.array(0.02)  # s from one step to the next
    X_LIMIT = np.array(2.4)  # m to either side
    ANGLE_LIMIT = np.array(12 * 2 * math.pi / 360)  # rad to either side

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": "SameStep"}

    def __init__(self, num_envs: int, max_episode_steps: int = 500) -> None:
        if num_envs < 1 or max_episode_steps < 1:
            sizes = f"CartPole({num_envs}, {max_episode_steps})"
            raise ValueError(f"{sizes}: both must be at least 1")
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        bound = [2 * self.X_LIMIT, math.inf, 2 * self.ANGLE_LIMIT, math.inf]
        high = np.array(bound, np.float32)
        self.single_observation_space = Box(-high, high, high.shape)
        self.single_action_space = Discrete(2)

        # _state[0] holds positions, _state[1] velocities; in each, row 0 is the cart's (metres)
        # and row 1 the pole's (radians). An observation is x, ẋ, θ, θ̇: with the axes swapped.
        self._state = np.zeros((2, 2, num_envs))
        self._by_env = self._state.reshape(4, num_envs).T  # (N, 4): x, θ, ẋ, θ̇
        self._as_seen = self._state.transpose(2, 1, 0)  # (N, 2, 2): x, ẋ; θ, θ̇
        self._obs, self._final_obs = np.zeros((2, 4, num_envs), np.float32).swapaxes(1, 2)
        self._acceleration, self._pair, rest = np.zeros((3, 2, num_envs))
        # Names for `step` to use: taking a row of an array costs as much as adding two of them.
        rows = self._state[0, 1], self._state[1, 1], *self._acceleration, *self._pair, *rest
        self._names = *self._state, *rows
        self._reward = np.ones(num_envs)
        self._terminated, self._truncated, self._ended = np.zeros((3, num_envs), bool)
        self._clock = 0  # steps since this object was made
        self._deadline = np.zeros(num_envs, np.int64)  # what the clock shows when time is up

        # Each environment draws start states from a generator of its own, a block at a time:
        # one draw of (256, 4) is the same stream as 256 draws of 4, at a hundredth of the cost.
        # The block shrinks as N grows, so that `_starts` stays within 64 MB up to N = 100,000.
        self._block = np.array(min(256, max(16, 2**20 // num_envs)))
        self._starts = np.zeros((num_envs * self._block, 4))
        self._next = np.zeros(num_envs, np.int64)  # the row that the next episode starts from
        self._seeds, self._blocks = np.zeros((2, num_envs), np.int64)  # blocks used up
        self._generators: list[np.random.Generator] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode everywhere, and returns (obs, {}).

        With a seed, environment i draws its start states from a generator seeded seed + i;
        without, the generators go on where they were (in a fresh object, the operating system
        gives a seed). Raises ValueError for options, of which there are none, and for a seed
        that is negative or too large for an int64.
        """
        if options:
            raise ValueError(f"CartPole has no reset options, got {options}")
        if seed is None and not self._generators:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        if seed is not None:
            if not 0 <= seed <= 2**63 - self.num_envs:
                raise ValueError(f"seed must be from 0 to 2**63 - num_envs, got {seed}")
            self._seeds[:] = np.arange(self.num_envs) + seed
            self._seed_generators(np.zeros(self.num_envs, np.int64))
        self._begin_episodes(np.arange(self.num_envs))
        return self._observe(self._obs), {}

    def step(self, actions: np.ndarray) -> StepResult:
        """Pushes every cart once, and returns (obs, reward, terminated, truncated, info).

        `info` is empty, or, where episodes ended, has "final_obs": float32 (N, 4), to be read
        in the rows where terminated | truncated. Raises ValueError unless actions are integers
        0 or 1 of shape (N,), and RuntimeError before the first reset.
        """
        if not self._generators:
            raise RuntimeError("call reset() before the first step()")
        actions = np.asarray(actions)
        right_kind = actions.shape == (self.num_envs,) and actions.dtype.kind in "iu"
        # The bitwise or of all actions is 0 or 1 if and only if each of them is.
        if not right_kind or np.bitwise_or.reduce(actions) not in (0, 1):
            got = f"{actions.dtype} {actions.shape}: {actions}"
            raise ValueError(f"actions must be ({self.num_envs},) integers 0 or 1, got {got}")

        position, velocity, *rows = self._names  # (2, N) each, the cart's and the pole's
        angle, angular_velocity, x_acceleration, angle_acceleration, sin, cos, temp, work = rows
        np.sin(angle, out=sin)
        np.cos(angle, out=cos)
        # F = -10 N for action 0, +10 N for action 1. (With the other modes, NumPy would write
        # into a copy first, in case an action is not allowed.)
        self.FORCES.take(actions, out=work, mode="clip")
        # temp = (F + m·l·θ̇²·sin θ) / m_total, with the pole's mass m and half its length l
        np.square(angular_velocity, out=temp)
        temp *= self.POLE_MOMENT
        temp *= sin
        temp += work
        temp /= self.TOTAL_MASS
        # θ̈ = (g·sin θ - cos θ·temp) / (l·(4/3 - m·cos²θ / m_total))
        sin *= self.GRAVITY
        np.multiply(cos, temp, out=work)
        np.subtract(sin, work, out=angle_acceleration)
        np.square(cos, out=work)
        work *= self.POLE_MASS
        work /= self.TOTAL_MASS
        np.subtract(self.FOUR_THIRDS, work, out=work)
        work *= self.HALF_LENGTH
        angle_acceleration /= work
        # ẍ = temp - m·l·θ̈·cos θ / m_total
        np.multiply(angle_acceleration, self.POLE_MOMENT, out=work)
        work *= cos
        work /= self.TOTAL_MASS
        np.subtract(temp, work, out=x_acceleration)
        # Euler's method: position += τ·velocity, then velocity += τ·acceleration
        pair = self._pair  # the memory of sin and cos, which are not needed any more
        position += np.multiply(velocity, self.TAU, out=pair)
        velocity += np.multiply(self._acceleration, self.TAU, out=pair)
        # terminated = |x| > 2.4 m or |θ| > 12°; truncated = 500 steps
        np.abs(position, out=pair)
        np.greater(pair[0], self.X_LIMIT, out=self._terminated)
        self._terminated |= np.greater(pair[1], self.ANGLE_LIMIT, out=self._ended)
        self._clock += 1
        np.equal(self._deadline, self._clock, out=self._truncated)
        np.logical_or(self._terminated, self._truncated, out=self._ended)

        info = {}
        ended = self._ended.nonzero()[0]
        if ended.size:
            info["final_obs"] = self._observe(self._final_obs)
            self._begin_episodes(ended)
        self._reward.fill(1.0)  # every time: the caller may have written into its view
        flags = self._terminated, self._truncated
        return self._observe(self._obs), self._reward, *flags, info

    def close(self) -> None:
        """Does nothing: there is nothing to release."""

    def state(self) -> dict[str, np.ndarray]:
        """Copies of all that the future depends on, N rows each. Of a generator, its seed and
        the number of episodes begun will do: PCG64 can jump to any place of its stream."""
        return {
            "state": self._as_seen.reshape(self.num_envs, 4),  # a copy: views cannot do this
            "steps": self._clock + self.max_episode_steps - self._deadline,
            "seed": self._seeds.copy(),
            "episodes": self._blocks * self._block + self._next % self._block,
        }

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Goes on from what `state` returned, here or in another CartPole of as many poles."""
        self._as_seen[...] = state["state"].reshape(self.num_envs, 2, 2)
        self._deadline[:] = self._clock + self.max_episode_steps - state["steps"]
        self._seeds[:] = state["seed"]
        self._seed_generators(state["episodes"])

    def _observe(self, out: np.ndarray) -> np.ndarray:
        """Writes the observations into `out` (N, 4), and returns it."""
        np.copyto(out.reshape(self.num_envs, 2, 2), self._as_seen)
        return out

    def _seed_generators(self, episodes: np.ndarray) -> None:
        """Gives each environment its generator, with `episodes` (N,) start states drawn."""
        self._blocks[:], inside = np.divmod(episodes, self._block)
        used = self._blocks * self._block * 4  # numbers
        streams = zip(map(np.random.PCG64, self._seeds.tolist()), used.tolist())
        self._generators = [np.random.Generator(pcg.advance(k)) for pcg, k in streams]
        for i in range(self.num_envs):
            self._draw_starts(i)
        self._next += inside

    def _draw_starts(self, i: int) -> None:
        """Draws environment i its next block of start states: ±0.05 in every quantity."""
        first = i * self._block
        starts = self._generators[i].uniform(-0.05, 0.05, (self._block, 4))
        self._starts[first : first + self._block] = starts[:, [0, 2, 1, 3]]  # as in _by_env
        self._next[i] = first

    def _begin_episodes(self, rows: np.ndarray) -> None:
        """Puts the environments `rows` (k,) into their next start states."""
        slots = self._next[rows]
        self._by_env[rows] = self._starts.take(slots, axis=0)  # (k, 4)
        self._deadline[rows] = self._clock + self.max_episode_steps
        slots += 1
        self._next[rows] = slots
        for i in rows[slots % self._block == 0]:
            self._blocks[i] += 1
            self._draw_starts(i)


# ==============================================================================================
# 3. EnvPool
# Needs: import multiprocessing as mp, os, signal, threading, time, traceback, weakref; parts 2
#
# An environment written in Python uses one core, however many there are. The pool splits N
# environments over W worker processes, each of which steps a slice of its own:
#
#             the learner's process                      worker 0          worker 1
#       send: writes actions   ──── go ──────────────▶   steps rows        steps rows
#       recv: waits            ◀─── done ─────────────   0 ... N/2-1       N/2 ... N-1
#                     │                                     │                 │
#       ┌─────────────▼─────────────────────────────────────▼─────────────────▼────────┐
#       │ shared memory:  action | obs | final_obs | reward | terminated | truncated   │
#       └──────────────────────────────────────────────────────────────────────────────┘
#
# All of them see the same memory, so no observation or action is pickled or sent. Every array
# has one writer at a time: between `done` and `go` the learner, between `go` and `done` a
# worker, in its rows. `go` and `done` are semaphores, a pair per worker. They also order
# memory: what was written before a release is seen after the acquire that it allows.
#
# A process that waits polls for a short while, giving way to others in between, and then
# sleeps. Being woken takes as long as stepping a hundred CartPoles, so a quick answer should
# find nobody asleep; but a worker that waits for the learner to compute must not burn the core
# that the learner computes on, so a long wait should be slept through.
#
# The learner never waits blindly: ten times a second it checks whether the worker is alive, and
# whether its time is up. A worker has a thread that waits for the learner's process to end, and
# then ends the worker, even if that is stuck inside an environment's Python code. A terminal
# sends Ctrl-C to all of them; only the learner listens.
#
# Observations, rewards and flags are checked as they are written, with or without workers: an
# environment that does not do as part 2 says is named before the networks learn from it.
#
# A pool wins where environments are slow. It loses where stepping the whole batch takes less
# time than handing it over and back, or no core is free, or the run is short: starting the
# first worker takes as long as importing torch, two seconds or so, and each further one 20 ms.
# Seeds belong to environments, not to workers, so results are the same, bit for bit, with any
# number of workers.
# ==============================================================================================

STEP, RESET, GET_STATE, SET_STATE, CLOSE = range(5)
DOING = ["stepping", "resetting", "giving its state", "taking a state"]
UNGUARDED = 99  # exit code of a worker that would begin a training of its own (part 8)
POLLING = 200e-6  # seconds of it, before sleeping
GIVE_WAY = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has only the latter


class WorkerError(RuntimeError):
    """A worker raised, died or did not answer in time, and the pool has been closed.

    `worker` is its number; `exitcode` its exit code (negative: the signal that killed it), None
    if it had not exited.
    """

    def __init__(self, message: str, worker: int = -1, exitcode: int | None = None) -> None:
        super().__init__(message)
        self.worker, self.exitcode = worker, exitcode


def _spaces(env: Any) -> dict[str, str]:
    """Both spaces in words, by which those of two workers can be compared."""
    parts, words = ["shape", "dtype", "n", "start", "nvec", "low", "high"], {}
    for name in ("single_observation_space", "single_action_space"):
        space = getattr(env, name)
        has = [f"{part} {getattr(space, part)}" for part in parts if hasattr(space, part)]
        words[name] = " ".join([type(space).__name__, *has])
    return words


def _build(make_env: Any, num_envs: int, spaces: dict[str, str] | None = None) -> Any:
    """make_env(num_envs), or ValueError if it is not as part 2 asks for, with these spaces."""
    env = make_env(num_envs)
    mode = getattr(env, "metadata", {}).get("autoreset_mode")
    if getattr(mode, "value", mode) != "SameStep":  # Gymnasium's enum, or plain text
        raise ValueError(
            f"{type(env).__name__} does not begin a new episode in the step that ends one (its "
            f"autoreset_mode is {mode}): build it with Gymnasium's SyncVectorEnv(..., "
            "autoreset_mode=AutoresetMode.SAME_STEP)"
        )
    if env.num_envs != num_envs:
        raise ValueError(f"make_env({num_envs}) made {env.num_envs} environments")
    for name, is_ in _spaces(env).items():
        if spaces and is_ != spaces[name]:
            raise ValueError(f"{name} must be as elsewhere, {spaces[name]}, and is {is_}")
    return env


def _layout(env: Any, num_envs: int) -> dict[str, Any]:
    """{name: (shape, dtype)} of the arrays that learner and workers share, all with N rows."""
    obs, action = env.single_observation_space, env.single_action_space
    for space in (obs, action):
        if space.shape is None:  # Gymnasium's Tuple and Dict
            raise ValueError(f"{space} is not an array: wrap the environment so that it is one")
    rows = {
        "command": ((), np.uint8),
        "seed": ((), np.int64),  # for reset; -1 if there is none
        "action": (action.shape, action.dtype),
        "obs": (obs.shape, obs.dtype),
        "final_obs": (obs.shape, obs.dtype),
        "reward": ((), np.float64),
        "terminated": ((), np.bool_),
        "truncated": ((), np.bool_),
    }
    if _has_state(env):
        env.reset(seed=0)  # so that there is a state, whose arrays can be measured
        for name, array in env.state().items():
            rows["state:" + name] = (array.shape[1:], array.dtype)
    return {k: ((num_envs, *shape), np.dtype(kind)) for k, (shape, kind) in rows.items()}


def _require_importable(make_env: Any) -> None:
    """TypeError if a process that is not forked from this one could not import make_env. Ends
    this process if it is a worker itself, whose import of an unguarded program got this far."""
    import __main__ as program

    process = mp.current_process()
    if getattr(process, "_inheriting", False) and process.name.startswith("worker"):
        os._exit(UNGUARDED)  # a worker that is still importing; the learner says what is wrong
    file = getattr(program, "__file__", None)
    try:
        # Without a file, what is in __main__ cannot be imported. From a file that is not there,
        # such as "<stdin>", not even the rest can, because workers begin by importing it.
        pickled = bytes(mp.reduction.ForkingPickler.dumps(make_env))
        lost = b"__main__" in pickled if file is None else not os.path.exists(file)
        if lost and program.__spec__ is None:
            raise ValueError("what was typed in or came from standard input: save it as a file")
    except Exception as error:
        raise TypeError(
            "workers cannot import make_env: it must be a function or class at the top "
            f"level of a module, not a lambda or defined inside a function ({error})"
        ) from None


def _has_state(env: Any) -> bool:
    return callable(getattr(env, "state", None)) and callable(getattr(env, "set_state", None))


def _arrays_in(memory: dict[str, Any], layout: dict[str, Any]) -> dict[str, np.ndarray]:
    """The memory, a block of bytes for each name, as the arrays of `layout`."""
    return {k: np.frombuffer(memory[k], dtype).reshape(s) for k, (s, dtype) in layout.items()}


def _state_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    start = "state:"
    return {k.removeprefix(start): a.copy() for k, a in arrays.items() if k.startswith(start)}


def _put(rows: dict[str, np.ndarray], name: str, value: Any, where: Any = None) -> None:
    """Writes what an environment returned into its rows. ValueError for what would otherwise be
    broadcast, cut off, or not finite (in the rows `where` it matters), and spoil the networks
    unseen."""
    array, target = np.asarray(value), rows[name]
    # Gymnasium passes final_obs on as the environment made it, which may be in float64.
    kept: Any = "safe" if name == "obs" else "same_kind"
    fits = array.dtype == target.dtype or np.can_cast(array.dtype, target.dtype, kept)
    if array.shape != target.shape or not fits:
        expected, got = f"{target.dtype} {target.shape}", f"{array.dtype} {array.shape}"
        raise ValueError(f"{name} must be {expected}, and the environment's is {got}")
    target[...] = array
    if target.dtype.kind == "f" and np.count_nonzero(np.isfinite(target)) != target.size:
        finite = np.isfinite(target).reshape(len(target), -1).all(1)
        bad = ~finite if where is None else where & ~finite
        if bad.any():
            i = bad.argmax()  # the first
            raise ValueError(f"{name} must be finite, and in row {i} it is {target[i]}")


def _obey(env: Any, rows: dict[str, np.ndarray]) -> int:
    """Does to the environments whose rows these are what their command says; returns it."""
    command = int(rows["command"][0])
    if command == STEP:
        obs, reward, terminated, truncated, info = env.step(rows["action"])
        _put(rows, "obs", obs)
        _put(rows, "reward", reward)
        _put(rows, "terminated", terminated)
        _put(rows, "truncated", truncated)
        if np.count_nonzero(terminated) or np.count_nonzero(truncated):
            if "final_obs" not in info:
                raise ValueError("info must have final_obs where episodes end, and has none")
            final, ended = np.asarray(info["final_obs"]), np.logical_or(terminated, truncated)
            if final.dtype == object:  # Gymnasium's, with arrays only where an episode ended
                last = np.stack(final[ended])
                final = np.zeros((len(final), *last.shape[1:]), last.dtype)
                final[ended] = last
            _put(rows, "final_obs", final, ended)
    elif command == RESET:
        seed = int(rows["seed"][0])  # the first environment's; the others' follow from it
        _put(rows, "obs", env.reset(seed=None if seed < 0 else seed)[0])
    elif command == GET_STATE:
        for name, value in env.state().items():
            rows["state:" + name][:] = value
    elif command == SET_STATE:
        env.set_state(_state_of(rows))
    else:
        env.close()
    return command


def _acquire(semaphore: Any, timeout: float | None) -> bool:
    """Acquires `semaphore` within `timeout` seconds (None: for ever); False if it could not."""
    until = time.perf_counter() + POLLING
    while not semaphore.acquire(False):
        if time.perf_counter() > until:
            return bool(semaphore.acquire(True, timeout))
        GIVE_WAY()
    return True


def in_a_line(error: BaseException) -> str:
    """What was raised and where, as in "KeyError: 'door' (game.py, line 12)"."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    lines = traceback.format_exception_only(error)
    # Those of a SyntaxError begin with its place, indented.
    what = next(line for line in lines if line[0] != " ").partition("\n")[0]
    return f"{what} ({os.path.basename(place.filename)}, line {place.lineno})"


def _worker(recipe: Any, slice_: Any, shared: Any, report: Any, go: Any, done: Any) -> None:
    """What a worker process runs: it builds its environments, and obeys until told to close.
    `recipe` is what _build takes, and `shared` what _arrays_in does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's to handle,
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and so is what it does at SIGTERM
    threading.Thread(target=_follow_learner, daemon=True).start()
    try:
        rows = {name: array[slice_] for name, array in _arrays_in(*shared).items()}
        env = _build(*recipe)
        command = None
        while command != CLOSE:
            done.release()  # at first: built; later: done with the last command
            _acquire(go, None)
            command = _obey(env, rows)
    except BaseException as error:
        text = f"{in_a_line(error)}\n{traceback.format_exc(limit=-9)}"
        report.value = text.encode(errors="replace")[: len(report) - 1]
        done.release()
        raise SystemExit(1) from None


def _begin(ready: list[Any], begun: list[Any]) -> None:
    """Starts the workers that are `ready`, and lists them in `begun`. Signals wait meanwhile,
    as nobody could end a process that is half started; and Ctrl-C is blocked in the new ones
    from birth, so that it prints no traceback of what they import. (Windows cannot block it.)
    """
    waiting: list[int] = []
    mask = getattr(signal, "pthread_sigmask", None)
    hears = threading.current_thread() is threading.main_thread()  # no other gets signals
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if hears and signal.getsignal(n)]
    handlers = {n: signal.signal(n, lambda n, _: waiting.append(n)) for n in numbers}
    before = mask(signal.SIG_BLOCK, {signal.SIGINT}) if mask else None
    try:
        for worker in ready:
            worker[0].start()
            begun.append(worker)
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for first in waiting[:1]:  # also if it is why a start failed: SIGTERM ends a forkserver
            signal.raise_signal(first)


def _follow_learner() -> None:
    learner = mp.parent_process()
    assert learner is not None
    learner.join()
    os._exit(1)


def _end(workers: list[Any], command: np.ndarray, grace: float, owner: int) -> None:
    """Tells the workers to close, and kills those that have not ended in `grace` seconds."""
    if os.getpid() != owner:  # a process forked from the learner has a copy of the pool
        return
    try:
        command[:] = CLOSE
        for _, go, _, _ in workers:
            go.release()
        deadline = time.monotonic() + grace
        for process, _, _, _ in workers:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:  # also after Ctrl-C
        for process, _, _, _ in workers:
            process.kill()
            process.join(1.0)


class EnvPool:
    """N environments, stepped by W worker processes, or in this process if W is 0.

    Itself a vector environment; `step` is `send` then `recv`, for callers with something to do
    in between. What these return are views into the shared memory, valid until the next `send`,
    `reset` or `set_state`: copy what you keep. Of an environment's `info`, only "final_obs" is
    passed on.

    make_env      make_env(n) builds a vector environment of n environments, as CartPole does
    start_method  "fork", "forkserver" or "spawn". By default forkserver, where there is one: a
                  process that imports torch once, and from which workers are forked. Plain fork
                  starts sooner, but copies a process whose threads may be holding locks.
    timeout       seconds that a worker may take for one command

    Raises ValueError for an impossible number of workers, actions of the wrong shape or an
    environment that breaks the contract; TypeError for a make_env that workers cannot import;
    RuntimeError for calls out of order; WorkerError for a worker that failed.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": "SameStep"}

    def __init__(
        self,
        make_env: Any,
        num_envs: int,
        workers: int,
        *,
        start_method: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        if num_envs < 1 or not 0 <= workers <= num_envs:
            got = f"num_envs = {num_envs} and workers = {workers}"
            raise ValueError(f"a pool needs 1 or more environments, 0 to N workers; got {got}")
        self.num_envs, self.timeout, self._closed = num_envs, timeout, False
        self._owner = os.getpid()
        self._pending: int | None = None  # the command that was posted and not yet collected
        self._workers: list[tuple[Any, Any, Any, Any]] = []  # process, go, done, report
        self._env: Any = None  # the environments, if there are no workers

        env = _build(make_env, 1)  # only for its spaces and its state
        self.single_observation_space = env.single_observation_space
        self.single_action_space = env.single_action_space
        self.has_state = _has_state(env)
        layout, spaces = _layout(env, num_envs), _spaces(env)
        env.close()
        if workers > 0:
            self._start(make_env, layout, spaces, workers, start_method)
        else:
            self._arrays = {k: np.zeros(shape, dtype) for k, (shape, dtype) in layout.items()}
            self._env = _build(make_env, num_envs, spaces)

    def _start(
        self, make_env: Any, layout: Any, spaces: Any, workers: int, start_method: str | None
    ) -> None:
        if start_method is None:
            has_server = "forkserver" in mp.get_all_start_methods()
            start_method = "forkserver" if has_server else "spawn"
        context: Any = mp.get_context(start_method)
        if start_method != "fork":
            _require_importable(make_env)
        if start_method == "forkserver":
            context.set_forkserver_preload(["numpy", "torch"])
        # On Linux a RawArray's file is unlinked once open, so that nothing can be left behind.
        sizes = {k: math.prod(shape) * dtype.itemsize for k, (shape, dtype) in layout.items()}
        memory = {name: context.RawArray("b", size) for name, size in sizes.items()}
        self._arrays = _arrays_in(memory, layout)
        to_end = self._workers, self._arrays["command"], 1.0, self._owner
        self._finalizer = weakref.finalize(self, _end, *to_end)  # if nobody calls close()
        bounds = [self.num_envs * w // workers for w in range(workers + 1)]
        ready = []
        for w, (first, stop) in enumerate(zip(bounds, bounds[1:])):
            go, done, report = *map(context.Semaphore, (0, 0)), context.RawArray("c", 8192)
            recipe, shared = (make_env, stop - first, spaces), (memory, layout)
            arguments = (recipe, slice(first, stop), shared, report, go, done)
            process = context.Process(target=_worker, args=arguments, daemon=True)
            process.name = f"worker {w} (environments {first} to {stop - 1})"
            ready.append((process, go, done, report))
        try:
            _begin(ready, self._workers)
            self._wait("starting", max(self.timeout, 60.0))  # importing takes long
        except BaseException:
            self.close(0.2)
            raise

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [process.pid for process, _, _, _ in self._workers]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode everywhere: (obs, {}). Environment i is seeded seed + i."""
        if options:
            raise ValueError(f"a pool passes no reset options on, got {options}")
        if seed is not None and not 0 <= seed <= 2**63 - self.num_envs:
            raise ValueError(f"seed must be from 0 to 2**63 - num_envs, got {seed}")
        self._post(RESET, seed=-1 if seed is None else np.arange(self.num_envs) + seed)
        self._collect()
        return self._arrays["obs"], {}

    def step(self, actions: np.ndarray) -> StepResult:
        """`send(actions)`, then `recv()`."""
        self.send(actions)
        return self.recv()

    def send(self, actions: np.ndarray) -> None:
        """Starts a step, and returns at once. Actions are (N, *action shape). Without workers,
        it is `recv` that steps."""
        actions, target = np.asarray(actions), self._arrays["action"]
        fits = actions.dtype == target.dtype or (
            actions.dtype != bool and np.can_cast(actions.dtype, target.dtype, "same_kind")
        )
        if actions.shape != target.shape or not fits:
            got = f"{actions.dtype} {actions.shape}"
            raise ValueError(f"actions must be {target.dtype} {target.shape}, got {got}")
        self._post(STEP, action=actions)

    def recv(self) -> StepResult:
        """Waits for all workers: (obs, reward, terminated, truncated, info), as CartPole's."""
        if self._pending != STEP:
            raise RuntimeError("recv() needs a send() before it")
        self._collect()
        a = self._arrays
        ended = np.count_nonzero(a["terminated"]) or np.count_nonzero(a["truncated"])
        info = {"final_obs": a["final_obs"]} if ended else {}
        return a["obs"], a["reward"], a["terminated"], a["truncated"], info

    def state(self) -> dict[str, np.ndarray]:
        """Copies of what the environments' own `state` returned, N rows each. RuntimeError if
        they have none."""
        self._post(GET_STATE)
        self._collect()
        return _state_of(self._arrays)

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Goes on from what `state` returned, with this or another number of workers."""
        own = {name: array.shape for name, array in _state_of(self._arrays).items()}
        given = {name: np.shape(array) for name, array in state.items()}
        if own != given:
            raise ValueError(f"a state of these environments is {own}, got {given}")
        self._post(SET_STATE, **{"state:" + name: array for name, array in state.items()})
        self._collect()

    def close(self, grace: float = 5.0) -> None:
        """Closes the environments and ends the workers, by force after `grace` seconds. May be
        called again."""
        if self._closed:
            return
        self._closed, self._pending = True, None
        if self._workers:
            _end(self._workers, self._arrays["command"], grace, self._owner)
        elif self._env is not None:
            self._env.close()

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _post(self, command: int, **arguments: Any) -> None:
        """Writes the arguments into their arrays, and starts `command` in all workers."""
        if self._closed:
            raise RuntimeError("this pool is closed")
        if self._pending is not None:
            raise RuntimeError("a send() is under way: call recv() first")
        if command in (GET_STATE, SET_STATE) and not self.has_state:
            raise RuntimeError("these environments have no state() and set_state()")
        for name, value in arguments.items():
            self._arrays[name][...] = value
        self._pending = command
        self._arrays["command"][:] = command
        for _, go, _, _ in self._workers:
            go.release()

    def _collect(self) -> None:
        """Waits for what `_post` began; without workers, this is where it is done."""
        try:
            if self._env is not None:
                _obey(self._env, self._arrays)
            else:
                assert self._pending is not None
                self._wait(DOING[self._pending], self.timeout)
        except BaseException:  # Ctrl-C too: workers and learner are out of step from here on
            if self._workers:
                self.close(0.2)
            raise
        finally:
            self._pending = None

    def _wait(self, doing: str, timeout: float) -> None:
        """Waits until every worker is done; raises WorkerError for one that failed."""
        polls = 0  # of 0.1 s each: a clock would also count while all of us are stopped
        for w, (process, _, done, report) in enumerate(self._workers):
            alive, problem = True, ""
            while not problem and not _acquire(done, 0.1):
                polls += 1
                if not alive:
                    problem = f"died with exit code {process.exitcode} while {doing}"
                    if process.exitcode == UNGUARDED:
                        guard = 'if __name__ == "__main__":'
                        problem += f": put what your program does under {guard}"
                elif polls * 0.1 >= timeout:
                    problem = f"was still {doing} after {timeout:g} s"
                alive = process.is_alive()  # if not, it may have released `done` just before
            if report[0] != b"\0":
                problem = f"raised while {doing}: {report.value.decode(errors='replace')}"
            if problem:
                raise WorkerError(f"{process.name} {problem}", w, process.exitcode)


# ==============================================================================================
# 4. ActorCritic
# Needs: import math, numpy as np; from typing import Any; import torch; from torch import nn
#
# Two networks look at the same observation. The actor gives each action a probability: it is
# the policy, and all that is needed to play. (Its A outputs are called logits; softmax,
# exp(logit) over the sum of them all, makes them probabilities.) The critic estimates the
# value: how much reward, later rewards discounted, the policy will still collect from here. It
# is needed only to train, because "better than expected" takes somebody who expects.
#
# Two separate bodies, and not one with two heads: the critic's gradients are large, and would
# shape shared layers for predicting rewards, at the cost of the actor. On CartPole a shared
# body needed about twice the steps.
#
# Initial weights are orthogonal: rows (or columns) at right angles and equally long, so a layer
# stretches no direction more than another, and signals and gradients keep about their size. The
# gains are customary in PPO: √2 in hidden layers, 1 for the critic's output, and 0.01 for the
# actor's, so that all actions start out almost equally probable, and chance does not decide
# early what is explored.
#
# Other kinds of actions. One choice among A is the case n = 1 of n independent choices
# (MultiDiscrete): the outputs are split, and their log-probabilities add up. For real
# numbers (Box), each output is the mean of a normal distribution, whose deviation is a
# parameter that does not depend on the observation. What is drawn may then lie outside the box.
# It is learned from as it was drawn, and clipped only by `to_env`, on its way into the
# environment.
# ==============================================================================================


class MLP(nn.Module):
    """MLP([4, 64, 64, 2], ...) is 4 → 64 → tanh → 64 → tanh → 2; `gain` is the last layer's."""

    def __init__(
        self, sizes: list[int], gain: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        gains = [math.sqrt(2)] * (len(sizes) - 2) + [gain]
        for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
            # Not nn.Linear, which begins by drawing weights from torch's global generator.
            weight = nn.init.orthogonal_(torch.empty(outputs, inputs), gains[i], generator)
            self.register_parameter(f"weight{i}", nn.Parameter(weight))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.zeros(outputs)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, first size) → (N, last size)"""
        parameters = list(self.parameters())
        *hidden, last = zip(parameters[::2], parameters[1::2])  # (weight, bias) of each layer
        x = x.to(parameters[0].device)
        for weight, bias in hidden:
            x = nn.functional.linear(x, weight, bias).tanh()
        return nn.functional.linear(x, *last)


class ActorCritic(nn.Module):
    """A policy, and the value of the states that it visits.

    observation_space  Box of any shape (flattened to O numbers) or Discrete (one-hot)
    action_space       Discrete, MultiDiscrete or Box
    hidden             widths of the hidden layers, of the actor's and of the critic's
    generator          draws the initial weights; None: torch's global generator

    Observations may be NumPy arrays or tensors, (N, *shape); results are tensors. Actions have
    the shape of their space, int64 (counted from 0) or float32 (not clipped); `to_env` makes
    them fit for the environment. Raises ValueError for a space of another kind.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        hidden: tuple[int, ...] = (64, 64),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.normalizer: Any = None  # a Normalizer, if there is one (part 7)
        # Told apart by name, so that Gymnasium's spaces will do as well as those of part 2.
        self.kinds = type(observation_space).__name__, type(action_space).__name__
        if self.kinds[0] not in ("Box", "Discrete"):
            raise ValueError(f"observations cannot be {observation_space}, only Box, Discrete")
        if self.kinds[1] == "Box":
            self.choices = [math.prod(action_space.shape)]
            self.log_std = nn.Parameter(torch.zeros(self.choices))
        elif self.kinds[1] in ("Discrete", "MultiDiscrete"):
            sizes = action_space.n if self.kinds[1] == "Discrete" else action_space.nvec
            self.choices = np.ravel(sizes).tolist()
        else:
            raise ValueError(
                f"actions cannot be {action_space}: Discrete, MultiDiscrete or Box"
            )
        one_hot = self.kinds[0] == "Discrete"
        inputs = int(observation_space.n) if one_hot else math.prod(observation_space.shape)
        self.actor = MLP([inputs, *hidden, sum(self.choices)], 0.01, generator)
        self.critic = MLP([inputs, *hidden, 1], 1.0, generator)

    @torch.no_grad()
    def act(
        self,
        obs: np.ndarray | torch.Tensor,
        *,
        greedy: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses actions: obs (N, *shape) → (action (N, *shape), logprob float32 (N,)).

        Draws them from the policy with `generator` (None: torch's global one), or, if greedy,
        takes the most probable. Nothing is differentiable.
        """
        outputs = self.actor(self._flat(obs))
        noise = None if greedy else self.noise(len(outputs), generator=generator)
        action = self._choose(outputs, noise)
        return action, self._judge(outputs, action)[0]

    @torch.no_grad()
    def choose(self, obs: np.ndarray | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Only the action of `act`, with `noise` (N, outputs) that was drawn before."""
        return self._choose(self.actor(self._flat(obs)), noise)

    def noise(self, *shape: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """What makes choices random, (*shape, outputs): numbers that are added to the actor's
        outputs, for Box after multiplication by the deviation."""
        device = generator.device if generator else next(self.parameters()).device
        noise = torch.empty(*shape, sum(self.choices), device=device)
        if self.kinds[1] == "Box":
            return noise.normal_(generator=generator)
        # The largest of logit + Gumbel noise falls on each choice with its softmax probability,
        # and -log of an exponential variable is Gumbel noise.
        return -noise.exponential_(generator=generator).log_()

    def evaluate(
        self, obs: np.ndarray | torch.Tensor, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the networks, as they are now, say of actions taken earlier: (logprob, entropy,
        value), each (N,) and differentiable."""
        flat = self._flat(obs)
        logprob, entropy = self._judge(self.actor(flat), action)
        return logprob, entropy, self.critic(flat).squeeze(-1)

    def value(self, obs: np.ndarray | torch.Tensor) -> torch.Tensor:
        """V of each observation: (N, *shape) → (N,)."""
        value: torch.Tensor = self.critic(self._flat(obs)).squeeze(-1)
        return value

    def to_env(self, action: torch.Tensor) -> np.ndarray:
        """Actions as the environment takes them: Box clipped, Discrete counted from `start`."""
        array, space = action.cpu().numpy(), self.action_space
        if self.kinds[1] == "Box":
            array = np.clip(array, space.low, space.high)
        return np.asarray(array + getattr(space, "start", 0), space.dtype)

    def _flat(self, obs: np.ndarray | torch.Tensor) -> torch.Tensor:
        """(N, *shape) → (N, O)"""
        flat = torch.as_tensor(obs, dtype=torch.float32)
        if self.kinds[0] == "Discrete":
            index = flat.long() - int(self.observation_space.start)
            flat = nn.functional.one_hot(index, int(self.observation_space.n)).float()
        flat = flat.flatten(1) if flat.ndim > 1 else flat.unsqueeze(1)
        return flat if self.normalizer is None else self.normalizer(flat)

    def _logits(self, outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, outputs) → n of (N, A), one for each choice."""
        return torch.split(outputs, self.choices, -1) if len(self.choices) > 1 else (outputs,)

    def _choose(self, outputs: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Actions (N, *shape) from the actor's outputs; without noise, the most probable."""
        if self.kinds[1] == "Box":
            action = outputs if noise is None else outputs + self.log_std.exp() * noise
        else:
            scores = self._logits(outputs if noise is None else outputs + noise)
            action = torch.stack([its.argmax(-1) for its in scores], -1)
        return action.view(-1, *self.action_space.shape)

    def _judge(
        self, outputs: torch.Tensor, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log π(a|s), and the entropy -Σ π·log π, which is log A where A choices are equally
        probable and 0 where one is certain: (N, outputs), (N, *shape) → (N,) each."""
        action = action.reshape(len(action), -1)  # (N, choices)
        if self.kinds[1] == "Box":
            normal: Any = torch.distributions.Normal(outputs, self.log_std.exp(), False)
            return normal.log_prob(action).sum(-1), normal.entropy().sum(-1)
        logprob = entropy = torch.zeros((), device=outputs.device)
        for logits, chosen in zip(self._logits(outputs), action.unbind(-1)):
            logprobs = logits.log_softmax(-1)  # (N, A)
            # nll_loss, the negative log-likelihood, is minus the element that `chosen` names.
            logprob = logprob - nn.functional.nll_loss(logprobs, chosen, reduction="none")
            entropy = entropy - (logprobs.exp() * logprobs).sum(-1)
        return logprob, entropy


# ==============================================================================================
# 5. RolloutBuffer
# Needs: import dataclasses; import numpy as np; import torch; from typing import Any, Iterator
#
# T steps of N environments, in memory that is allocated once. One environment's line, with
# states s0, s1, ... of one game and z0, z1, ... of the next:
#
#                 t = 0      1      2      3      4      5 = T, so that the last step has a next
#     obs         [ s0 ]  [ s1 ]  [ s2 ]  [ z0 ]  [ z1 ]  [ z2 ]
#     action        a0      a1      a2      b0      b1
#     reward        r0      r1      r2      q0      q1
#     ended         ·       ·       ■       ·       ·
#
# Action a2 ended its episode, and earned r2. The environment was reset within that step, so the
# next observation, z0, begins another game, which has nothing to do with a2. The state s3, to
# which a2 really led, is in the environment's `final_obs`.
#
# Advantages. How much better was an action than what the policy does there on average? The
# rewards that followed tell, but they also depend on everything else that happened later: right
# on average, and noisy. The critic's opinion of the next state can stand in for all of them:
# quiet, but wrong while the critic is still learning. Generalized Advantage Estimation mixes
# the two. With s′_t for the state that step t led to:
#
#     δ_t = r_t + γ·(1 - terminated_t)·V(s′_t) - V(s_t)
#     Â_t = δ_t + γ·λ·(1 - terminated_t)·(1 - truncated_t)·Â_{t+1}
#
# δ in words: the reward, plus what the critic expects from where the step led, minus what it
# had expected before: the step's surprise. Â adds up the surprises from here on, fading by γ·λ
# per step. With λ = 0, Â is a single surprise, and the critic is trusted for all that follows.
# With λ = 1, each V(s′) cancels against the next step's V(s), and what remains is discounted
# rewards, as far as they were seen, minus V(s_t). Values between weigh the two. Raise λ if the
# critic is bad or rewards come late, lower it if advantages are noisy. γ keeps sums over
# endless games finite, and discounts what happens much later, which says little about this
# action.
#
# Putting V(s′) in the place of rewards that were not seen is called bootstrapping, and there
# are three ways in which they can be missing. After *terminated* there are none, and V(s′)
# counts as 0. After *truncated* there would have been some, and V(s′) counts, where s′ is the
# state really reached, s3, and not z0. At the end of the rollout the game simply goes on, and
# V(z2), that of obs[T], counts. In all three the sum of surprises stops. Mistake a time limit
# for a fall, and the critic learns that 500 steps of balance end in disaster, with nothing in
# the observation to tell when: the better the policy, the more wrong the critic.
#
# Returns. Â + V, what was expected plus how much better it went, is the critic's target. It is
# called the λ-return, or just "returns"; it is discounted, partly bootstrapped, and not what
# the log calls a return, the plain sum of an episode's rewards.
# ==============================================================================================


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    final_values: np.ndarray,
    gamma: float,
    lam: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalized Advantage Estimation: (advantages, returns), each (T, N).

    rewards       (T, N)      r_t
    values        (T + 1, N)  V of the observation before each step, and of that after the last
    terminated    (T, N)      bool: the step ended the game
    truncated     (T, N)      bool: the game was cut off after the step; both may be true
    final_values  (T, N)      V of the state really reached, read only where truncated
    gamma, lam                γ and λ

    arXiv:1506.02438, equations 11 and 16; with T + 1 values the last step is no special case.
    Here three steps of one environment, γ = λ = ½, the last one a termination, so that the 9.0
    is not read; δ = (0, 0, -1):

    >>> column = lambda *numbers: np.array(numbers).reshape(-1, 1)
    >>> rewards, values = column(1.0, 1.0, 1.0), column(2.0, 2.0, 2.0, 9.0)
    >>> terminated, never = column(False, False, True), column(False, False, False)
    >>> advantages, returns = gae(rewards, values, terminated, never, 0 * rewards, 0.5, 0.5)
    >>> advantages.ravel().tolist(), returns.ravel().tolist()
    ([-0.0625, -0.25, -1.0], [1.9375, 1.75, 1.0])
    """
    # V(s′_t): 0 where terminated, that of the state reached where truncated, else the next
    # row's
    next_values = np.where(terminated, 0.0, np.where(truncated, final_values, values[1:]))
    # δ_t = r_t + γ·(1 - terminated_t)·V(s′_t) - V(s_t)
    advantages = rewards + gamma * next_values - values[:-1]
    # Â_t = δ_t + γ·λ·(1 - terminated_t)·(1 - truncated_t)·Â_{t+1}, from the end to the start
    decay = np.where(terminated | truncated, 0, advantages.dtype.type(gamma * lam))
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages, advantages + values[:-1]


@dataclasses.dataclass
class Batch:
    """Transitions as an update sees them, in no order that matters; B or M of them."""

    obs: torch.Tensor  # (B, *obs shape)
    action: torch.Tensor  # (B, *action shape)
    logprob: torch.Tensor  # (B,) of the action, under the policy that took it
    advantage: torch.Tensor  # (B,) Â
    returns: torch.Tensor  # (B,) Â + V, the critic's targets

    def to(self, device: str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def minibatches(
        self, size: int, epochs: int, generator: torch.Generator
    ) -> Iterator["Batch"]:
        """Passes over the batch, each in a new order, in pieces of `size`. What the division
        leaves over is not dropped: the last piece of a pass may be smaller."""
        for _ in range(epochs):
            order = torch.randperm(len(self.obs), generator=generator).to(self.obs.device)
            shuffled = [tensor[order].split(size) for tensor in vars(self).values()]
            yield from (Batch(*pieces) for pieces in zip(*shuffled))


class RolloutBuffer:
    """One rollout, T steps of N environments, until the next overwrites it. NumPy arrays, as
    that is what environments give and `gae` takes."""

    def __init__(
        self, num_steps: int, num_envs: int, observation_space: Any, action_space: Any
    ) -> None:
        T, N = num_steps, num_envs
        self.obs = np.zeros((T + 1, N, *observation_space.shape), np.float32)
        whole = np.issubdtype(action_space.dtype, np.integer)
        self.action = np.zeros((T, N, *action_space.shape), np.int64 if whole else np.float32)
        self.logprob = np.zeros((T, N), np.float32)
        self.reward = np.zeros((T, N), np.float32)
        self.terminated, self.truncated = np.zeros((2, T, N), bool)
        self.value = np.zeros((T + 1, N), np.float32)
        self.final_value = np.zeros((T, N), np.float32)  # read only where truncated

    def add(
        self, t: int, action: Any, next_obs: Any, reward: Any, terminated: Any, truncated: Any
    ) -> None:
        """Copies in step t: the action, and what it returned. Each is (N, ...)."""
        self.action[t], self.obs[t + 1], self.reward[t] = action, next_obs, reward
        self.terminated[t], self.truncated[t] = terminated, truncated

    def batch(self, gamma: float, lam: float) -> Batch:
        """The rollout with its advantages and returns, flat: (T, N, ...) → (B, ...)."""
        flags = self.terminated, self.truncated
        both = gae(self.reward, self.value, *flags, self.final_value, gamma, lam)
        arrays = self.obs[:-1], self.action, self.logprob, *both
        return Batch(*(torch.from_numpy(array).flatten(0, 1) for array in arrays))


# ==============================================================================================
# 6. PPO
# Needs: import torch; from torch import nn; from torch.optim.adam import adam; parts 1, 4, 5
#
# The policy gradient in one sentence: change the weights so that the log-probability of each
# action taken rises in proportion to its advantage. (Of the logarithm, which counts relative
# changes: otherwise actions would be pushed more just because they are taken more often.) This
# holds only for the policy that took the actions, hence for one small gradient step. But data
# is costly, and PPO wants many gradient steps from the same data. For that it needs two things.
#
# A *ratio*. After the first gradient step, the policy is no longer the one that played. So each
# action is weighed by how much more probable it has become: ratio = π(a|s) / π_old(a|s). Then
# the mean of ratio·Â over actions that the old policy took estimates the mean advantage of the
# new policy's actions in the same states; and where the two are equal, its gradient is the
# policy gradient.
#
# A *clip*. Nothing so far keeps the optimiser from making one lucky action a hundred times more
# probable, and the estimate is worth nothing so far from the data. So the ratio is held
# constant outside 1 ± ε, and a constant has no gradient: once an action has gained (or lost) a
# fifth of its probability, there is nothing more to win from it until fresh data speaks. But
# gradient steps for the sake of other actions can also carry a ratio out of the band against
# its own advantage, and there the gradient that brings it back must remain. The *smaller* of
# the unclipped and the clipped term does all of this:
#
#                     ratio < 1-ε           within the band       ratio > 1+ε
#         Â > 0       ratio·Â: pull back    ratio·Â: push up      (1+ε)·Â: enough, no gradient
#         Â < 0       (1-ε)·Â: enough       ratio·Â: push down    ratio·Â: pull back
#
#     objective =  mean( min( ratio·Â, clip(ratio, 1-ε, 1+ε)·Â ) )
#                 + ent_coef · mean( entropy ) - vf_coef · mean( (V - returns)² )
#
# Entropy measures how undecided the policy is. Where a first favourite would shut out actions
# that were never properly tried, a little reward for entropy helps; CartPole needs none.
#
# The objective is to rise, and optimisers descend, so the sign is flipped once, at the end.
# Only logprob, entropy and V are differentiated; everything in the batch is constant. On the
# first minibatch of an update the two policies are the same: up to rounding, the ratio is 1 and
# the KL estimate 0.
#
# Several processes can train together (torchrun starts them; each is then called a *rank*).
# Each plays environments of its own, and before every gradient step all take the mean of their
# gradients; so their weights, which were equal at the start, stay equal.
# ==============================================================================================


def ppo_loss(
    policy: ActorCritic, batch: Batch, config: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of arXiv:1707.06347, equations 7 and 9, on one minibatch: a scalar to descend,
    and scalars for the log: policy_loss, value_loss, entropy, approx_kl and clip_fraction."""
    logprob, entropy, value = policy.evaluate(batch.obs, batch.action)  # (M,) each
    shapes = {x.shape for x in (logprob, value, batch.logprob, batch.advantage)}
    assert shapes == {batch.returns.shape}, f"(M, 1) with (M,) would make (M, M): {shapes}"
    # Advantages are shifted and scaled to mean 0 and deviation 1 in each minibatch, so that the
    # learning rate need not know how large rewards are. What counts is then how an action did
    # beside the others of its minibatch. A single one has no deviation, and stays as it is.
    advantage = batch.advantage
    if len(advantage) > 1:
        std, mean = torch.std_mean(advantage)
        advantage = (advantage - mean) / (std + 1e-8)
    # ratio = π(a|s) / π_old(a|s)
    log_ratio = logprob - batch.logprob
    ratio = log_ratio.exp()
    # min( ratio·Â, clip(ratio, 1-ε, 1+ε)·Â ), called the surrogate: it stands in for the mean
    # advantage of the new policy, as far as the old one's data can tell
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    surrogate = torch.min(ratio * advantage, clipped * advantage)
    # PPO's first implementation clips the change of V as well. That makes the critic's pace
    # depend on the size of rewards, and was found not to help (arXiv:2006.05990), so it is left
    # out.
    error = (value - batch.returns).square()
    gain = surrogate - config.vf_coef * error
    if config.ent_coef:  # if not, nothing need be differentiated
        gain = gain + config.ent_coef * entropy
    objective = gain.mean()
    with torch.no_grad():
        # KL(π_old ‖ π), the Kullback-Leibler divergence: how far the policy has moved.
        # Estimated as mean(ratio - 1 - log ratio), no term of which is negative ("k3" in
        # Schulman, 2020, "Approximating KL divergence").
        outside = (ratio - 1).abs() > config.clip
        columns = {"policy_loss": -surrogate, "value_loss": error, "entropy": entropy}
        columns |= {"approx_kl": ratio - 1 - log_ratio, "clip_fraction": outside.float()}
        means = torch.stack(list(columns.values())).mean(1)
    return -objective, dict(zip(columns, means))


def world_size() -> int:
    """How many ranks train together; 1 without torchrun."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def of_all_ranks(value: Any) -> list[Any]:
    """[what rank 0 gave, what rank 1 gave, ...]"""
    values = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Replaces `tensor`, in place, by its mean over all ranks."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
        tensor /= world_size()
    return tensor


class Adam:
    """Adam (arXiv:1412.6980) over a policy whose parameters become slices of one vector.

    Weights, gradient and Adam's running means, of gradients and of their squares, are one
    vector each, of P numbers, however many layers there are, so clipping, stepping and saving
    are one operation each; `backward` adds every parameter's gradient into its slice. Adam's
    eps is 1e-5, as is customary in PPO, and not 1e-8: where gradients have almost vanished,
    noise must not be scaled up to full-sized steps.

    The arithmetic is torch's. `torch.optim.Adam` does the same, but building one imports
    torch's compiler, which takes about as long as learning CartPole.
    """

    def __init__(self, policy: nn.Module) -> None:
        parameters = list(policy.parameters())
        self.weights = nn.utils.parameters_to_vector(parameters).detach().clone()  # (P,)
        self.grad, self.mean, self.square = self.weights.new_zeros(3, len(self.weights))
        self.steps = self.weights.new_zeros(())
        sizes = [p.numel() for p in parameters]
        slices = torch.split(self.weights, sizes), torch.split(self.grad, sizes)
        for p, weights, grad in zip(parameters, *slices):
            p.data, p.grad = weights.view_as(p), grad.view_as(p)

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
        """One step, along a gradient that is scaled down to `max_grad_norm` if it is longer;
        returns the length that it had. The gradient is then zero, ready for the next one. Where
        several processes train together, the step is that of their mean gradient, in each."""
        mean_over_ranks(self.grad)
        norm: torch.Tensor = torch.linalg.vector_norm(self.grad)
        self.grad *= (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        adam([self.weights], [self.grad], [self.mean], [self.square], [], [self.steps],
             lr=learning_rate, beta1=0.9, beta2=0.999, eps=1e-5, weight_decay=0.0,
             amsgrad=False, maximize=False, fused=True)  # fmt: skip
        self.grad.zero_()
        return norm


def ppo_update(
    policy: ActorCritic,
    optimizer: Adam,
    batch: Batch,
    config: Config,
    learning_rate: float,
    generator: torch.Generator,
) -> dict[str, float]:
    """Improves the policy on one rollout, in an order drawn from `generator`. Returns the
    number of gradient steps, and means over them: `ppo_loss`'s stats and the gradient norm."""
    history: list[dict[str, torch.Tensor]] = []
    for minibatch in batch.minibatches(config.minibatch_size, config.epochs, generator):
        loss, stats = ppo_loss(policy, minibatch, config)
        limit = config.target_kl if history else None  # at the first, the KL is only rounding
        if limit is not None and mean_over_ranks(stats["approx_kl"]) > limit:
            break  # out of this epoch and all that would follow, on all ranks alike
        loss.backward()  # type: ignore[no-untyped-call]
        stats["grad_norm"] = optimizer.step(learning_rate, config.max_grad_norm)
        history.append(stats)
    means = {k: torch.stack([stats[k] for stats in history]).mean().item() for k in history[0]}
    return {**means, "gradient_steps": len(history)}


# ==============================================================================================
# 7. Training
# Needs: import csv, hashlib, io, pathlib, pkgutil, sys, zipfile; parts 1, 2, 3, 4, 5, 6, 9
#
# The loop at the end of this part is PPO's six steps in order. What surrounds it makes a run
# repeatable, and hard to lose.
#
# Randomness. Every draw comes from a generator made for its purpose, whose seed is derived from
# config.seed and that purpose. No global generator is touched, so a program that imports this
# file is not disturbed, and evaluation does not disturb training; and runs with another
# config.seed share no seed with this one. The same config gives the same weights, bit for bit,
# on the same machine, package versions and number of threads, with any number of workers, and
# also if the run was killed and resumed on the way. For that, a checkpoint holds all that the
# future depends on: weights, Adam's means, environments, the observations to act on next, and
# each generator's position.
#
# The state at the end of every update is kept in memory, which costs little. It goes to disk
# every few updates, and when anything but a kill ends the run early: Ctrl-C loses less than one
# update, SIGKILL and power cuts less than checkpoint_every. On a full disk, training goes on,
# and what could not be written is tried again.
#
# What is read is not trusted. A checkpoint ends with a digest of its content, because torch
# loads most files in which a bit was flipped without complaint; and since whoever forges a file
# can forge its digest too, it is loaded as data, and each field has to be of the right kind.
# ==============================================================================================

# The columns of log.csv, which has a row per update, and what is healthy. Losses, entropy, KL,
# clip fraction and gradient norm are means over the update's gradient steps, and of several
# ranks they are those of rank 0; returns, lengths and explained variance are means over ranks.
COLUMNS = {
    "update": "updates done",
    "steps": "environment steps played for them",
    "episodes": "episodes finished",
    "mean_return": "of the last 100 finished episodes (of each rank): plain sums of rewards",
    "mean_length": "of the same episodes, in steps",
    "policy_loss": "minus the clipped term of the objective; near 0, as advantages have mean 0",
    "value_loss": "the critic's mean squared error; falls when returns have settled",
    "entropy": "log A at first, then falling; near 0 early on: nothing is explored any more",
    "approx_kl": "distance from the policy that played; 0.001 to 0.03",
    "clip_fraction": "share of ratios outside 1 ± ε, on either side; 0.05 to 0.3",
    "grad_norm": "length of the gradient before it was scaled down",
    "gradient_steps": "fewer than epochs x minibatches only if target_kl ended the update",
    "explained_variance": "1: the critic predicts returns; 0: no better than a constant",
    "learning_rate": "of this update",
    "seconds": "since training began",
    "steps_per_second": "of this update",
}
PURPOSES = ["weights", "environments", "actions", "minibatches", "evaluation"]
BARS = {195: "CartPole-v0", 475: "CartPole-v1"}  # mean returns that count as solving them
CHECKPOINT_FORMAT = 3
MAY_DIFFER = ["workers", "checkpoint_every", "eval_episodes"]  # in a resumed run's config
EVALUATION_LIMIT = 1_000_000  # steps
PLAIN = {  # Learner's numbers and lists, and of what kind they are
    "update": int,
    "episodes": int,
    "recent": [list],
    "rows": [dict.fromkeys(COLUMNS, (int, float))],
    "snapshots": [{"steps": int} | dict.fromkeys(["weights", "mean", "std"], torch.Tensor)],
}
SAVED = dict.fromkeys(["tensors", "generators", "envs"], dict) | PLAIN  # all of a Learner


def derive_seed(seed: int, purpose: str, *more: int) -> int:
    """A seed for one of PURPOSES, unlike those of other purposes, other runs, or another rank
    or update in `more`. It has 62 bits, so that seed + N still fits into an int64."""
    sequence = np.random.SeedSequence(seed, spawn_key=(PURPOSES.index(purpose), *more))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 2


class MakeEnv(NamedTuple):
    """The make_env that `--env` names: "CartPole" is part 2's, a name with a colon is a
    callable in a module, any other is Gymnasium's. Raises ValueError if there is none."""

    name: str
    render_mode: str | None = None

    def __call__(self, num_envs: int) -> Any:
        if self.name == "CartPole" or ":" in self.name:
            if self.render_mode:
                what = "--render needs an environment of Gymnasium's"
                raise ValueError(f"{what}, not {self.name}")
            try:
                make = CartPole if self.name == "CartPole" else pkgutil.resolve_name(self.name)
            except (ImportError, AttributeError) as error:
                raise ValueError(f"--env {self.name} cannot be imported: {error}") from None
            return make(num_envs)
        try:
            import gymnasium as gym
        except ImportError as error:
            raise ValueError(f"--env {self.name}: {error} (pip install gymnasium)") from None

        def keep(env: Any) -> Any:  # final_obs, which a reset might otherwise write over
            return gym.wrappers.TransformObservation(env, np.copy, env.observation_space)

        mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        options: Any = {"render_mode": self.render_mode} if self.render_mode else {}
        try:
            return gym.make_vec(self.name, num_envs, "sync", mode, [keep], **options)
        except gym.error.Error as error:
            raise ValueError(f"Gymnasium cannot make {self.name}: {error}") from None


class Normalizer:
    """Shifts and scales K numbers by their mean and deviation, as measured over all rows that
    were ever counted, by all ranks, and keeps the result within ±10."""

    def __init__(self, size: int) -> None:
        self.sums = torch.zeros(3, size, dtype=torch.float64)  # of 1, x and x² over all rows

    def count(self, x: torch.Tensor) -> None:
        """Counts k more rows, (k, K)."""
        x = x.double()
        sums = torch.stack([torch.ones_like(x), x, x.square()]).sum(1)
        self.sums += mean_over_ranks(sums) * world_size()

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation, float32 (K,) each; 0 and 1 before anything was counted."""
        number, total, squares = self.sums
        if not number.any():
            return total.float(), total.float() + 1
        mean = total / number
        std = (squares / number - mean.square()).clamp(min=1e-8).sqrt()
        return mean.float(), std.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = (moment.to(x.device) for moment in self.moments())
        return ((x - mean) / std).clamp(-10, 10)


class Evaluation(NamedTuple):
    """The plain sums of rewards of finished episodes, their mean and their deviation."""

    returns: np.ndarray  # (episodes,)
    mean: float
    std: float

    def __str__(self) -> str:
        spread = f"{self.mean:.1f} ± {self.std:.1f}"
        return f"evaluation: mean return {spread} over {len(self.returns)} episodes"


class Result(NamedTuple):
    """What `train` returns: the final policy, the log's rows, the evaluation, the folder."""

    policy: ActorCritic
    rows: list[dict[str, float]]
    evaluation: Evaluation
    run: pathlib.Path | None  # rank 0 has it


def evaluate(policy: ActorCritic, config: Config, render_mode: str | None = None) -> Evaluation:
    """Plays the first episode of each of config.eval_episodes environments, which have seeds of
    their own, always taking the most probable action."""
    n = config.eval_episodes
    returns, running = np.zeros(n), np.ones(n, bool)
    with EnvPool(MakeEnv(config.env, render_mode), n, min(config.workers, n)) as envs:
        obs, _ = envs.reset(seed=derive_seed(config.seed, "evaluation"))
        for _ in range(EVALUATION_LIMIT):
            action, _ = policy.act(obs, greedy=True)
            obs, reward, terminated, truncated, _ = envs.step(policy.to_env(action))
            returns += reward * running  # an environment's later episodes do not count
            running &= ~(terminated | truncated)
            if not running.any():
                return Evaluation(returns, float(returns.mean()), float(returns.std()))
    never = f"an episode of the evaluation did not end within {EVALUATION_LIMIT} steps"
    raise RuntimeError(f"{never}: give the environment a time limit")


class Learner:
    """All that changes in the course of training, to be saved and restored as one."""

    def __init__(self, config: Config, envs: EnvPool, rank: int = 0) -> None:
        def generator(purpose: str, *more: int, device: str = "cpu") -> torch.Generator:
            seed = derive_seed(config.seed, purpose, *more)
            return torch.Generator(device).manual_seed(seed)

        spaces = envs.single_observation_space, envs.single_action_space
        self.config, self.envs, self.rank = config, envs, rank
        policy = ActorCritic(*spaces, config.hidden, generator("weights"))
        self.policy = policy.to(config.device)
        if config.norm_obs and self.policy.kinds[0] != "Box":
            raise ValueError(f"norm_obs needs observations in a Box, not in {spaces[0]}")
        self.optimizer = Adam(self.policy)
        self.buffer = RolloutBuffer(config.num_steps, config.num_envs, *spaces)
        self.generators = {
            "actions": generator("actions", rank, device=config.device),
            "minibatches": generator("minibatches", rank),
        }
        self.obs_norm = Normalizer(math.prod(spaces[0].shape))
        self.reward_norm = Normalizer(1)
        # Return, length and discounted return so far of each environment's running episode
        self.running = np.zeros((3, config.num_envs))
        self.tensors = {
            "weights": self.optimizer.weights,
            "adam_mean": self.optimizer.mean,
            "adam_square": self.optimizer.square,
            "adam_steps": self.optimizer.steps,
            "obs": torch.from_numpy(self.buffer.obs[-1]),
            "obs_sums": self.obs_norm.sums,
            "reward_sums": self.reward_norm.sums,
            "running": torch.from_numpy(self.running),
        }
        self.update = self.episodes = 0  # updates done, episodes finished
        self.recent: list[list[float]] = []  # [return, length] of the last 100 of these
        self.rows: list[dict[str, float]] = []  # of the log
        self.snapshots: list[dict[str, Any]] = []  # of the policy, for the page (part 9)
        self.keep_snapshot()

    @property
    def steps(self) -> int:
        """Environment steps played for the updates done, by all ranks together."""
        return self.update * self.config.batch_size * world_size()

    def begin(self) -> None:
        """Starts episodes whose seeds depend on the rank and on the updates done."""
        seed = derive_seed(self.config.seed, "environments", self.rank, self.update)
        self.buffer.obs[-1] = self.seen(self.envs.reset(seed=seed)[0])
        self.running[:] = 0

    def seen(self, obs: np.ndarray, count: bool = True) -> np.ndarray:
        """Observations, (k, *shape), as the policy is to see them."""
        if not self.config.norm_obs:
            return obs
        rows = torch.from_numpy(obs).flatten(1)
        if count:
            self.obs_norm.count(rows)
        return self.obs_norm(rows).view(obs.shape).numpy()

    @torch.no_grad()
    def collect(self) -> None:
        """Plays T steps in every environment, and fills the buffer."""
        buffer, policy, config = self.buffer, self.policy, self.config
        buffer.obs[0] = buffer.obs[-1]  # goes on where the last rollout stopped
        # One draw for all steps, because at these sizes a draw costs as much as a layer.
        shape, generator = buffer.action.shape[:2], self.generators["actions"]
        for t, noise in enumerate(policy.noise(*shape, generator=generator)):
            action = policy.choose(buffer.obs[t], noise)
            obs, reward, terminated, truncated, info = self.envs.step(policy.to_env(action))
            self.running[0] += reward
            self.running[1] += 1
            if config.norm_reward:
                self.running[2] = config.gamma * self.running[2] + reward
                self.reward_norm.count(torch.from_numpy(self.running[2]).unsqueeze(1))
                reward = (reward / self.reward_norm.moments()[1].numpy()).clip(-10, 10)
            buffer.add(t, action.cpu().numpy(), self.seen(obs), reward, terminated, truncated)
            if truncated.any():  # the one value that is needed at once: final_obs will be gone
                cut = truncated.nonzero()[0]
                reached = self.seen(info["final_obs"][cut], count=False)
                buffer.final_value[t, cut] = policy.value(reached).cpu()
            ended = (terminated | truncated).nonzero()[0]
            if len(ended):
                self.recent = (self.recent + self.running[:2, ended].T.tolist())[-100:]
                self.running[:, ended] = 0
                self.episodes += len(ended)

    @torch.no_grad()
    def estimate(self) -> None:
        """What the networks say of the rollout: in one batch, as nothing needed it before."""
        buffer, policy = self.buffer, self.policy
        action = torch.from_numpy(buffer.action).flatten(0, 1).to(self.config.device)
        obs = torch.from_numpy(buffer.obs[:-1]).flatten(0, 1)
        logprob, _, value = policy.evaluate(obs, action)  # (B,) each
        buffer.logprob[:] = logprob.cpu().view(buffer.logprob.shape)
        buffer.value[:-1] = value.cpu().view(buffer.logprob.shape)
        buffer.value[-1] = policy.value(buffer.obs[-1]).cpu()
        self.require_finite(vars(buffer))

    def improve(self, batch: Batch, rate: float) -> dict[str, float]:
        """One update of the policy: what `ppo_update` returns."""
        generator = self.generators["minibatches"]
        batch = batch.to(self.config.device)
        stats = ppo_update(self.policy, self.optimizer, batch, self.config, rate, generator)
        self.require_finite(stats | {"weights": self.optimizer.weights.cpu().numpy()})
        self.update += 1
        self.keep_snapshot()
        return stats

    def require_finite(self, quantities: dict[str, Any]) -> None:
        """RuntimeError if one is NaN or infinite. One look per rollout and one per update will
        do, because neither goes away again, and the state before this update is kept."""
        rate = f"a learning rate that is too large (it is {self.config.learning_rate:g})"
        others = "huge rewards (--norm-reward scales them), or an environment that returned it"
        for name, value in quantities.items():
            if not np.isfinite(value).all():
                what = f"update {self.update + 1}: {name} is NaN or infinite"
                raise RuntimeError(f"{what}; usual causes are {rate}, {others}")

    def keep_snapshot(self) -> None:
        """Copies the policy at eight moments, first and last included. CartPole's, because the
        page can play only that."""
        updates = self.config.num_updates // world_size()
        moments = {round(i * updates / 7) for i in range(8)}
        if self.config.env == "CartPole" and self.update in moments:
            mean, std = self.obs_norm.moments()  # 0 and 1 without norm_obs
            weights = self.optimizer.weights.cpu().clone()
            snapshot = {"steps": self.steps, "weights": weights, "mean": mean, "std": std}
            self.snapshots = [*self.snapshots, snapshot]

    def statistics(self, batch: Batch) -> dict[str, float]:
        """What the log says of the games so far, and of the values that led to `batch`."""
        mean_return, mean_length = np.array(self.recent or [[math.nan] * 2]).mean(0).tolist()
        # returns - V is Â, so the share of the returns' variance that V did not explain is:
        unexplained = batch.advantage.var(correction=0) / batch.returns.var(correction=0)
        numbers = [mean_return, mean_length, 1 - unexplained.item()]
        means = mean_over_ranks(torch.tensor(numbers, dtype=torch.float64)).tolist()
        names = ["mean_return", "mean_length", "explained_variance"]
        episodes = sum(of_all_ranks(self.episodes))
        row = {"update": self.update, "steps": self.steps, "episodes": episodes}
        return row | dict(zip(names, means))

    def state(self) -> dict[str, Any]:
        """All of it, in tensors, numbers, strings, lists and dicts that will not change."""
        envs = self.envs.state() if self.envs.has_state else {}
        return {
            "tensors": {name: tensor.clone() for name, tensor in self.tensors.items()},
            "generators": {name: g.get_state() for name, g in self.generators.items()},
            "envs": {name: torch.from_numpy(array) for name, array in envs.items()},
            **{name: getattr(self, name) for name in PLAIN},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned; where environments have no state, new episodes.
        ValueError if it is the state of another network or other environments."""
        require_kind(self.state(), state, "state")
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        for name in PLAIN:
            setattr(self, name, state[name])
        if self.envs.has_state:
            self.envs.set_state({k: tensor.numpy() for k, tensor in state["envs"].items()})
        else:
            self.begin()


def new_run(config: Config) -> pathlib.Path:
    """Makes the folder runs/<env>-<seed>, or that with -2, -3, ... where it exists."""
    pathlib.Path("runs").mkdir(exist_ok=True)
    name = f"{config.env}-{config.seed}".replace("/", "-").replace(":", "-")
    run, count = pathlib.Path("runs", name), 1
    while True:
        try:
            run.mkdir()  # fails where it exists, so two runs never share a folder
            break
        except FileExistsError:
            count += 1
            run = run.with_name(f"{name}-{count}")
    text = json.dumps(dataclasses.asdict(config), indent=2)
    replace(run / "config.json", f"{text}\n".encode())
    return run


def replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file in one step: at any moment, `path` is the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # half of it would only help to fill a full disk


def save_checkpoint(run: pathlib.Path | None, config: Config, state: dict[str, Any]) -> None:
    """Replaces the run's checkpoint. It holds the states of all ranks, and rank 0, which has a
    run, writes it."""
    saved = {"format": CHECKPOINT_FORMAT, "config": dataclasses.asdict(config)}
    saved["ranks"] = of_all_ranks(state)
    if run is not None:
        torch.save(saved, memory := io.BytesIO())
        content = memory.getvalue()
        replace(run / "checkpoint.pt", content + hashlib.sha256(content).digest())


def require_kind(kind: Any, value: Any, name: str) -> None:
    """Raises ValueError, which names the field, unless `value` is of that kind: a type, several
    types, or an example, which asks for a tensor of its dtype and shape, a dict with its keys,
    a list of items like its first."""
    fits = isinstance(value, kind if isinstance(kind, (type, tuple)) else type(kind))
    if fits and isinstance(kind, torch.Tensor):
        fits = (value.dtype, value.shape) == (kind.dtype, kind.shape)
    if not fits:
        raise ValueError(f"the checkpoint's {name} is not of the kind that this run needs")
    if isinstance(kind, dict):
        for key in kind:
            require_kind(kind[key], value.get(key), f"{name}.{key}")
    if isinstance(kind, list) and kind:
        for item in value:
            require_kind(kind[0], item, name)


def load_checkpoint(run: str | pathlib.Path) -> tuple[Config, list[dict[str, Any]]]:
    """A run's config, and the state of each rank's Learner, exactly as they were saved. Raises
    ValueError for anything else; code hidden in it is not run."""
    path = pathlib.Path(run, "checkpoint.pt")
    if not path.is_file():  # nor a pipe, which could be waited for without end
        raise ValueError(f"{run} holds no checkpoint.pt: give the folder of a run")
    try:
        whole = path.read_bytes()
        content, digest = whole[:-32], whole[-32:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("it is damaged, or of another version of Thrust")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # never compressed by torch.save
            if sum(file.file_size for file in archive.infolist()) > len(content):
                raise ValueError("it would unpack to more than its own size")
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if saved["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is {saved['format']}, and not {CHECKPOINT_FORMAT}")
        require_kind([SAVED], saved["ranks"] or [None], "ranks")  # not none at all
        return Config(**saved["config"]), saved["ranks"]
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a checkpoint that can be loaded: {reason}") from None


def load_resumable(run: str | pathlib.Path, config: Config, rank: int) -> dict[str, Any]:
    """The state of one rank in a run's checkpoint. Raises ValueError if the run, continued with
    `config`, would end with other weights than if it had not been interrupted."""
    saved, ranks = load_checkpoint(run)
    if len(ranks) != world_size():
        raise ValueError(f"{run} was trained by {len(ranks)} ranks, and not {world_size()}")
    for name, now in dataclasses.asdict(config).items():
        then, free = getattr(saved, name), ", ".join(MAY_DIFFER)
        if now != then and name not in MAY_DIFFER:
            raise ValueError(f"{run} has {name} = {then}, not {now}; only {free} may change")
    return ranks[rank]


def load(run: str | pathlib.Path) -> ActorCritic:
    """The policy in a run's checkpoint. `action, _ = policy.act(obs, greedy=True)` chooses for
    a batch of observations, and `policy.to_env(action)` is what to send. If it was trained on
    normalised observations, it normalises them by itself."""
    config, ranks = load_checkpoint(run)
    with contextlib.closing(MakeEnv(config.env)(1)) as env:
        spaces = env.single_observation_space, env.single_action_space
    policy = ActorCritic(*spaces, config.hidden, torch.Generator())
    normalizer, tensors = Normalizer(math.prod(spaces[0].shape)), ranks[0]["tensors"]
    weights = nn.utils.parameters_to_vector(policy.parameters())
    require_kind({"weights": weights, "obs_sums": normalizer.sums}, tensors, "tensors")
    nn.utils.vector_to_parameters(tensors["weights"], policy.parameters())
    normalizer.sums = tensors["obs_sums"]
    policy.normalizer = normalizer if config.norm_obs else None
    return policy


def weights_hash(policy: ActorCritic) -> str:
    """SHA-256 of the parameters' bytes, in order. RuntimeError if ranks differ in it."""
    weights = nn.utils.parameters_to_vector(policy.parameters()).detach().cpu().numpy()
    hashes = set(of_all_ranks(hashlib.sha256(weights.tobytes()).hexdigest()))
    if len(hashes) > 1:
        raise RuntimeError("the ranks have different weights, which should be impossible")
    return str(hashes.pop())


class Report:
    """Tells of a run as it happens: rows of log.csv, a progress line, bars that were passed.
    Of several ranks, only rank 0 has a run, and the others are silent."""

    def __init__(self, run: pathlib.Path | None, learner: Learner, updates: int) -> None:
        self.run, self.learner, self.updates = run, learner, updates
        self.terminal = sys.stdout.isatty()
        self.began = self.printed = time.perf_counter()
        rows = learner.rows
        self.done_before, self.seconds_before = len(rows), rows[-1]["seconds"] if rows else 0.0
        self.failed: set[str] = set()
        self.warned = False
        # A killed run may have logged more than it had saved: the log begins again from `rows`.
        self.logged = self.log_size = 0  # lines and bytes of it that are whole
        self.write_log()
        size = f"{updates} updates of {learner.config.batch_size * world_size()} steps"
        self.say(f"training {learner.config.env}: {size}; everything is kept in {run}")

    def times(self, began: float) -> dict[str, float]:
        """The log's two wall-clock columns, for an update that began at `began`."""
        now, config = time.perf_counter(), self.learner.config
        rate = config.batch_size * world_size() / (now - began)
        return {"seconds": self.seconds_before + now - self.began, "steps_per_second": rate}

    def say(self, text: str, end: str = "\n") -> None:
        """Prints a line that stays, or, with another end, one that the next line overwrites."""
        if self.run:
            line = f"\r{text:<79}" if self.terminal else text
            self.attempt("the output", lambda: print(line, end=end, flush=True))

    def write_log(self) -> None:
        """Appends to log.csv what it lacks, from where it was last whole: a write that failed
        may have left half a row."""
        if self.run:
            path, mode = self.run / "log.csv", "r+" if self.logged else "w"
            with open(path, mode, newline="", encoding="utf-8") as file:
                header: Any = dict(zip(COLUMNS, COLUMNS))
                lines = [header, *self.learner.rows]
                file.truncate(file.seek(self.log_size))
                csv.DictWriter(file, COLUMNS).writerows(lines[self.logged :])
                self.log_size, self.logged = file.tell(), len(lines)

    def attempt(self, name: str, write: Any, *arguments: Any) -> None:
        """Calls `write`. Where that fails, as on a full disk, training goes on, and the first
        time a warning says so; `failed` names what has not been written since either."""
        try:
            write(*arguments)
            self.failed.discard(name)
        except (OSError, ValueError) as error:
            self.failed.add(name)
            if not self.warned:
                what = f"thrust: {name} cannot be written: {error}"
                with contextlib.suppress(OSError):  # nor, perhaps, can the warning
                    print(f"{what}; training goes on, to try again later", file=sys.stderr)
            self.warned = True

    def save(self, state: dict[str, Any]) -> None:
        """`save_checkpoint`, which may fail."""
        self.attempt("checkpoint.pt", save_checkpoint, self.run, self.learner.config, state)

    def add_last_row(self) -> None:
        """Logs the last update, and shows progress: in a terminal one line that changes, else
        the first, the last, and one every five seconds."""
        *earlier, row = self.learner.rows
        self.attempt("log.csv", self.write_log)
        done, updates, now = len(earlier) + 1, self.updates, time.perf_counter()
        seconds_left = (now - self.began) / (done - self.done_before) * (updates - done)
        if self.terminal or done in (self.done_before + 1, updates) or now - self.printed >= 5:
            at = f"{row['steps']:>11,} steps {done / updates:5.0%}"
            speed = f"{row['steps_per_second']:,.0f} steps/s   {seconds_left:.0f} s left"
            text = f"{at}   return {row['mean_return']:.1f}   {speed}"
            self.say(text, end="" if self.terminal else "\n")
            self.printed = now
        if self.learner.config.env != "CartPole":
            return
        best = max((r["mean_return"] for r in earlier if r["episodes"] >= 100), default=0.0)
        for bar, name in BARS.items():
            if best < bar <= row["mean_return"] and row["episodes"] >= 100:
                at = f"{row['steps']:,} steps, {row['seconds']:.1f} s"
                self.say(f"passed {bar}, the bar of {name}: mean return of 100 episodes, {at}")


@contextlib.contextmanager
def torch_ready(config: Config) -> Iterator[int]:
    """Sets torch's threads, and joins the processes that torchrun started, if it did; undoes
    both afterwards. The value is this process's rank. ValueError if there is no such device."""
    threads, distributed = torch.get_num_threads(), torch.distributed
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        torch.set_num_threads(config.threads)
        if together and config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=config.device).item()
    except (RuntimeError, AssertionError) as error:
        torch.set_num_threads(threads)
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {config.device} cannot be used: {reason}") from None
    try:
        if together:
            on_gpu = config.device == "cuda"
            distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        yield distributed.get_rank() if together else 0
    finally:
        if world_size() > 1:
            distributed.destroy_process_group()
        torch.set_num_threads(threads)


def train(config: Config, *, resume: str | pathlib.Path | None = None) -> Result:
    """Trains as `config` says in a new folder under runs/, or, with `resume`, goes on with the
    run in that folder; then evaluates the policy. Under torchrun, together with other ranks.

    Whatever ends training early, the state at the end of the last update is saved first (with
    several ranks, the last checkpoint has to do). Raises
    ValueError for a run that cannot be resumed, or not with this config; RuntimeError for NaN
    or infinity; WorkerError for a failed worker; OSError where files cannot be written, either
    before training begins or, if that changes on the way, after all else is done.
    """
    with contextlib.ExitStack() as stack:
        rank = stack.enter_context(torch_ready(config))
        stack.enter_context(np.errstate(all="ignore"))  # the learner looks for NaN itself
        updates = config.num_updates // world_size()
        if updates == 0:
            raise ValueError("total_steps is less than one rollout of all ranks together")
        saved = None if resume is None else load_resumable(resume, config, rank)
        pool = EnvPool(MakeEnv(config.env), config.num_envs, config.workers)
        learner = Learner(config, stack.enter_context(pool), rank)
        learner.begin()
        if saved is not None:
            learner.restore(saved)
        run = None
        if rank == 0:
            run = new_run(config) if resume is None else pathlib.Path(resume)
        report = Report(run, learner, updates)
        if saved and not pool.has_state:
            report.say("these environments cannot be saved: going on with new episodes")
        state = learner.state()
        save_checkpoint(run, config, state)  # fails before training does, if it has to
        try:
            for update in range(learner.update, updates):
                began = time.perf_counter()
                learner.collect()  # 1. Collect.
                learner.estimate()  # 2. Value; and how probable each action was.
                batch = learner.buffer.batch(config.gamma, config.gae_lambda)  # 3. Advantage.
                # The rate is full at the first update, and not yet zero at the last.
                rate = config.learning_rate * (1 - config.anneal * update / updates)
                stats = learner.improve(batch, rate)  # 4. Improve.
                row = learner.statistics(batch) | stats | {"learning_rate": rate}
                learner.rows = [*learner.rows, row | report.times(began)]
                state = learner.state()  # from here on, this update cannot be lost
                report.add_last_row()  # 5. Report.
                if learner.update % config.checkpoint_every == 0:
                    report.save(state)
            report.save(state)
            learner.policy.normalizer = learner.obs_norm if config.norm_obs else None
            evaluation = evaluate(learner.policy, config)  # 6. Repeat, done; evaluate.
            report.save({**state, "evaluation": str(evaluation)})
        except BaseException:
            # Where there are other ranks, they may have ended: the last checkpoint has to do.
            if world_size() == 1:
                report.save(state)
                at = f"stopped after update {state['update']} of {updates}"
                if "checkpoint.pt" not in report.failed:
                    report.say(f"{at}; to go on: python thrust.py --resume {run}")
            raise
        if run:
            report.attempt("page.html", lambda: report.say(f"page: {write_page(run)}"))
        report.say(str(evaluation))
        report.say(f"weights: {weights_hash(learner.policy)}")
        if report.failed:
            raise OSError(f"{run}: could not write {' and '.join(sorted(report.failed))}")
        return Result(learner.policy, learner.rows, evaluation, run)


# ==============================================================================================
# 8. Command line
# Needs: import argparse, signal; from typing import NoReturn; parts 1, 2, 3, 4, 5, 6, 7, 9
#
# The flags are generated from Config: a knob added there is a flag here. The exit code is 0
# when all is done, 2 for a wrong flag, 1 for any other failure, 130 after Ctrl-C, 143 after
# SIGTERM.
#
# The last lines are guarded by `if __name__ == "__main__"`, and must be. A worker that is not
# forked from this process begins by importing the file that the user ran; without the guard it
# would begin a training of its own, with workers of its own. Your scripts need the guard too.
# ==============================================================================================


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"thrust: {message} (--help lists the flags)\n")


def build_parser() -> Parser:
    parser = Parser(
        prog="thrust.py",
        usage="python thrust.py [--KNOB VALUE ...] [--resume RUN | --evaluate RUN]\n"
        "       python thrust.py --watch RUN",
        description="Trains a policy with PPO, in a new folder under runs/.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that a flag that was not given leaves no trace
    )
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument("--resume", metavar="RUN", help="go on with the run in the folder RUN")
    runs.add_argument("--evaluate", metavar="RUN", help="evaluate the policy in the folder RUN")
    runs.add_argument("--watch", metavar="RUN", help="write the page of RUN again, and open it")
    show = "with --evaluate: show one episode, or --eval-episodes, in the environment's own way"
    parser.add_argument("--render", action="store_true", help=show)
    for field in dataclasses.fields(Config):
        kind, default = field.metadata["kind"], field.default
        options: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            options["nargs"] = "+"
            default = " ".join(map(str, default))
        help = f"{field.metadata['help']} (default: {default})"
        parser.add_argument("--" + field.name.replace("_", "-"), help=help, **options)
    return parser


def stop(number: int, frame: Any) -> NoReturn:
    """Ends the run at the first Ctrl-C or SIGTERM; later ones must not interrupt its saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(143)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line, and returns the exit code."""
    parser = build_parser()
    knobs = vars(parser.parse_args(argv))
    resume, evaluated = knobs.pop("resume", None), knobs.pop("evaluate", None)
    watched = knobs.pop("watch", None)
    render_mode = "human" if knobs.pop("render", False) else None
    if render_mode and evaluated is None:
        parser.error("--render needs --evaluate RUN")
    if watched is not None and knobs:
        parser.error("--watch RUN takes no other flag")
    if render_mode:
        knobs = {"eval_episodes": 1, **knobs}
    hears = threading.current_thread() is threading.main_thread()  # no other gets signals
    numbers = [signal.SIGINT, signal.SIGTERM] if hears else []
    before = {number: signal.signal(number, stop) for number in numbers}
    for stream in (sys.stdout, sys.stderr):  # a console without ± is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        if watched is not None:
            page = write_page(watched)
            print(f"page: {page}", flush=True)
            open_page(page)
            return 0
        run = resume if evaluated is None else evaluated
        saved = Config() if run is None else load_checkpoint(run)[0]
        try:
            config = dataclasses.replace(saved, **knobs)
        except ValueError as error:
            parser.error(str(error))
        if evaluated is None:
            train(config, resume=resume)
            return 0
        with torch_ready(config):
            policy = load(evaluated).to(config.device)
            print(evaluate(policy, config, render_mode))
        print(f"weights: {weights_hash(policy)}")
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # Of what is raised nowhere in this file, like an environment's KeyError, also where.
        ours = isinstance(error, (ValueError, TypeError, OSError, RuntimeError, MemoryError))
        text = str(error).partition("\n")[0] if ours and str(error) else in_a_line(error)
        print(f"thrust: {text}", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ==============================================================================================
# 9. Page
# Needs: import base64, contextlib, json, math, os, subprocess; parts 1, 2, 3, 4, 5, 6, 7
#
# People would rather look than read a log. So a run leaves a page in its folder: one HTML file
# that loads nothing from anywhere, with the learning curve and, for CartPole, the policy at
# work. The browser itself computes the physics of part 2 and the networks of part 4, 50 steps a
# second, and a slider goes back to what the policy was earlier in training. Beside the page
# lies policy.json: the policy, for programs that have no torch.
#
# Nothing more is said about PPO here, and a reader can stop. The part stands last for that,
# although `train` and `main` call it: a function looks names up when it runs.
#
# The page is one string, with the run's data put in where it says RUN_DATA. Its JavaScript
# keeps the order of operations of `CartPole.step`, so that from one state to the next only sin
# and cos can differ from NumPy's, in the last bit.
# ==============================================================================================

VERSION = "1.0"
ROWS_ON_PAGE = 250  # of the log, at most: a curve is not wider than some hundred pixels

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Thrust</title>
<style>
  :root { color-scheme: light dark;
    --paper: #fff; --ink: #1b1f24; --soft: #5b6570; --line: #d0d6dc; --accent: #0b62c4; }
  @media (prefers-color-scheme: dark) { :root {
    --paper: #14171a; --ink: #e6e9ec; --soft: #9ca6b0; --line: #3d454d; --accent: #6fb2ff; } }
  * { box-sizing: border-box; }
  body { max-width: 46rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; overflow-wrap: anywhere;
    background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
    font-variant-numeric: tabular-nums; }
  h1 { margin: 0; font-size: 2.25rem; line-height: 1.2; letter-spacing: -0.02em; }
  section { margin-top: 2.5rem; }
  p { margin: 0.75rem 0; }
  small, dt { color: var(--soft); font-size: 0.85rem; }
  .row { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: baseline; }
  .row output { margin-left: auto; }
  button, select { padding: 0.5rem 0.9rem; border: 1px solid var(--line); border-radius: 0.4rem;
    background: var(--paper); color: inherit; font: inherit; }
  button:hover, select:hover { border-color: var(--ink); }
  input { width: 100%; height: 2rem; margin: 0; accent-color: var(--accent); }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
  dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
  dd { margin: 0; font-size: 1.1rem; }
  dd::after { content: ""; display: block; width: var(--share, 0); height: 4px;
    background: var(--accent); }
  svg { display: block; width: 100%; overflow: visible; }
  #chart { touch-action: pan-y pinch-zoom; }
  svg text { fill: var(--soft); font-size: 0.8rem;
    paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
  .line { fill: none; stroke: var(--line); vector-effect: non-scaling-stroke; }
  .dashed { stroke: var(--soft); stroke-dasharray: 4 4; }
  .curve { stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
  .dot { fill: var(--accent); stroke: var(--paper); stroke-width: 2; }
  #pole { stroke: var(--accent); stroke-width: 0.07; stroke-linecap: round; }
</style>

<small>Thrust</small>
<h1 id="name"></h1>
<p id="summary"></p>

<section id="live" aria-label="the policy at work" hidden>
  <svg viewBox="-2.6 -1.4 5.2 1.55" role="img" aria-label="a cart with a pole hinged to it">
    <path class="line" d="M-2.6 0H2.6M-2.4 0V.12M0 0V.12M2.4 0V.12"/>
    <g id="cart" fill="var(--ink)">
      <rect x="-.27" y="-.22" width=".54" height=".2" rx=".03"/>
      <path id="push" d="M.35 -.14H.65V-.2L.8 -.12L.65 -.04V-.1H.35Z"/>
      <path class="line dashed" d="M-.234 -1.32L0 -.22L.234 -1.32"/>
      <g transform="translate(0 -.22)"><line id="pole" y2="-1"/></g>
    </g>
  </svg>
  <p class="row">
    <button id="left">← Push</button><button id="right">Push →</button>
    <button id="pause">Pause</button><button id="step">Step</button>
    <button id="again">Start over</button><output id="status"></output>
  </p>
  <label for="policy">The policy after <output id="age"></output> steps</label>
  <input id="policy" type="range" min="0">
  <dl id="numbers"></dl>
  <p><small>← and → push: 40 N for one step, on top of the policy's own 10 N. Space pauses,
    S steps, R starts over. The game is lost beyond the dashed lines, at 12°, or the ends of the
    track, at 2.4 m. The policy takes the more probable action; the value is how much discounted
    reward it expects from here. Dots on the axis below: where the slider can go.</small></p>
</section>

<section id="curve" aria-label="learning curve" hidden>
  <p class="row">
    <select id="column" aria-label="quantity"></select><output id="at"></output>
  </p>
  <svg id="chart" height="300" tabindex="0" role="slider" aria-label="learning curve"></svg>
  <p><small id="meaning"></small></p>
  <dl id="facts"></dl>
</section>

<script>
"use strict";
const run = RUN_DATA, {log, physics: P} = run, last = log.steps.length - 1;
const $ = (id) => document.getElementById(id);
const words = (name) => name.replaceAll("_", " ");
const format = (x) => x === null ? "none yet" : x.toLocaleString("en",
  Math.abs(x) >= 100 ? {maximumFractionDigits: 1} : {maximumSignificantDigits: 4});
const list = (id, pairs) => $(id).innerHTML = pairs.map(([term, text]) =>
  `<div><dt>${term}</dt><dd>${text}</dd></div>`).join("");

// One step under `force` newtons: CartPole.step, operation for operation.
function step([x, speed, angle, spin], force) {
  const sin = Math.sin(angle), cos = Math.cos(angle);
  const temp = (spin * spin * P.POLE_MOMENT * sin + force) / P.TOTAL_MASS;
  const turn = (sin * P.GRAVITY - cos * temp)
    / ((P.FOUR_THIRDS - cos * cos * P.POLE_MASS / P.TOTAL_MASS) * P.HALF_LENGTH);
  const pull = temp - turn * P.POLE_MOMENT * cos / P.TOTAL_MASS;
  return [x + speed * P.TAU, speed + pull * P.TAU, angle + spin * P.TAU, spin + turn * P.TAU];
}
const fallen = ([x, , angle]) => Math.abs(x) > P.X_LIMIT || Math.abs(angle) > P.ANGLE_LIMIT;

// A network whose layers' weights and biases begin at `at`: [its outputs, where they end].
function forward(weights, at, sizes, input) {
  for (let layer = 1; layer < sizes.length; layer++) {
    const inputs = input.length, outputs = new Float64Array(sizes[layer]);
    const biases = at + inputs * outputs.length;
    for (let i = 0; i < outputs.length; i++) {
      let sum = weights[biases + i];
      for (let k = 0; k < inputs; k++) sum += weights[at++] * input[k];
      outputs[i] = layer < sizes.length - 1 ? Math.tanh(sum) : sum;
    }
    input = outputs;
    at += outputs.length;
  }
  return [input, at];
}
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt());
const floats = (text) => new Float32Array(bytes(text).buffer);  // as in policy.parameters()
const policies = run.policies.map((p) => ({...p, weights: floats(p.weights)}));

// What a policy makes of a state. The softmax of two logits needs only their difference.
function think({weights, mean, std}, state) {
  const scaled = state.map((x, i) => (Math.fround(x) - mean[i]) / std[i]);
  const obs = scaled.map((x) => Math.max(-10, Math.min(10, x)));
  const [logits, end] = forward(weights, 0, [4, ...run.hidden, 2], obs);
  const [[value]] = forward(weights, end, [4, ...run.hidden, 1], obs);
  const right = 1 / (1 + Math.exp(logits[0] - logits[1]));
  return {probabilities: [1 - right, right], value, action: logits[1] > logits[0] ? 1 : 0};
}

// The pole, live. `behind`: by how many steps, and what part of one, it lags behind the clock.
const live = {running: !matchMedia("(prefers-reduced-motion: reduce)").matches, behind: 0};
function begin() {
  const state = [0, 0, 0, 0].map(() => Math.random() * 0.1 - 0.05);
  const policy = policies[$("policy").value], thought = think(policy, state);
  Object.assign(live, {policy, state, thought, before: state, steps: 0, push: 0, until: 0});
  live.rest = 50;
  draw();
}
function advance() {
  live.before = live.state;
  if (fallen(live.state)) {  // to stay down for a second, or until somebody asks for a step
    if (!live.running || --live.rest < 0) begin();
    return;
  }
  const force = P.FORCES[live.thought.action] + live.push * 40;
  live.state = step(live.state, force);
  live.thought = think(live.policy, live.state);
  live.steps += 1;
  live.push = 0;
}
function draw(share = 1) {  // of the way from the state before to this one
  const {state, before, thought: {probabilities, value}} = live;
  const [x, , angle] = state.map((now, i) => before[i] + share * (now - before[i]));
  $("cart").setAttribute("transform", `translate(${x})`);
  $("pole").setAttribute("transform", `rotate(${angle * 180 / Math.PI})`);
  const arrow = live.push || live.steps < live.until ? live.arrow : 0;
  $("push").setAttribute("transform", `scale(${arrow} 1)`);
  if (live.running && live.steps % 5 && !fallen(state)) return;  // numbers ten times a second
  $("numbers").querySelectorAll("dd").forEach((dd, i) => {
    dd.textContent = [...state, ...probabilities, value][i].toFixed(i < 6 ? 3 : 1);
    dd.style.setProperty("--share", `${100 * (probabilities[i - 4] ?? 0)}%`);
  });
  $("status").textContent = (fallen(state) ? "fell at step " : "step ") + format(live.steps);
  $("age").textContent = format(live.policy.steps);
}
function frame(now) {
  live.behind = Math.min(live.behind + (now - live.clock) / 1000 / P.TAU, 10);
  live.clock = now;
  for (; live.behind >= 1; live.behind--) advance();
  draw(live.behind);
  live.frame = requestAnimationFrame(frame);
}
function play(running) {
  cancelAnimationFrame(live.frame);
  Object.assign(live, {running, clock: performance.now()});
  if (running) live.frame = requestAnimationFrame(frame);
  $("pause").textContent = running ? "Pause" : "Play";
  draw();
}
function push(arrow) {
  Object.assign(live, {push: live.push + arrow, arrow, until: live.steps + 15});
  if (!live.running) draw();
}
const buttons = {
  left: () => push(-1), right: () => push(1), pause: () => play(!live.running), again: begin,
  step: () => { play(false); advance(); draw(); },
};
const keys = {ArrowLeft: "left", ArrowRight: "right", " ": "pause", s: "step", r: "again"};
function press(event) {
  const own = event.key === " " ? "button, input, select" : "input, select, #chart";
  const taken = event.target.closest(own) || event.ctrlKey || event.metaKey || event.altKey;
  if (taken || !(event.key in keys)) return;
  event.preventDefault();
  if (!event.repeat) buttons[keys[event.key]]();
}

// The learning curve: a column of the log against environment steps, and the row to read.
let row = last;
function ticks(low, high, most) {  // round numbers, from `low` or below to `high` or above
  const raw = (high - low || 1) / most, power = 10 ** Math.floor(Math.log10(raw));
  const gap = power * ([1, 2, 5].find((f) => f * power >= raw) ?? 10);
  const first = Math.floor(low / gap), count = Math.max(1, Math.ceil(high / gap) - first);
  return Array.from({length: count + 1}, (_, i) => (first + i) * gap);
}
function chart() {
  const column = $("column").value, values = log[column], steps = log.steps, end = steps[last];
  const bars = column === "mean_return" ? run.bars : [], right = $("chart").clientWidth - 16;
  const seen = [0, ...bars.map(([bar]) => bar), ...values.filter((v) => v !== null)];
  const grid = ticks(Math.min(...seen), Math.max(...seen), 6);
  const x = (s) => 44 + s / end * (right - 44);
  const y = (v) => 256 - (v - grid[0]) / (grid.at(-1) - grid[0]) * 226;
  const text = (x, y, anchor, what) =>
    `<text x="${x}" y="${y}" text-anchor="${anchor}">${what}</text>`;
  const rule = (v, kind) => `<path class="line ${kind}" d="M44 ${y(v)}H${right}"/>`;
  const dot = (x, y, r) => `<circle class="dot" cx="${x}" cy="${y}" r="${r}"/>`;
  const short = (v) => v.toLocaleString("en", {notation: "compact", maximumFractionDigits: 4});
  const path = values.map((v, i) => v === null ? ""  // a gap
    : `${(values[i - 1] ?? null) === null ? "M" : "L"}${x(steps[i])} ${y(v)}`).join("");
  const name = ([bar, does]) => values[last] < bar  // where the curve is not
    ? text(52, y(bar) - 6, "start", `${bar} ${does}`)
    : text(right - 8, y(bar) + 16, "end", `${bar} ${does}`);
  $("chart").innerHTML = [
    text(0, 12, "start", words(column)), text(right, 298, "end", "environment steps"),
    ...grid.map((v) => rule(v, "") + text(36, y(v) + 4, "end", short(v))),
    ...ticks(0, end, right / 80).filter((s) => s <= end)
      .map((s) => text(x(s), 278, "middle", short(s))),
    ...bars.map((bar) => rule(bar[0], "dashed") + name(bar)),
    `<path class="line" d="M${x(steps[row])} 30V256"/><path class="line curve" d="${path}"/>`,
    ...policies.map((p) => dot(x(p.steps), 256, p === live.policy ? 7 : 3.5)),
    values[row] === null ? "" : dot(x(steps[row]), y(values[row]), 5),
  ].join("");
  $("at").textContent = `${format(steps[row])} steps: ${format(values[row])}`;
  $("meaning").textContent = `${words(column)}: ${run.meanings[column]}`;
  const told = {min: 0, max: last, now: row, text: $("at").textContent};
  for (const key in told) $("chart").setAttribute(`aria-value${key}`, told[key]);
}
function point(event) {  // reads the row nearest to the pointer
  const box = $("chart").getBoundingClientRect();
  const steps = (event.clientX - box.left - 44) / (box.width - 60) * log.steps[last];
  const far = log.steps.map((s) => Math.abs(s - steps));
  row = far.indexOf(Math.min(...far));
  chart();
}
function move(event) {
  const by = {ArrowLeft: -1, ArrowRight: 1, Home: -last, End: last}[event.key];
  if (!by) return;
  event.preventDefault();
  row = Math.max(0, Math.min(last, row + by));
  chart();
}

document.title = `${run.name} · Thrust`;
$("name").textContent = run.name;
$("summary").textContent = run.summary;
if (policies.length) {
  list("numbers", ["position, m", "velocity, m/s", "angle, rad", "angular velocity, rad/s",
    "probability of left", "probability of right", "value"].map((term) => [term, ""]));
  for (const id in buttons) $(id).onclick = buttons[id];
  $("policy").max = $("policy").value = policies.length - 1;
  $("policy").oninput = () => { begin(); chart(); };
  document.onkeydown = press;
  $("live").hidden = false;
  begin();
  play(live.running);
}
if (last >= 0) {
  const columns = Object.keys(log).filter((name) => name !== "steps" && name !== "update");
  for (const name of columns) $("column").add(new Option(words(name), name));
  $("column").value = "mean_return";
  $("column").onchange = chart;
  $("chart").onpointermove = $("chart").onpointerdown = point;
  $("chart").onkeydown = move;
  list("facts", ["steps", "update", "episodes", "mean_return", "mean_length", "seconds"]
    .map((name) => [words(name), format(log[name][last])]));
  $("curve").hidden = false;
  new ResizeObserver(chart).observe($("chart"));
}
window.thrust = {run, policies, live, step, fallen, think, begin, advance};
</script>
</html>
"""


def plain(value: Any) -> Any:
    """As JSON can hold it: arrays and tuples become lists; NaN and infinity become None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def policy_as_data(policy: ActorCritic) -> dict[str, Any]:
    """The networks, and what surrounds them. Each layer computes activation(weight · x + bias),
    the first from an observation that is flat, or one-hot if Discrete, and, if `normalisation`
    is there, (x - mean) / std kept within ± clip. The actor ends in logits or, for Box, means.
    """

    def layers(network: MLP) -> list[dict[str, Any]]:
        parameters = list(network.parameters())
        activations = ["tanh"] * (len(parameters) // 2 - 1) + [None]
        triples = zip(parameters[::2], parameters[1::2], activations)
        return [{"weight": w, "bias": b, "activation": f} for w, b, f in triples]

    def described(space: Any) -> dict[str, Any]:
        names = ("shape", "n", "nvec", "start", "low", "high")
        has = {name: getattr(space, name) for name in names if hasattr(space, name)}
        return {"kind": type(space).__name__, **has}

    moments = policy.normalizer and dict(zip(("mean", "std"), policy.normalizer.moments()))
    return {
        "observation": described(policy.observation_space),
        "normalisation": moments and {**moments, "clip": 10},
        "actor": layers(policy.actor),
        "critic": layers(policy.critic),
        "action": described(policy.action_space),
        "log_std": getattr(policy, "log_std", None),
    }


def write_page(run: str | pathlib.Path) -> pathlib.Path:
    """Writes page.html and policy.json into a run's folder, finished or not, from what its
    checkpoint holds; returns the page's path. ValueError if there is no checkpoint."""
    config, ranks = load_checkpoint(run)
    run, state, policy = pathlib.Path(run), ranks[0], load(run)
    rows, weights = state["rows"], state["tensors"]["weights"].numpy()
    bars = [(bar, f"solves {name}") for bar, name in BARS.items()]
    if config.env != "CartPole":  # if it is one of Gymnasium's, that is imported by now
        registry = getattr(sys.modules.get("gymnasium"), "registry", {})
        bar = getattr(registry.get(config.env), "reward_threshold", None)
        bars = [] if bar is None else [(bar, f"solves {config.env}")]
    places = np.linspace(0, len(rows) - 1, min(len(rows), ROWS_ON_PAGE)).astype(int)
    at = f"update {state['update']:,} of {config.num_updates // len(ranks):,}"
    data = {
        "name": f"{config.env}, seed {config.seed}",
        "summary": str(state.get("evaluation", f"not finished: {at}")).capitalize(),
        "log": {name: [rows[i][name] for i in places] for name in COLUMNS},
        "meanings": COLUMNS,
        "bars": bars,
        "physics": {name: x for name, x in vars(CartPole).items() if name.isupper()},
        "hidden": config.hidden,
        "policies": [
            {**s, "weights": base64.b64encode(s["weights"].numpy().tobytes()).decode()}
            for s in state["snapshots"]
        ],
    }
    origin = {
        "thrust": VERSION,
        "config": dataclasses.asdict(config),
        "steps": rows[-1]["steps"] if rows else 0,
        "weights": hashlib.sha256(weights.tobytes()).hexdigest(),
    }
    texts = {
        "policy.json": json.dumps(plain({**policy_as_data(policy), "provenance": origin})),
        # In a string, < is as good as \u003c, but </script> would end the script.
        "page.html": PAGE.replace("RUN_DATA", json.dumps(plain(data)).replace("<", "\\u003c")),
    }
    for name, text in texts.items():
        replace(run / name, text.encode())
    return run / "page.html"


def open_page(page: pathlib.Path) -> None:
    """Shows the page in the user's browser, if there is one. Browsers may print, and on a
    machine without a screen wait for keys: so in another process, in silence, for ten seconds.
    """
    command = [sys.executable, "-m", "webbrowser", page.resolve().as_uri()]
    with contextlib.suppress(subprocess.TimeoutExpired), open(os.devnull, "r+") as nothing:
        subprocess.run(command, stdin=nothing, stdout=nothing, stderr=nothing, timeout=10)


if __name__ == "__main__":
    sys.exit(main())
