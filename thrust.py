# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24,<2.5", "torch>=1.13,<=2.13.0"]
# ///
# Thrust 2.0, MIT licence, copyright 2026 the Thrust authors
"""Thrust: PPO in one file, to be read from top to bottom, copied from, and run.

PPO, Proximal Policy Optimization, trains a neural network to act. It lets the network play,
works out which of its actions led to more reward than expected, and makes those a little more
probable. Only a little, because what was learned from one way of playing is no longer true once
the way of playing has changed.

This is not a framework: no recurrent networks, replay memory, self-play, hyperparameter sweeps,
callbacks or plugins. It needs NumPy and PyTorch; Gymnasium, if it is there, has more games.

    python thrust.py           train on CartPole, a pole balanced on a cart, for a few seconds
    python thrust.py --help    every knob and its default

PPO in six steps (words and letters below); `PPO.update`, in part 5, has the same numbers:

    1. Collect.    Let the policy play T steps in N environments at once; keep all of it.
    2. Value.      Ask a second network, the critic, how much reward it expects from each state
                   onwards.
    3. Advantage.  Work out, for every action, how much better it went than expected.
    4. Improve.    Go over the data a few times, in small shuffled batches: make actions that
                   went better than expected more probable and the others less, but stop pushing
                   where a probability has moved far enough; and correct the critic.
    5. Measure.    How well did the policy play, and was the update healthy?
    6. Repeat.     The data is thrown away: the policy that played it no longer exists.

Why "than expected"? In a good state much reward follows whatever one does, in a bad one little;
only the difference from what was expected tells something about the action.

Parts: 1 Config, 2 CartPole, 3 ActorCritic, 4 Rollout, 5 PPO. With these five, PPO is complete.
Then come 6 EnvPool (worker processes), 7 Runs (log, checkpoints), 8 Command line, 9 Page. Each
uses only what stands above it (but 7 also uses 9). "Needs", in a part's heading, is for those
who copy it alone: what to import, and which other parts, whose imports then come along.

Words. An *environment* is a game. What the player sees of its *state* s is an *observation*, or
obs; what it does is an *action* a; what it is paid for one step is a *reward* r. These, and the
observation that follows, make one *transition*. An *episode* is one game from start to end; a
*rollout* is some number of steps, wherever it begins or ends. The *policy* π(a|s) gives each
action a probability, and the player draws from those. The *return* is the sum of an episode's
rewards; the *value* of a state is the sum of rewards that the policy can expect from there,
later ones counting less; the *advantage* of an action is how much more than that it brings. An
*epoch* is one pass over a rollout, in pieces called *minibatches*. A *rank* is one of several
processes that train together; usually there is one.

    N  environments played side by side         γ  discount: a reward k steps away counts γᵏ
    T  steps of each of them in a rollout       λ  how much advantages rely on rewards seen,
    B  = T·N, the transitions in a rollout         rather than on expected ones (part 4)
    M  transitions in a minibatch               ε  how far a probability is pushed (part 5)
    O  numbers in an observation                δ  one step's surprise (part 4)
    A  actions to choose from                   V, Â  estimated value and advantage

Papers: PPO, arXiv:1707.06347. GAE, arXiv:1506.02438. What matters in practice,
arXiv:2006.05990. Time limits, arXiv:1712.00378. Adam, arXiv:1412.6980. Orthogonal weights,
arXiv:1312.6120."""

import argparse
import base64
import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import io
import json
import math
import multiprocessing as mp
import os
import pathlib
import pkgutil
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections import deque, namedtuple
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

# ==============================================================================================
# 1. Config
# ==============================================================================================
# Needs: import dataclasses, math; from typing import Any
#
# Every number that a user may want to turn stands here once: its default, the text that --help
# prints, the lowest and the highest value. Flags and config.json are made from this class.
#
# The defaults are for CartPole, and were searched for with other seeds than those whose results
# README reports; settings for other games stand there. N = 64 and M = 512 are large for so
# small a game: at these sizes a call into torch costs as much as the arithmetic that it does,
# so large batches are cheap. The learning rate is twenty times the common 3e-4: CartPole can be
# learned in large steps, as long as the rate then falls towards zero for careful ones. Infinity
# is allowed where it means "no limit"; elsewhere a bound of 1e30 refuses it.


def knob(default: Any, help: str, low: Any = None, high: float = math.inf) -> Any:
    """A field of Config; `low` and `high` bound a number, and are themselves allowed."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (low, high)})


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Raises ValueError if one breaks its rule."""

    env: str = knob("CartPole", "CartPole, an id that Gymnasium knows, or module:callable")
    seed: int = knob(0, "the number that every random draw is derived from", 0)
    num_envs: int = knob(64, "environments of each rank (N); many: little noise", 1, 10**6)
    num_steps: int = knob(32, "steps per rollout (T); few: trusts the critic more", 1, 10**6)
    total_steps: int = knob(200_000, "steps to train for, of all environments and ranks", 1)
    minibatch_size: int = knob(512, "transitions per gradient step, at most (M)", 3)
    epochs: int = knob(3, "passes over a rollout; many: its data no longer fits the policy", 1)
    learning_rate: float = knob(6e-3, "Adam's; too large: what was learned is lost", 0, 1e30)
    anneal: bool = knob(True, "lower the learning rate, update by update, towards 0")
    gamma: float = knob(0.98, "discount γ; about the next 1/(1-γ) steps count", 0, 1)
    gae_lambda: float = knob(0.95, "λ; 0: trust expected rewards, 1: only rewards seen", 0, 1)
    clip: float = knob(0.2, "ε; a probability moved by this share is pushed no further", 0, 1)
    ent_coef: float = knob(0.0, "weight of entropy, a reward for being undecided", 0, 1e30)
    vf_coef: float = knob(0.5, "weight of the value function's squared error", 0, 1e30)
    max_grad_norm: float = knob(0.5, "longer gradients are scaled down to this length", 0)
    target_kl: float = knob(math.inf, "end an update at this KL, such as 0.02; inf: never", 0)
    norm_obs: bool = knob(False, "shift and scale observations by their mean and deviation")
    norm_reward: bool = knob(False, "divide rewards by the deviation of their discounted sums")
    hidden: tuple = knob((64, 64), "widths of each network's hidden layers", 1, 10**5)
    device: str = knob("cpu", "where the networks learn: cpu or cuda")
    threads: int = knob(1, "torch's threads; more would slow down such small networks", 1, 1024)
    workers: int = knob(0, "processes that step the environments; 0: this process", 0)
    timeout: float = knob(60.0, "seconds that a worker may take for one step", 0)
    runs: str = knob("runs", "folder in which runs are kept")
    checkpoint_seconds: float = knob(2.0, "seconds between checkpoints", 0)
    eval_episodes: int = knob(100, "episodes played after training, side by side", 1, 10**6)

    @property
    def batch_size(self) -> int:
        """B: the transitions in one rollout of one rank."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Rollouts in total_steps; what is left over is not played. (Ranks share them.)"""
        return self.total_steps // self.batch_size

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value, kind = field.name, getattr(self, field.name), type(field.default)
            if kind is tuple and isinstance(value, list):  # from flags or JSON; self is frozen
                object.__setattr__(self, name, value := tuple(value))
            low, high = field.metadata["range"]
            # An int will do for a float, but not a bool, although Python counts it as an int.
            allowed = (int, float) if kind is float else kind
            fits = isinstance(value, allowed) and isinstance(value, bool) == (kind is bool)
            if fits and low is not None:  # NaN is refused: every comparison with it is false
                each = value if kind is tuple else [value]  # of `hidden`, every width
                fits = all((kind is float or type(x) is int) and low <= x <= high for x in each)
            if not fits:
                rule = "tuple of int" if kind is tuple else kind.__name__
                rule += "" if low is None else f", from {low} to {high}"
                raise ValueError(f"{name} must be of type {rule}; got {value!r}")
        if self.workers > self.num_envs:
            raise ValueError(f"workers must be at most {self.num_envs}; got {self.workers}")
        if self.batch_size < 2:
            raise ValueError("num_envs * num_steps must be at least 2: advantages are compared")
        if self.num_updates < 1:
            one = f"one rollout, num_envs * num_steps = {self.batch_size}"
            raise ValueError(f"total_steps must be at least {one}; got {self.total_steps}")


# ==============================================================================================
# 2. CartPole
# ==============================================================================================
# Needs: import math, numpy as np; from collections import namedtuple
#
# A pole stands on a cart, hinged at its foot. At every step, 50 times a second, the player
# pushes the cart with a fixed force to the left (action 0) or to the right (action 1), and is
# paid 1. The game is lost if the pole leans more than 12 degrees or the cart leaves the track.
#
# Why N poles at once? A step makes about fifty NumPy calls, and each costs half a microsecond
# before it touches a number. N poles in one array pay that once, and not N times.
#
# An episode can end in two ways, and the difference matters in part 4:
#
#   terminated   the game itself is over: the pole fell. No reward can follow from here.
#   truncated    the game was cut off: here, after 500 steps. The pole still stands, and more
#                reward would have followed; it is just not going to be played.
#
# Both flags belong to the step that ended the episode, not to the one after. The environment
# itself begins the next game, within that same step (Gymnasium's name for it is SAME_STEP), so
# the batch never has holes: `obs` is then the first observation of the next game, and the last
# one of the game that ended is in `info["final_obs"]`, in the same row.
#
# Gymnasium is the library in which most environments are published. The methods are those of
# its vector environments, so that any of them can take CartPole's place. The numbers are
# Gymnasium's as well, bit for bit, and so is the order of operations: a tidier formula would
# round differently, and near balance a last-bit difference soon grows into another game.


# Spaces say what observations and actions look like. Their attributes are those of Gymnasium's:
# a Box holds arrays of numbers from low to high, a Discrete n whole numbers, from start on.
Box = namedtuple("Box", "low high shape dtype", defaults=[np.float32])
Discrete = namedtuple("Discrete", "n start shape dtype", defaults=[0, (), np.int64])


class CartPole:
    """N independent CartPoles, with the interface of a Gymnasium vector environment.

    Observations are float32 (N, 4): the cart's position x (m) and velocity ẋ (m/s), the pole's
    angle θ (rad, clockwise) and angular velocity θ̇ (rad/s). Actions are integers (N,), 0 or 1.
    Rewards are float64 (N,), always 1. What `reset` and `step` return is never overwritten.

    Bit for bit Gymnasium's SyncVectorEnv of CartPole-v1 in SAME_STEP mode. The equations are
    those of Barto, Sutton and Anderson (1983), without friction, as corrected by Florian
    (2007)."""

    # 0-d arrays: NumPy takes longer to convert a Python number than to multiply 64 numbers
    GRAVITY = np.array(9.8)  # m/s²
    POLE_MASS = np.array(0.1)  # kg
    TOTAL_MASS = np.array(0.1 + 1.0)  # kg, with the cart
    FOUR_THIRDS = np.array(4.0 / 3.0)  # a rod 2l long, turned at its end: 4/3·m·l²
    HALF_LENGTH = np.array(0.5)  # m, from the hinge to the pole's centre of mass
    POLE_MOMENT = np.array(0.1 * 0.5)  # kg·m, mass times half length
    FORCES = np.array([-10.0, 10.0])  # newtons, of action 0 and action 1
    TAU = np.array(0.02)  # s from one step to the next
    X_LIMIT = np.array(2.4)  # m to either side
    ANGLE_LIMIT = np.array(12 * 2 * math.pi / 360)  # rad to either side
    ONE = np.array(1)  # step, or episode
    BLOCK = np.array(128)  # start states that are drawn at a time, for each environment

    metadata = {"autoreset_mode": "SameStep"}

    def __init__(self, num_envs: int, max_episode_steps: int = 500):
        self.num_envs, self.max_episode_steps = num_envs, np.array(max_episode_steps)
        # Twice the limits, as Gymnasium has it
        high = np.array([2 * self.X_LIMIT, np.inf, 2 * self.ANGLE_LIMIT, np.inf], np.float32)
        self.single_observation_space = Box(-high, high, high.shape)
        self.single_action_space = Discrete(2)
        self._state = np.zeros((4, num_envs))  # rows: x, ẋ, θ, θ̇
        self._reward = np.ones(num_envs)
        # Steps of the running episodes, episodes begun, and seeds
        self._steps, self._episodes, self._seeds = np.zeros((3, num_envs), np.int64)
        self._starts = np.zeros((num_envs * self.BLOCK, 4))  # a block for each environment
        self.reset(seed=int(np.random.SeedSequence().generate_state(1)[0]))  # any seed

    def reset(self, *, seed: int | None = None, options: None = None):
        """Begins an episode everywhere: (obs, {}). Environment i draws its start states from a
        generator seeded seed + i; without a seed, each takes its next start state."""
        if seed is not None:
            self._seeds[:], self._episodes[:] = np.arange(self.num_envs) + seed, 0
            self._make_generators()
        self._begin_episodes(np.arange(self.num_envs))
        return self._observe(), {}

    def step(self, actions: np.ndarray):
        """Pushes every cart once: (obs, reward, terminated, truncated, info). `info` is empty
        or, where episodes ended, has "final_obs": float32 (N, 4), of which only those rows
        count. Raises ValueError unless actions are (N,) integers 0 or 1."""
        actions = np.asarray(actions)
        whole = actions.shape == (self.num_envs,) and actions.dtype.kind in "iu"
        # One call will do: the bitwise or of all is 0 or 1 if and only if each of them is.
        if not whole or np.bitwise_or.reduce(actions) not in (0, 1):
            raise ValueError(f"actions must be {self.num_envs} ints, 0 or 1; got {actions!r}")

        x, x_dot, theta, theta_dot = self._state  # (N,) each, and views: += changes the state
        sin, cos = np.sin(theta), np.cos(theta)
        # temp = (F + m·l·θ̇²·sin θ) / m_total, with the pole's mass m and half its length l
        force = self.FORCES[actions] + self.POLE_MOMENT * np.square(theta_dot) * sin
        temp = force / self.TOTAL_MASS
        # θ̈ = (g·sin θ - cos θ·temp) / (l·(4/3 - m·cos²θ / m_total))
        inertia = self.FOUR_THIRDS - self.POLE_MASS * np.square(cos) / self.TOTAL_MASS
        theta_acc = (self.GRAVITY * sin - cos * temp) / (self.HALF_LENGTH * inertia)
        # ẍ = temp - m·l·θ̈·cos θ / m_total
        x_acc = temp - self.POLE_MOMENT * theta_acc * cos / self.TOTAL_MASS
        # Euler's method: a position moves by τ·velocity, then a velocity by τ·acceleration
        x += self.TAU * x_dot
        x_dot += self.TAU * x_acc
        theta += self.TAU * theta_dot
        theta_dot += self.TAU * theta_acc

        self._steps += self.ONE
        terminated = (np.abs(x) > self.X_LIMIT) | (np.abs(theta) > self.ANGLE_LIMIT)
        truncated = self._steps >= self.max_episode_steps
        obs, info = self._observe(), {}
        ended = (terminated | truncated).nonzero()[0]
        if len(ended):
            info["final_obs"] = obs
            self._begin_episodes(ended)
            obs = self._observe()
        return obs, self._reward.copy(), terminated, truncated, info

    def close(self):
        """There is nothing to release."""

    def state(self) -> dict[str, np.ndarray]:
        """Copies of all that the future depends on, N rows each. (Not Gymnasium's: with it, a
        run can be resumed exactly.)"""
        arrays = {"state": self._state.T, "steps": self._steps}
        arrays |= {"episodes": self._episodes, "seeds": self._seeds}
        return {name: array.copy() for name, array in arrays.items()}

    def set_state(self, state: dict[str, np.ndarray]):
        """Goes on from what `state` returned, in this or in another CartPole of N poles."""
        self._state.T[:], self._steps[:] = state["state"], state["steps"]
        self._episodes[:], self._seeds[:] = state["episodes"], state["seeds"]
        self._make_generators()
        # Blocks that are in use; the next episode will draw the others
        self._draw_starts((self._episodes % self.BLOCK > 0).nonzero()[0])

    def _observe(self):
        return self._state.astype(np.float32).T  # (N, 4)

    def _begin_episodes(self, rows):  # (k,) of the environments
        episodes = self._episodes[rows]
        place = episodes % self.BLOCK
        if np.count_nonzero(place) < len(place):
            self._draw_starts(rows[place == 0])
        self._state.T[rows] = self._starts.take(rows * self.BLOCK + place, axis=0)
        self._episodes[rows], self._steps[rows] = episodes + self.ONE, 0

    def _make_generators(self):
        """One each, at the start of its current block; so `state` need not hold them."""
        done = self._episodes // self.BLOCK * self.BLOCK  # episodes of earlier blocks
        bits = [np.random.PCG64(int(s)).advance(4 * int(d)) for s, d in zip(self._seeds, done)]
        self._generators = [np.random.Generator(each) for each in bits]

    def _draw_starts(self, rows):
        """Draws the next block of start states: four numbers within ±0.05 each."""
        for i in rows:
            starts = self._generators[i].uniform(-0.05, 0.05, (self.BLOCK, 4))
            self._starts[i * self.BLOCK : (i + 1) * self.BLOCK] = starts


# ==============================================================================================
# 3. ActorCritic
# ==============================================================================================
# Needs: import functools, math, numpy as np, torch; from torch import nn
#
# Two networks look at the same observation. The *actor* is the policy: it gives each action a
# probability, and is all that is needed to play. (Its A outputs are called logits; softmax,
# exp(logit) divided by the sum of all exp(logit), makes them probabilities.) The *critic*
# estimates the value: how much reward, later rewards discounted, the policy will still collect
# from here. It is needed only to train, because "better than expected" takes somebody who
# expects. They share no weights: the critic's gradients are large, and would shape shared
# layers for predicting rewards, at the cost of the actor. On CartPole, shared hidden layers
# needed about twice the steps.
#
# Initial weights are orthogonal: no direction that gets through a layer is stretched more than
# another, so signals neither explode nor vanish at the start. The gains, by which they are then
# multiplied, are customary in PPO: √2 in hidden layers, 1 for the critic's output, and 0.01 for
# the actor's, so that all actions start out almost equally probable, and chance does not decide
# early what is explored.
#
# Other kinds of action. An action may also consist of n independent choices (MultiDiscrete);
# one choice is n = 1. Each has its own logits and, as they are independent, their
# log-probabilities add up. For real numbers (Box), each output is the mean of a normal
# distribution, whose standard deviation σ is a parameter that does not depend on the
# observation and begins at 1. A draw may lie outside the box: `to_env` clips it for the
# environment, but the loss sees it as drawn, because log π is that of the draw.


class MLP(nn.Sequential):
    """Layers, called as plain methods. nn.Module's own __call__ looks for hooks first, which
    for a few rows takes as long as a layer's arithmetic. (If you need hooks, as spectral_norm
    does, take an nn.Sequential of new layers.)"""

    def __call__(self, x):
        for layer in self:
            x = layer.forward(x)
        return x


def mlp(sizes, gain):
    """mlp([4, 64, 64, 2], ...) is 4 → 64 → tanh → 64 → tanh → 2; `gain` is the last layer's."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layer = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
        nn.init.zeros_(layer.bias)
        # At hand, because nn.Module searches for both by name, at every call
        at_hand = {"weight": layer.weight, "bias": layer.bias}
        layer.forward = functools.partial(nn.functional.linear, **at_hand)
        layers += [layer, nn.Tanh()]
    nn.init.orthogonal_(layer.weight, gain)  # the last one again, with its own gain
    return MLP(*layers[:-1])


class Normalizer(nn.Module):
    """Shifts and scales K numbers by the mean and standard deviation of all rows counted in so
    far, and cuts them off at ±10. These are measured, not learned, in buffers saved with the
    weights; in float64, because an offset may be far larger than the deviation."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))

    def count_in(self, count, mean, var):
        """Counts in `count` rows with this mean and variance, (K,) each, by the formula of
        Chan, Golub and LeVeque (1979). (E[x²] - mean² loses its digits to a large offset.)"""
        total, shift = self.count + count, mean - self.mean
        self.var = (self.count * self.var + count * var) / total
        self.var += self.count * count * shift.square() / total.square()
        self.mean, self.count = self.mean + shift * count / total, total

    def std(self):
        return self.var.clamp(min=1e-8).sqrt()

    def forward(self, x):  # (k, K) → float32 (k, K)
        return ((x.to(self.mean) - self.mean) / self.std()).clamp(-10, 10).float()


class ActorCritic(nn.Module):
    """A policy, and the value of the states that it visits.

    observation_space  Box of any shape (flattened to O numbers; set norm_obs unless their
                       size is about 1) or Discrete (one-hot, O = n)
    action_space       Discrete, MultiDiscrete or Box
    hidden             widths of the hidden layers, of the actor's and of the critic's
    seed               of the initial weights; torch's global generator is left as it was
    norm_obs           normalise observations first (part 5 measures their mean and deviation)

    Observations are arrays or tensors, (k, *observation shape), for any k but 0. Actions are
    tensors, (k, *action shape): int64 counted from 0, or float32 not clipped; `to_env` makes
    them fit for the environment. Raises ValueError for other spaces and other shapes."""

    def __init__(
        self, observation_space, action_space, hidden=(64, 64), *, seed=0, norm_obs=False
    ):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        # Kinds are told apart by name, so that Gymnasium's spaces will do as well as part 2's.
        kind, action_kind = type(observation_space).__name__, type(action_space).__name__
        if kind not in ("Box", "Discrete") or (norm_obs and kind != "Box"):
            allowed = "Box with norm_obs" if norm_obs else "Box or Discrete"
            raise ValueError(f"observations cannot be {observation_space}, only {allowed}")
        if action_kind not in ("Discrete", "MultiDiscrete", "Box"):
            allowed = "Discrete, MultiDiscrete or Box"
            raise ValueError(f"actions cannot be {action_space}, only {allowed}")
        self.one_hot, self.continuous = kind == "Discrete", action_kind == "Box"
        inputs = observation_space.n if self.one_hot else math.prod(observation_space.shape)
        if self.continuous:
            outputs = math.prod(action_space.shape)
            self.log_std = nn.Parameter(torch.zeros(outputs))
        else:
            # n choices have A logits each; here A is what the widest of them needs. The surplus
            # logits of a narrower one get probability 0 (by -1e9, as -inf would give NaN in
            # 0·log 0).
            nvec = [action_space.n] if action_kind == "Discrete" else action_space.nvec
            surplus = np.arange(np.max(nvec)) >= np.reshape(nvec, (-1, 1))  # (n, A)
            self.logits_shape, outputs = surplus.shape, surplus.size
            penalty = torch.from_numpy(surplus) * -1e9 if surplus.any() else None
            self.register_buffer("penalty", penalty, persistent=False)
        self.normalizer = Normalizer(inputs) if norm_obs else None
        # Its dtype and device are those that observations are converted to
        self.register_buffer("like", torch.zeros(()), persistent=False)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA too
            self.actor = mlp([inputs, *hidden, outputs], 0.01)
            self.critic = mlp([inputs, *hidden, 1], 1.0)

    @torch.no_grad()
    def act(self, obs, *, greedy=False, generator=None):
        """Draws an action for each observation, with a generator of the CPU (None: torch's
        global one), or, if greedy, takes the most probable. The result is on the CPU."""
        outputs = self.actor(self._flat(obs))
        if self.continuous:
            if not greedy:
                noise = torch.randn(outputs.shape, generator=generator)
                outputs = outputs + self.log_std.exp() * noise.to(outputs.device)
            return outputs.cpu().view(-1, *self.action_space.shape)
        logits = self._logits(outputs).cpu()  # (k, n, A); on the CPU, as actions must be
        if not greedy:
            # The largest of logit - log(exponential noise) falls on each choice with exactly
            # its softmax probability (the "Gumbel trick"); this costs less than other ways.
            noise = torch.empty_like(logits).exponential_(generator=generator)
            logits = logits - noise.log_()
        return logits.argmax(-1).view(-1, *self.action_space.shape)

    def evaluate(self, obs, action):
        """What the networks, as they are now, say of actions taken earlier: (logprob, entropy,
        value), (k,) each and differentiable."""
        flat = self._flat(obs)
        outputs, value = self.actor(flat), self.critic(flat).squeeze(-1)
        if self.continuous:
            # log π(a|s) = -½·((a - output) / σ)² - log σ - c;  entropy = ½ + log σ + c, where
            # c is half the logarithm of 2π (here the number)
            log_scale = self.log_std + 0.5 * math.log(2 * math.pi)
            error = (action.reshape(outputs.shape) - outputs) / self.log_std.exp()
            logprob = (-0.5 * error.square() - log_scale).sum(1)
            entropy = (0.5 + log_scale).sum().expand_as(value)
        else:
            # log π(a|s) = log softmax(logits);  entropy = -Σ π·log π: log A where all A actions
            # are equally probable, 0 where one is certain
            logprobs = self._logits(outputs).log_softmax(-1)  # (k, n, A)
            logprob = logprobs.gather(-1, action.reshape(len(flat), -1, 1)).sum((1, 2))
            entropy = -(logprobs.exp() * logprobs).sum((1, 2))
        return logprob, entropy, value

    def value(self, obs):
        """V of each observation, (k,)."""
        return self.critic(self._flat(obs)).squeeze(-1)

    def to_env(self, action):
        """For the environment: Box clipped, rounded if integer; Discrete from `start` on."""
        space = self.action_space
        if not self.continuous:
            return (action.numpy() + getattr(space, "start", 0)).astype(space.dtype)
        clipped = np.clip(action.numpy(), space.low, space.high)
        whole = np.issubdtype(space.dtype, np.integer)
        return (clipped.round() if whole else clipped).astype(space.dtype)

    def _logits(self, outputs):  # (k, n·A) → (k, n, A)
        logits = outputs.view(-1, *self.logits_shape)
        return logits if self.penalty is None else logits + self.penalty

    def _flat(self, obs):  # (k, *observation shape) → float32 (k, O)
        space, x = self.observation_space, torch.as_tensor(obs)
        if x.ndim == 0 or x.shape[1:] != space.shape:
            raise ValueError(f"observations must be (k, *{space.shape}), got {tuple(x.shape)}")
        if self.one_hot:
            x = nn.functional.one_hot(x.long() - int(space.start), int(space.n))
        x = x.reshape(len(x), -1)
        return x.to(self.like) if self.normalizer is None else self.normalizer(x)


# ==============================================================================================
# 4. Rollout
# ==============================================================================================
# Needs: import numpy as np, torch; from typing import NamedTuple
#
# T steps of N environments, in memory that is allocated once. A transition keeps the
# observation that the action was chosen from and the one that it led to. One environment's
# line, with states s0, s1, ... of one game and z0, z1, ... of the next:
#
#                  t = 0    1    2    3    4
#     obs             s0   s1   s2   z0   z1      (T, N, *observation shape)
#     action          a0   a1   a2   b0   b1      (T, N, *action shape)
#     reward          r0   r1   r2   q0   q1      (T, N)
#     ended            ·    ·    ■    ·    ·      (T, N): ■ terminated or truncated
#     next_obs        s1   s2   s3   z1   z2      (T, N, *observation shape)
#
# Action a2 ended its game. The environment began the next one within that step and returned z0,
# which has nothing to do with a2; s3, to which a2 really led, was in `final_obs`, and is kept
# here.
#
# Advantages. How much better was an action than what the policy does there on average? The
# rewards that followed tell, but they also depend on everything else that happened later: right
# on average, and noisy. The critic's opinion of the next state can stand in for all but the
# first of them: quiet, but wrong while the critic is learning. Generalized Advantage Estimation
# (GAE) mixes the two. With s'_t for the state that step t led to, 0 ≤ t < T, and Â_T = 0:
#
#     δ_t = r_t + γ·(1 - terminated_t)·V(s'_t) - V(s_t)
#     Â_t = δ_t + γ·λ·(1 - terminated_t)·(1 - truncated_t)·Â_{t+1}
#
# δ in words: the reward, plus what the critic expects from where the step led, minus what it
# had expected before: the step's surprise. Â adds up the surprises from here on, fading by γ·λ
# per step. With λ = 0, Â is a single surprise, and the critic is trusted for all that follows.
# With λ = 1, each V(s') cancels against the next step's V(s), and what remains is the
# discounted rewards that were seen, plus the discounted V(s') where they broke off, minus
# V(s_t). Raise λ if the critic is bad or rewards come late; lower it if advantages are noisy. γ
# keeps the sums of endless games finite, and discounts what happens much later, which says
# little about this action.
#
# Putting V(s') in the place of rewards that were not seen is called bootstrapping. Rewards
# break off in three ways. After *terminated* none are left, and V(s') counts as 0. After
# *truncated* there would have been some, and V(s') counts. At the end of the rollout the game
# goes on, and V(s') counts as well. In all three the sum of surprises stops. If a time limit is
# taken for a fall, the critic learns that 500 steps of balance end in disaster, with nothing in
# the observation to tell when: the better the policy, the more wrong the critic.
#
# Returns. V + Â, what was expected plus how much better it went, is the critic's target. It is
# called the λ-return, or just "returns"; it is discounted, partly bootstrapped, and not what
# the log calls a return, the plain sum of an episode's rewards.


def gae(rewards, values, next_values, terminated, truncated, gamma, lam):
    """Generalized Advantage Estimation, arXiv:1506.02438, equations 11 and 16: (advantages,
    returns). All arrays are (T, N), and NumPy's, whose small steps cost less than torch's.

    rewards      r_t
    values       V(s_t), of the observation that the action was chosen from
    next_values  V(s'_t), of the observation that it led to; not read where terminated
    terminated   bool: the step ended the game
    truncated    bool: the game was cut off after the step; both may be true

    Three steps of one environment, γ = λ = ½, the last one a termination, so that the 9.0 is
    not read; δ = (0, 0, -1):

    >>> column = lambda *numbers: np.array(numbers)[:, None]
    >>> rewards, values, next_values = column(1, 1, 1.0), column(2, 2, 2.0), column(2, 2, 9.0)
    >>> terminated, never = column(False, False, True), column(False, False, False)
    >>> advantages, returns = gae(rewards, values, next_values, terminated, never, 0.5, 0.5)
    >>> advantages.ravel().tolist(), returns.ravel().tolist()
    ([-0.0625, -0.25, -1.0], [1.9375, 1.75, 1.0])
    """
    # δ_t = r_t + γ·(1 - terminated_t)·V(s'_t) - V(s_t), in the array that becomes Â
    advantages = rewards + gamma * np.where(terminated, 0, next_values) - values
    # Â_t = δ_t + γ·λ·(1 - terminated_t)·(1 - truncated_t)·Â_{t+1}, from the end to the start
    fading = np.where(terminated | truncated, 0, gamma * lam)
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += fading[t] * advantages[t + 1]
    return advantages, advantages + values


class Batch(NamedTuple):
    """Transitions as the loss sees them, in no order that matters: k = B of them, or M."""

    obs: torch.Tensor  # (k, *observation shape)
    action: torch.Tensor  # (k, *action shape)
    logprob: torch.Tensor  # (k,) of the action, under the policy that took it
    advantage: torch.Tensor  # (k,) Â
    returns: torch.Tensor  # (k,) V + Â, the critic's targets


def put(target: np.ndarray, value, name: str):
    """Copies `value` into `target`. ValueError where its shape or kind differs: an assignment
    would broadcast or truncate in silence."""
    value = np.asarray(value)
    alike = value.dtype == target.dtype or np.can_cast(value.dtype, target.dtype, "same_kind")
    if value.shape != target.shape or not alike:
        expected, got = f"{target.dtype} {target.shape}", f"{value.dtype} {value.shape}"
        raise ValueError(f"{name} must be {expected}; got {got}")
    target[...] = value


def put_step(results: tuple, obs, final_obs, reward, terminated, truncated) -> np.ndarray:
    """Copies what an environment's `step` returned into these arrays; returns the rows where an
    episode ended. In those rows, final_obs gets the last observation. It may be the same array
    as obs, which then loses the first observation of the next episode."""
    put(obs, results[0], "obs")
    put(reward, results[1], "reward")
    put(terminated, results[2], "terminated")
    put(truncated, results[3], "truncated")
    ended = (terminated | truncated).nonzero()[0]
    if len(ended):
        last, rows = results[4]["final_obs"][ended], final_obs.take(ended, axis=0)
        if last.dtype == object:  # Gymnasium's: an array in each of these rows
            last = np.stack(last)
        put(rows, last, "final_obs")
        final_obs[ended] = rows
    return ended


def require_same_step(envs):
    """ValueError unless `envs` begins a new episode in the step that ends one."""
    mode = getattr(envs, "metadata", {}).get("autoreset_mode")
    if getattr(mode, "value", mode) != "SameStep":  # Gymnasium's enum, or plain text
        how = "make it with SyncVectorEnv(..., autoreset_mode=AutoresetMode.SAME_STEP)"
        raise ValueError(f"the autoreset_mode of {envs} must be SAME_STEP, not {mode}: {how}")


class Rollout:
    """One rollout, until the next overwrites it. Its shapes and dtypes are those of `obs` and
    `action`, (N, ...) each; so an image of bytes is kept in bytes."""

    def __init__(self, num_steps: int, obs: np.ndarray, action: torch.Tensor):
        shape = num_steps, len(obs)  # T, N
        self.obs, self.next_obs = np.zeros((2, num_steps, *obs.shape), obs.dtype)
        self.action = np.zeros((num_steps, *action.shape), action.numpy().dtype)
        self.reward = np.zeros(shape)
        self.terminated, self.truncated = np.zeros((2, *shape), bool)

    def add(self, t: int, results: tuple) -> np.ndarray:
        """Copies in what the environment returned from step t; returns the rows that ended."""
        reached, flags = self.next_obs[t], (self.terminated[t], self.truncated[t])
        return put_step(results, reached, reached, self.reward[t], *flags)


# ==============================================================================================
# 5. PPO
# ==============================================================================================
# Needs: import contextlib, copy, math, time; from collections import deque; parts 1, 3, 4
#
# The policy gradient in one sentence: change the weights so that the log-probability of each
# action taken rises in proportion to its advantage. (The gradient of a logarithm, ∇π/π, is
# divided by the probability; else what is done often would be pushed more for that alone.) That
# is right only for the policy that took the actions, hence for one small gradient step. But
# data is costly, and PPO wants many gradient steps from the same data. For that it needs two
# things.
#
# A *ratio*. After the first gradient step, the policy is no longer the one that played. So each
# action is weighted by how much more probable it has become: ratio = π(a|s) / π_old(a|s). Then
# the mean of ratio·Â over the actions that the old policy took estimates the mean Â of those
# that the new one would take in the same states. (The new one would also come to other states.
# That is ignored: one more reason to stay close.) Say left has Â = +1, right has Â = -1, and
# the old policy takes each half of the time; a new one that goes left in 8 of 10 cases has a
# mean of 0.8·1 - 0.2·1 = 0.6. The old one's data says the same: with ratios 0.8/0.5 = 1.6 and
# 0.2/0.5 = 0.4, the mean of 1.6 and -0.4 is 0.6. The gradient of a ratio is ratio·∇log π. So
# where all ratios are 1, the gradient of ratio·Â is Â·∇log π: the policy gradient again.
#
# A *clip*. Nothing yet keeps the optimiser from making one lucky action a hundred times more
# probable, although at that distance from the data the estimate is worth nothing. So the ratio
# is held constant outside 1 ± ε, and a constant has no gradient: once an action has gained (or
# lost) a share ε of its probability, a fifth, there is nothing more to win from it until fresh
# data speaks. But gradient steps for the sake of other actions can also carry a ratio out of
# the band against its own advantage, and there the gradient that brings it back must remain.
# The *smaller* of the unclipped and the clipped term does all of this:
#
#                     ratio < 1-ε             within the band        ratio > 1+ε
#         Â > 0       ratio·Â: pull it back   ratio·Â: push it up    (1+ε)·Â: enough
#         Â < 0       (1-ε)·Â: enough         ratio·Â: push it down  ratio·Â: pull it back
#
#     objective =  mean( min( ratio·Â, clip(ratio, 1-ε, 1+ε)·Â ) )
#                 - vf_coef · mean( (V - returns)² )  +  ent_coef · mean( entropy )
#
# The two networks share no weights, and Adam rescales each weight's gradient, so vf_coef hardly
# changes the critic's steps. It matters through max_grad_norm, which limits the length of both
# gradients together. Entropy measures how undecided the policy is: a little reward for it helps
# where a first favourite would shut out actions that were never properly tried.
#
# Several ranks can train together (torchrun starts them). Each plays environments of its own,
# and before every gradient step all take the mean of their gradients; so their weights, which
# were equal at the start, stay equal.


def ppo_loss(policy, batch: Batch, config: Config):
    """The loss of arXiv:1707.06347, equations 7 and 9, on one minibatch: a scalar to descend,
    and scalars for the log. No gradient flows into the batch."""
    logprob, entropy, value = policy.evaluate(batch.obs, batch.action)  # (M,) each
    shapes = {x.shape for x in (logprob, entropy, value, batch.logprob, batch.advantage)}
    assert shapes == {batch.returns.shape}, f"(M, 1) with (M,) would make (M, M): {shapes}"
    # Advantages get mean 0 and deviation 1 in each minibatch, so that ent_coef means the same
    # however large rewards are. (The critic's error still grows with them, unless norm_reward
    # scales them.) What went a little better than expected, among much that went far better, is
    # then made less probable: what counts is the comparison.
    std, mean = torch.std_mean(batch.advantage)
    advantage = (batch.advantage - mean) / (std + 1e-8)
    # ratio = π(a|s) / π_old(a|s)
    log_ratio = logprob - batch.logprob
    ratio = log_ratio.exp()
    # The surrogate: mean( min( ratio·Â, clip(ratio, 1-ε, 1+ε)·Â ) ), the min by `clamp`. The
    # second term can be detached: where it is the smaller, it is constant anyway. (torch.min
    # takes longer: where both are equal, within the band, each gets half of the gradient.)
    clipped = ratio.detach().clamp(1 - config.clip, 1 + config.clip)
    surrogate = (ratio * advantage).clamp(max=clipped * advantage).mean()
    # (OpenAI's ppo2 also clips the change of V; that was found not to help, arXiv:2006.05990.)
    value_loss = (value - batch.returns).square().mean()
    entropy = entropy.mean()
    loss = config.vf_coef * value_loss - surrogate  # the objective, negative: to descend
    if config.ent_coef:  # else there is no need to differentiate it
        loss = loss - config.ent_coef * entropy
    with torch.no_grad():
        # KL(π_old ‖ π), the Kullback-Leibler divergence, says how far the policy has moved. It
        # is the mean of -log ratio over the old policy's actions. Adding ratio - 1, which is 0
        # on average, makes every term 0 or more, and the estimate steadier (Schulman 2020,
        # "Approximating KL divergence").
        stats = {
            "policy_loss": -surrogate.detach(),  # near 0: advantages have mean 0
            "value_loss": value_loss.detach(),  # may rise while returns still grow
            "entropy": entropy.detach(),  # one choice: log A at first; 0: no exploring
            "approx_kl": (ratio - 1 - log_ratio).mean(),  # healthy: 0.001 to 0.03
            "clip_fraction": (ratio != clipped).float().mean(),  # healthy: 0.05 to 0.3
        }
    return loss, stats


def num_ranks() -> int:
    """How many processes train together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Replaces `tensor`, in place, by its mean over all ranks."""
    if num_ranks() > 1:
        torch.distributed.all_reduce(tensor)
        tensor /= num_ranks()
    return tensor


class Adam:
    """Adam (arXiv:1412.6980) steps along a running mean m of the gradients. For each weight, it
    is divided by the root of v, a running mean of their squares; so all weights move about
    equally fast.

    All parameters become slices of one vector: averaging over ranks, clipping and stepping are
    then a few operations on the whole, and `backward` adds each gradient into its slice.
    (Making a `torch.optim.Adam` imports torch's compiler, which takes about as long as learning
    CartPole.)"""

    def __init__(self, policy: nn.Module):
        parameters, self.steps = list(policy.parameters()), 0
        self.weights = nn.utils.parameters_to_vector(parameters).detach().clone()  # (P,)
        self.grad, self.mean, self.square = self.weights.new_zeros(3, len(self.weights))
        sizes = [p.numel() for p in parameters]
        slices = self.weights.split(sizes), self.grad.split(sizes)
        for p, weights, grad in zip(parameters, *slices):
            p.data, p.grad = weights.view_as(p), grad.view_as(p)
        self.places = [(p, p.data_ptr(), p.grad) for p in parameters]

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
        """One step, along the mean gradient of all ranks, scaled down to `max_grad_norm` if it
        is longer; returns the length that it had, and leaves the gradient at zero."""
        for p, address, grad in self.places:  # policy.to(...) and zero_grad() would change them
            if p.data_ptr() != address or p.grad is not grad:
                raise RuntimeError("parameters have left Adam's memory: make a new Adam")
        g, m, v = mean_over_ranks(self.grad), self.mean, self.square
        norm = torch.linalg.vector_norm(g)
        scale = (max_grad_norm / (norm + 1e-6)).item()
        if scale < 1:
            g *= scale
        self.steps += 1
        # m ← β₁·m + (1 - β₁)·g;  v ← β₂·v + (1 - β₂)·g², with β₁ = 0.9, β₂ = 0.999
        m.lerp_(g, 1 - 0.9)
        v.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
        # Both began at 0, and are too small at first: m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ)
        rate, root = learning_rate / (1 - 0.9**self.steps), math.sqrt(1 - 0.999**self.steps)
        # w ← w - learning rate · m̂ / (√v̂ + 1e-5). (Customary in PPO, in place of 1e-8: where
        # gradients have almost vanished, noise must not be scaled up to full-sized steps.)
        self.weights.addcdiv_(m, (v.sqrt() / root).add_(1e-5), value=-rate)
        g.zero_()
        return norm


def derive_seeds(seed: int, rank: int, update: int = 0) -> list[int]:
    """Four seeds, for weights, environments, draws (actions and minibatches) and evaluation,
    which differ for every seed, rank and update. 62 bits, so seed + i fits an int64."""
    sequence = np.random.SeedSequence(seed, spawn_key=(rank, update))
    return [int(number) >> 2 for number in sequence.generate_state(4, np.uint64)]


@contextlib.contextmanager
def torch_threads(number: int):
    """Lets torch use `number` threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PPO:
    """The learner: all that changes in the course of training. `update` improves `policy` by
    one rollout; `steps` counts the environment steps of all ranks.

    envs    a vector environment in SAME_STEP mode, of config.num_envs environments
    policy  a module with `act`, `evaluate`, `value` and `to_env`; None: an ActorCritic.
            Must be equal on all ranks. Its `normalizer`, if it has one, is updated here

    Raises ValueError where `envs` do not fit, RuntimeError for NaN or infinity. Every draw
    comes from generators of its own; the global ones, and torch's threads, stay as they were.
    """

    def __init__(self, envs, config, policy=None):
        require_same_step(envs)
        if envs.num_envs != config.num_envs:
            raise ValueError(f"config.num_envs is {config.num_envs}, envs has {envs.num_envs}")
        self.envs, self.config, self.ranks = envs, config, num_ranks()
        self.rank = torch.distributed.get_rank() if self.ranks > 1 else 0
        if config.num_updates < self.ranks:
            raise ValueError(f"total_steps is less than one rollout of all {self.ranks} ranks")
        if policy is None:
            shape = envs.single_observation_space, envs.single_action_space, config.hidden
            seed, *_ = derive_seeds(config.seed, 0)  # rank 0's: all ranks start alike
            with torch_threads(config.threads):
                policy = ActorCritic(*shape, seed=seed, norm_obs=config.norm_obs)
        self.policy = policy.to(config.device)
        self.adam, self.reward_normalizer = Adam(policy), Normalizer(1).to(config.device)
        self.steps = self.episodes = self.updates = 0  # so far; steps are those of all ranks
        self.rollout_steps = config.batch_size * self.ranks
        self.total_steps = config.num_updates // self.ranks * self.rollout_steps
        self.recent: deque = deque(maxlen=100)  # (return, length) of finished episodes
        self.generator = torch.Generator()
        self.begin_episodes()
        self.rollout = Rollout(config.num_steps, self.obs, policy.act(self.obs, greedy=True))

    def begin_episodes(self):
        """New episodes everywhere, and new draws, with seeds of this rank and this update."""
        _, environments, draws, _ = derive_seeds(self.config.seed, self.rank, self.updates)
        self.generator.manual_seed(draws)
        self.obs = self.envs.reset(seed=environments)[0]  # (N, ...), to act on next
        # Of each environment's running episode: return, length, and, for norm_reward, the
        # discounted sum of rewards
        self.running = np.zeros((3, self.config.num_envs))

    def update(self):
        """Plays one rollout, improves the policy, and returns the log's row. Of several ranks,
        each tells of its own episodes and losses."""
        config, began = self.config, time.perf_counter()
        with torch_threads(config.threads):
            self._collect()  # 1. Collect.
            estimates = self._estimate()  # 2. Value; and how probable each action was.
            batch = self._advantages(*estimates)  # 3. Advantage.
            # The rate is full at the first update, and not yet zero at the last.
            left = 1 - self.steps / self.total_steps
            rate = config.learning_rate * (max(0.0, left) if config.anneal else 1.0)
            stats = self._improve(batch, rate)  # 4. Improve.
        self.steps += self.rollout_steps
        self.updates += 1
        mean_return, mean_length = np.mean(self.recent or [(math.nan, math.nan)], 0).tolist()
        # returns - V is Â; its variance is what V left unexplained of the variance of returns
        unexplained = (batch.advantage.var() / batch.returns.var()).item()
        return {  # 5. Measure. (6, repeat, is the caller's loop.)
            "update": self.updates,
            "steps": self.steps,
            "episodes": self.episodes,  # that ended so far
            "mean_return": mean_return,  # of the last 100; NaN before the first
            "mean_length": mean_length,  # of the same, in steps
            **stats,
            "explained_variance": 1 - unexplained,  # 1: V predicts all; 0: a mean does as well
            "learning_rate": rate,
            "steps_per_second": self.rollout_steps / (time.perf_counter() - began),
        }

    def _collect(self):
        """Plays T steps in every environment. Nothing but actions is asked of the networks yet,
        because few large calls are cheaper than many small ones."""
        rollout, policy = self.rollout, self.policy
        totals, lengths, _ = self.running  # views, (N,) each
        for t in range(self.config.num_steps):
            put(rollout.obs[t], self.obs, "obs")  # before `step`, which may write over it
            action = policy.act(rollout.obs[t], generator=self.generator)
            rollout.action[t] = action.numpy()
            results = self.envs.step(policy.to_env(action))
            self.obs, ended = results[0], rollout.add(t, results)
            totals += rollout.reward[t]
            lengths += 1
            if len(ended):
                self.episodes += len(ended)
                self.recent.extend(self.running[:2, ended].T.tolist())
                self.running[:2, ended] = 0

    @torch.no_grad()
    def _estimate(self):
        """Of the rollout, flat, (B, ...): obs, action, log π_old(a|s), V(s) and V(s'). (Most s'
        are the next step's s. To ask twice is simpler than to keep track of the exceptions.)"""
        arrays = self.rollout.obs, self.rollout.action, self.rollout.next_obs
        tensors = (torch.from_numpy(x).flatten(0, 1).to(self.config.device) for x in arrays)
        obs, action, next_obs = tensors
        logprob, _, value = self.policy.evaluate(obs, action)
        return obs, action, logprob, value, self.policy.value(next_obs)

    def _advantages(self, obs, action, logprob, value, next_value) -> Batch:
        """The loss's batch: adds advantages and returns to what `_estimate` returned."""
        rollout, config, reward = self.rollout, self.config, self.rollout.reward
        if config.norm_reward:
            # Rewards are divided by the deviation of R ← γ·R + r. R looks back where a value
            # looks ahead, but varies about as much, and is known at once. Outliers are cut off.
            sums, discounted = np.zeros(reward.shape), self.running[2]
            for t, ended in enumerate(rollout.terminated | rollout.truncated):
                sums[t] = discounted[:] = config.gamma * discounted + reward[t]
                discounted[ended] = 0
            scale = self.reward_normalizer
            self._count_in(scale, torch.from_numpy(sums.ravel()).to(config.device))
            reward = (reward / scale.std().item()).clip(-10, 10)
        values = value.cpu().numpy().reshape(reward.shape)
        next_values = next_value.cpu().numpy().reshape(reward.shape)
        flags = rollout.terminated, rollout.truncated
        targets = gae(reward, values, next_values, *flags, config.gamma, config.gae_lambda)
        flat = (torch.from_numpy(x).float().flatten().to(config.device) for x in targets)
        return Batch(obs, action, logprob, *flat)

    def _improve(self, batch, rate):
        """Gradient steps over `epochs` passes; means of what the loss and Adam said of them."""
        config, taken = self.config, []
        for minibatch in self._minibatches(batch):
            loss, stats = ppo_loss(self.policy, minibatch, config)
            # No stop before the first step, where the KL is 0 but for rounding. The mean
            # over ranks makes all of them stop together.
            limited = taken and config.target_kl < math.inf
            if limited and mean_over_ranks(stats["approx_kl"].clone()) > config.target_kl:
                break  # out of this epoch, and of those that would follow
            loss.backward()
            stats["grad_norm"] = self.adam.step(rate, config.max_grad_norm)  # before scaling
            taken.append(stats)
        if getattr(self.policy, "normalizer", None) is not None:
            # Only now, so that within an update one function chooses actions and judges them.
            # (The first update sees observations that are only cut to ±10. Then the scale
            # changes a lot, later less. approx_kl does not show it: π_old and π share it.)
            self._count_in(self.policy.normalizer, batch.obs)
        for name, tensor in self.policy.state_dict().items():
            if not tensor.isfinite().all():
                what = f"update {self.updates + 1} led to NaN or infinity in {name}"
                causes = "a learning rate or rewards that are too large (see norm_reward), "
                causes += "or an environment that returned NaN or infinity"
                raise RuntimeError(f"{what}; usual causes are {causes}")
        means = {k: torch.stack([stats[k] for stats in taken]).mean().item() for k in taken[0]}
        return {**means, "gradient_steps": len(taken)}

    def _minibatches(self, batch):
        """Each epoch in a new order, in pieces of almost equal size: nothing is left over, and
        as M is at least 3, no piece is a single transition, which has no deviation."""
        size, config = len(batch.returns), self.config
        for _ in range(config.epochs):
            if size <= config.minibatch_size:  # one piece: its order does not matter
                yield batch
                continue
            order = torch.randperm(size, generator=self.generator).to(config.device)
            for rows in order.tensor_split(math.ceil(size / config.minibatch_size)):
                yield Batch(*(tensor.index_select(0, rows) for tensor in batch))

    def _count_in(self, normalizer, x):  # (k, ...) on each rank; K numbers per row
        x = x.reshape(len(x), -1).double()
        mean = mean_over_ranks(x.mean(0))
        var = mean_over_ranks((x - mean).square().mean(0))
        normalizer.count_in(len(x) * self.ranks, mean, var)

    def state_dict(self) -> dict:
        """Copies of all that the future depends on, in tensors, ints, lists and dicts. Of
        several ranks, rank 0's serves for all."""
        envs = self.envs.state() if self.ranks == 1 and hasattr(self.envs, "state") else {}
        state = {
            "policy": self.policy.state_dict(),
            "adam": {"mean": self.adam.mean, "square": self.adam.square},
            "rewards": self.reward_normalizer.state_dict(),
            "counts": [self.adam.steps, self.steps, self.episodes, self.updates],
            "recent": torch.tensor(list(self.recent), dtype=torch.float64),
            "generator": self.generator.get_state(),
            "envs": {name: torch.from_numpy(array) for name, array in envs.items()},
            "obs": torch.from_numpy(self.obs),
            "running": torch.from_numpy(self.running),
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict):
        """Goes on from what `state_dict` returned; with new episodes where there are several
        ranks, or the environments have no `state`."""
        self.policy.load_state_dict(state["policy"])
        self.adam.mean.copy_(state["adam"]["mean"])
        self.adam.square.copy_(state["adam"]["square"])
        self.reward_normalizer.load_state_dict(state["rewards"])
        self.adam.steps, self.steps, self.episodes, self.updates = state["counts"]
        self.recent = deque(state["recent"].tolist(), maxlen=100)
        if state["envs"] and self.ranks == 1:
            self.generator.set_state(state["generator"])
            self.envs.set_state({k: x.numpy().copy() for k, x in state["envs"].items()})
            self.obs, self.running = (state[k].numpy().copy() for k in ("obs", "running"))
        else:
            self.begin_episodes()


# PPO is complete here. A program of your own needs no more than this to train:
#
#     config = Config()
#     learner = PPO(CartPole(config.num_envs), config)
#     for _ in range(config.num_updates):
#         print(learner.update()["mean_return"])
#
# What follows makes it parallel (6), durable (7), easy to call (8) and visible (9).

# ==============================================================================================
# 6. EnvPool
# ==============================================================================================
# Needs: import multiprocessing as mp, os, signal, threading, time, traceback; part 4
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
# All see the same memory, so nothing is sent from process to process. Every array has one
# writer at a time: between `done` and `go` the learner, between `go` and `done` a worker, in
# its rows. `go` and `done` are semaphores, a pair for each worker; what was written before one
# is released is seen after it is acquired. Whoever waits polls for a short while, because being
# woken takes as long as stepping a hundred CartPoles, and then sleeps, to leave the core to
# others.
#
# A pool pays where environments are slow, cores are free and the run is long: starting the
# first worker takes as long as importing torch. CartPole is faster without.

STEP, RESET, GET_STATE, SET_STATE, CLOSE = range(5)
RESULTS = "obs", "final_obs", "reward", "terminated", "truncated"  # of a step, shared
DOING = "stepping", "resetting", "giving its state", "taking a state"
give_way = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has only the latter


class WorkerError(RuntimeError):
    """A worker raised, died or did not answer in time, and the pool has been closed. `worker`
    is its number; `exitcode` its exit code (negative: the signal that killed it), None if it
    was running."""

    def __init__(self, message, worker, exitcode):
        super().__init__(message)
        self.worker, self.exitcode = worker, exitcode


def acquire(semaphore, timeout) -> bool:
    """Acquires `semaphore` within `timeout` seconds (None: for ever); False if it could not."""
    until = time.perf_counter() + 200e-6
    while not semaphore.acquire(False):
        if time.perf_counter() > until:
            return semaphore.acquire(True, timeout)
        give_way()
    return True


def as_arrays(shared: dict) -> dict[str, np.ndarray]:  # {name: (memory, shape, dtype)}
    return {name: np.frombuffer(m, dtype).reshape(s) for name, (m, s, dtype) in shared.items()}


def in_a_line(error: BaseException) -> str:
    """What was raised and where, as in "KeyError: 'door' (game.py, line 12)"."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(place.filename)}, line {place.lineno}"
    return f"{type(error).__name__}: {error} ({where})"


def run_worker(make_env, part: slice, shared, shared_state, report, go, done):
    """What a worker process runs: it makes the environments of its rows, and obeys until told
    to close. What it raises goes to the learner through `report`."""

    def end_with_learner():
        mp.parent_process().join()
        os._exit(1)  # even if the worker is stuck in an environment's Python code

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's to handle
    threading.Thread(target=end_with_learner, daemon=True).start()
    try:
        rows = {name: array[part] for name, array in as_arrays(shared).items()}
        state = {name: array[part] for name, array in as_arrays(shared_state).items()}
        env = make_env(part.stop - part.start)
        require_same_step(env)
        results = {name: rows[name] for name in RESULTS}
        command = None
        while command != CLOSE:
            done.release()  # the environments are made, or the last command is done
            acquire(go, None)
            command = rows["command"][0]  # (in every row the same)
            if command == STEP:
                put_step(env.step(rows["action"]), **results)
            elif command == RESET:
                first = int(rows["seed"][0])  # the others' follow from it; -1: none
                put(rows["obs"], env.reset(seed=None if first < 0 else first)[0], "obs")
            elif command == GET_STATE:
                for name, value in env.state().items():
                    put(state[name], value, name)
            elif command == SET_STATE:
                env.set_state(state)
        env.close()
    except BaseException as error:
        text = f"{in_a_line(error)}\n{traceback.format_exc(limit=-9)}"
        report.value = text.encode(errors="replace")[: len(report) - 1]
        done.release()
        raise SystemExit(1) from None


def end_workers(workers: list, command: np.ndarray):
    """Tells the workers to close, and kills those that have not ended in a second."""
    command[:], deadline = CLOSE, time.monotonic() + 1
    try:
        for _, go, _, _ in workers:
            go.release()
        for process, _, _, _ in workers:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:  # also after Ctrl-C
        for process, _, _, _ in workers:
            process.kill()
            process.join(1)


class EnvPool:
    """N environments, stepped by W worker processes; itself a vector environment.

    make_env      make_env(n) makes a vector environment of n environments, as CartPole does
    start_method  "fork", "forkserver" or "spawn". By default forkserver, where there is one: a
                  process that imports torch once, from which workers are forked. (Plain fork
                  would copy a process whose threads may be holding locks.) Except under fork,
                  workers import your program: guard what it does with `if __name__ ==
                  "__main__":`, and define make_env at the top level of a module.
    timeout       seconds that workers may take for one command (60 or more for the start)

    Environment i is seeded seed + i, so results are the same, bit for bit, for any number of
    workers. `step` is `send`, then `recv`, for callers with something to do in between. What
    these return are views into shared memory, valid until the next `send`: copy what you keep.
    Of an environment's `info`, only "final_obs" is passed on. `close` ends the workers within
    two seconds, and may be called again; it is called at the latest when the program ends.

    Raises ValueError for sizes, shapes and kinds that do not fit, RuntimeError for calls out of
    order, WorkerError for a worker that failed."""

    metadata = {"autoreset_mode": "SameStep"}

    def __init__(self, make_env, num_envs, workers, *, start_method=None, timeout=60.0):
        if not 1 <= workers <= num_envs:
            raise ValueError(f"a pool of {num_envs} environments cannot have {workers} workers")
        self.num_envs, self.timeout, self._pending = num_envs, timeout, None
        env = make_env(1)  # only for its spaces and its state
        obs, action = env.single_observation_space, env.single_action_space
        env.reset(seed=0)
        state = env.state() if hasattr(env, "state") else {}
        env.close()
        self.single_observation_space, self.single_action_space = obs, action
        server = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        context = mp.get_context(start_method or server)
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["numpy", "torch"])

        def share(shape, dtype):  # memory for N of these
            shape, dtype = (num_envs, *shape), np.dtype(dtype)
            return context.RawArray("b", int(np.prod(shape)) * dtype.itemsize), shape, dtype

        shared = {name: share((), np.int64) for name in ("command", "seed")}
        shared |= {name: share(obs.shape, obs.dtype) for name in ("obs", "final_obs")}
        shared |= {name: share((), bool) for name in ("terminated", "truncated")}
        shared |= {"action": share(action.shape, action.dtype), "reward": share((), np.float64)}
        shared_state = {name: share(a.shape[1:], a.dtype) for name, a in state.items()}
        self._arrays, self._state = as_arrays(shared), as_arrays(shared_state)
        self._workers: list = []  # of (process, go, done, report)
        # `close()` runs end_workers once: when you call it, when the pool is forgotten, or when
        # the program ends (before workers are waited for, as in Python's own Pool); never in a
        # fork of the learner.
        ending = self._workers, self._arrays["command"]
        self.close = mp.util.Finalize(self, end_workers, ending, exitpriority=10)
        try:
            bounds = [num_envs * w // workers for w in range(workers + 1)]
            for w, (first, stop) in enumerate(zip(bounds, bounds[1:])):
                go, done = context.Semaphore(0), context.Semaphore(0)
                report = context.RawArray("c", 8192)  # what the worker raised, if it did
                args = make_env, slice(first, stop), shared, shared_state, report, go, done
                process = context.Process(target=run_worker, args=args, daemon=True)
                process.name = f"worker {w} (environments {first} to {stop - 1})"
                process.start()
                self._workers.append((process, go, done, report))
            self._wait("starting", max(timeout, 60.0))  # importing takes long
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [process.pid for process, _, _, _ in self._workers]

    def reset(self, *, seed: int | None = None, options: None = None):
        """Begins an episode everywhere: (obs, {})."""
        seeds = np.full(self.num_envs, -1) if seed is None else np.arange(self.num_envs) + seed
        self._begin(RESET, seed=seeds)
        self._finish(RESET)
        return self._arrays["obs"], {}

    def step(self, actions: np.ndarray):
        """`send(actions)`, then `recv()`."""
        self.send(actions)
        return self.recv()

    def send(self, actions: np.ndarray):
        """Starts a step, and returns at once. Actions are (N, *action shape)."""
        self._begin(STEP, action=actions)

    def recv(self):
        """Waits for all workers: (obs, reward, terminated, truncated, info), as CartPole's."""
        self._finish(STEP)
        a = self._arrays
        ended = np.count_nonzero(a["terminated"]) or np.count_nonzero(a["truncated"])
        info = {"final_obs": a["final_obs"]} if ended else {}
        return a["obs"], a["reward"], a["terminated"], a["truncated"], info

    def state(self) -> dict[str, np.ndarray]:
        """Copies of what the environments' own `state` returned; {} if they have none."""
        if self._state:
            self._begin(GET_STATE)
            self._finish(GET_STATE)
        return {name: array.copy() for name, array in self._state.items()}

    def set_state(self, state: dict[str, np.ndarray]):
        """Goes on from what `state` returned, with this or another number of workers."""
        if self._state:
            self._require(None)
            for name, array in self._state.items():
                put(array, state[name], name)
            self._begin(SET_STATE)
            self._finish(SET_STATE)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _require(self, pending):
        """RuntimeError unless the pool is open, and `pending` is what is under way."""
        if not self.close.still_active():
            raise RuntimeError("this pool is closed")
        if self._pending != pending:
            how = "a send() is under way: call recv() first"
            raise RuntimeError(how if pending is None else "recv() needs a send() before it")

    def _begin(self, command, **arguments):
        """Writes the arguments into their arrays, and starts `command` in all workers."""
        self._require(None)
        for name, value in arguments.items():
            put(self._arrays[name], value, name)
        self._arrays["command"][:] = self._pending = command
        for _, go, _, _ in self._workers:
            go.release()

    def _finish(self, command):
        """Waits for what `_begin` began."""
        self._require(command)
        try:
            self._wait(DOING[command], self.timeout)
        except BaseException:  # Ctrl-C too: workers and learner are out of step from here on
            self.close()
            raise
        self._pending = None

    def _wait(self, doing, timeout):
        """Waits until every worker is done. Ten times a second it looks whether one is dead, or
        its time is up (a clock would go on while all are suspended, as by Ctrl-Z)."""
        looks = 0
        for w, (process, _, done, report) in enumerate(self._workers):
            alive, problem = True, ""
            while not problem and not acquire(done, 0.1):
                looks += 1
                if not alive:
                    problem = f"died with exit code {process.exitcode} while {doing}"
                elif looks * 0.1 >= timeout:
                    problem = f"was still {doing} after {timeout:g} s"
                alive = process.is_alive()  # if not, one more look: it may have been done
            if report[0] != b"\0":
                problem = f"raised while {doing}: {report.value.decode(errors='replace')}"
            if problem:
                raise WorkerError(f"{process.name} {problem}", w, process.exitcode)


# ==============================================================================================
# 7. Runs
# ==============================================================================================
# Needs: import functools, hashlib, io, pathlib, pkgutil, zipfile; parts 1, 2, 3, 4, 5, 6, 9
#
# `train` is the loop at the end of part 5, with what makes a run hard to lose and easy to
# follow.
#
# A checkpoint is written before the first update, every few seconds, and after the last. It
# holds all that the future depends on, and takes the old one's place in one step. So Ctrl-C, a
# kill and a power cut are one case: some seconds are lost, and played again, bit for bit.
# (Exactly so for one rank, and environments that have `state`; others begin new episodes.)
#
# The same config gives the same weights, bit for bit, on the same machine, package versions and
# number of threads, with any number of workers: every seed is derived from config.seed.

BARS = {195: "CartPole-v0", 475: "CartPole-v1"}  # mean returns that count as solving them
# Knobs that a resumed run cannot change: what was saved depends on them
KEPT = "env", "seed", "hidden", "num_envs", "norm_obs", "norm_reward"
say = functools.partial(print, flush=True)


def make_env(name: str, num_envs: int):
    """The environments that `--env` names: "CartPole" is part 2's; "games:make_doors" is what
    make_doors in the module games returns for num_envs; any other is Gymnasium's, and so is
    "games:Doors-v1", because it ends in -v and a number."""
    if name == "CartPole":
        return CartPole(num_envs)
    if ":" in name and not name.rpartition("-v")[2].isdigit():
        return pkgutil.resolve_name(name)(num_envs)
    import gymnasium as gym

    def keep(env):  # copies observations: some environments write over the array of final_obs
        return gym.wrappers.TransformObservation(env, np.copy, env.observation_space)

    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    return gym.make_vec(name, num_envs, "sync", vector_kwargs=mode, wrappers=[keep])


def make_envs(config: Config, num_envs: int):
    """The environments of `config`, in workers if it has any. To be closed after use."""
    make, workers = functools.partial(make_env, config.env), min(config.workers, num_envs)
    if not workers:
        return make(num_envs)
    return EnvPool(make, num_envs, workers, timeout=config.timeout)


def evaluate(policy, envs, seed: int, limit: int = 10_000):
    """Plays the first episode of each environment, always taking the most probable action:
    (returns float64 (N,), finished bool (N,)). What has not ended after `limit` steps counts
    with what it had collected."""
    require_same_step(envs)
    returns, finished = np.zeros(envs.num_envs), np.zeros(envs.num_envs, bool)
    obs, _ = envs.reset(seed=seed)
    for _ in range(limit):
        actions = policy.to_env(policy.act(obs, greedy=True))
        obs, reward, terminated, truncated, _ = envs.step(actions)
        returns += np.where(finished, 0, reward)  # later episodes do not count
        finished |= terminated | truncated
        if finished.all():
            break
    return returns, finished


def tell_evaluation(policy, config: Config) -> np.ndarray:
    """Prints the evaluation and the weights' hash; gives the returns, (eval_episodes,)."""
    envs = make_envs(config, config.eval_episodes)
    with torch_threads(config.threads), contextlib.closing(envs):
        returns, finished = evaluate(policy, envs, derive_seeds(config.seed, 0)[3])
    mean, count = f"{returns.mean():.1f} ± {returns.std():.1f}", len(returns)
    cut = "" if finished.all() else f", {np.sum(~finished)} of them cut off after 10,000 steps"
    say(f"evaluation: mean return {mean} over {count} episodes{cut}")
    weights = nn.utils.parameters_to_vector(policy.parameters()).detach().cpu().numpy()
    # Equal hashes mean equal weights, bit for bit.
    say(f"weights: {hashlib.sha256(weights.tobytes()).hexdigest()}")
    return returns


def replace_file(path: pathlib.Path, content: bytes):
    """Writes a file in one step: at any moment, `path` is the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_run(config: Config) -> pathlib.Path:
    """Makes the folder <runs>/<env>-<seed>, or that with -2, -3, ... where it exists."""
    name, count = f"{config.env}-{config.seed}".replace("/", "-").replace(":", "-"), 1
    while True:
        run = pathlib.Path(config.runs, name if count == 1 else f"{name}-{count}")
        with contextlib.suppress(FileExistsError):
            run.mkdir(parents=True)  # fails where it exists, so two runs never share a folder
            return run
        count += 1


def load_checkpoint(run) -> tuple[Config, dict]:
    """The config of the run in the folder `run`, and all that `Run.save` saved. It is loaded as
    data: code hidden in it is not run. ValueError for what is no checkpoint, or is damaged."""
    path = pathlib.Path(run, "checkpoint.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # as torch.save writes it, with checksums
            if archive.testzip() is not None:
                raise ValueError("it is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return Config(**json.loads(saved["config"])), saved
    except Exception as error:  # zipfile and torch raise a mixed bag
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} cannot be loaded as a run's checkpoint: {reason}") from None


def load(run) -> ActorCritic:
    """The policy of the run in the folder `run`. `policy.to_env(policy.act(obs, greedy=True))`
    is what to send for a batch of observations."""
    config, saved = load_checkpoint(run)
    with contextlib.closing(make_env(config.env, 1)) as env:
        spaces = env.single_observation_space, env.single_action_space
    policy = ActorCritic(*spaces, config.hidden, norm_obs=config.norm_obs)
    policy.load_state_dict(saved["learner"]["policy"])
    return policy


class Run:
    """The folder of a run, and what is told of it: log.csv, checkpoint.pt, page.html, and lines
    on the screen. `saved` is the checkpoint that it goes on from, or {}."""

    def __init__(self, folder, learner, saved):
        self.folder, self.learner, self.log = folder, learner, folder / "log.csv"
        # What is kept when the run is resumed: seconds of training, the size of log.csv, how
        # many of BARS were passed, and the learning curve, a point for every `stride` updates
        self.told = {"seconds": 0.0, "log_size": 0, "bars": 0, "stride": 1, "curve": []}
        self.told |= json.loads(saved.get("told", "{}"))
        self.snapshots = saved.get("snapshots", [])  # of the policy, for the page
        # A killed run may have logged more than it had saved; it will play that again.
        with open(self.log, "ab") as file:
            file.truncate(min(self.told["log_size"], file.tell()))
        config = json.dumps(dataclasses.asdict(learner.config), indent=2) + "\n"
        replace_file(folder / "config.json", config.encode())
        updates = learner.total_steps // learner.rollout_steps
        size = f"{updates} updates of {learner.rollout_steps} steps"
        say(f"training {learner.config.env}: {size}; everything is kept in {folder}")
        self.clock = time.monotonic()
        self.keep_snapshot()
        self.save()

    def add(self, row):
        """Logs an update; every few seconds, shows progress and saves."""
        told, config, now = self.told, self.learner.config, time.monotonic()
        told["seconds"], self.clock = told["seconds"] + now - self.clock, now
        row = {**row, "seconds": told["seconds"]}
        with open(self.log, "a") as file:
            if file.tell() == 0:
                print(*row, sep=",", file=file)
            print(*row.values(), sep=",", file=file)
        steps, mean = row["steps"], row["mean_return"]
        if row["update"] % told["stride"] == 0:
            told["curve"].append([steps, mean])
        if len(told["curve"]) > 250:  # every second one goes, however long the run
            told["curve"], told["stride"] = told["curve"][1::2], 2 * told["stride"]
        for bar, name in list(BARS.items())[told["bars"] :]:
            if config.env == "CartPole" and row["episodes"] >= 100 and mean >= bar:
                told["bars"] += 1
                at = f"mean return of 100 episodes, {steps:,} steps, {row['seconds']:.1f} s"
                say(f"passed {bar}, the bar of {name}: {at}")
        self.keep_snapshot()
        total, speed = self.learner.total_steps, row["steps_per_second"]
        if now - self.saved_at >= config.checkpoint_seconds or steps >= total:
            share = f"{steps:>11,} steps  {steps / total:4.0%}   return {mean:.1f}"
            say(f"{share}   {speed:,.0f} steps/s   {max(0, total - steps) / speed:.0f} s left")
            self.save()

    def keep_snapshot(self):
        """Keeps the policy at up to eight moments, for the page (which adds the last)."""
        count = len(self.snapshots)
        if count < 8 and self.learner.steps >= count * self.learner.total_steps / 7:
            policy = copy.deepcopy(self.learner.policy.state_dict())
            self.snapshots.append({"steps": self.learner.steps, "policy": policy})

    def save(self):
        """Replaces the checkpoint and the page."""
        with open(self.log, "ab") as file:
            os.fsync(file.fileno())  # so that no row is missing that the checkpoint counts
            self.told["log_size"], self.saved_at = file.tell(), time.monotonic()
        saved = {
            "config": json.dumps(dataclasses.asdict(self.learner.config)),
            "learner": self.learner.state_dict(),
            "told": json.dumps(self.told),
            "snapshots": self.snapshots,
        }
        # Through memory: torch ends the process if a signal interrupts it in writing a file.
        torch.save(saved, memory := io.BytesIO())
        replace_file(self.folder / "checkpoint.pt", memory.getvalue())
        replace_file(self.folder / "page.html", make_page(saved).encode())


# What `train` returns. Only rank 0 has `returns`, (episodes,) of the evaluation, and `run`, its
# folder.
Result = namedtuple("Result", "policy returns run")


@contextlib.contextmanager
def process_group(device: str):
    """Joins the other ranks, if torchrun started this process and no group exists yet, and
    leaves them in the end. (After a failure torchrun ends them all; leaving would wait for
    ranks that wait for this one.)"""
    group, ours = torch.distributed, False
    if group.is_available() and group.is_torchelastic_launched():
        ours = not group.is_initialized()
    if ours:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        group.init_process_group("nccl" if device == "cuda" else "gloo")
    yield
    if ours:
        group.barrier()
        group.destroy_process_group()


def train(config: Config, *, resume=None) -> Result:
    """Trains as `config` says in a new folder, or goes on with the run in the folder `resume`;
    then evaluates the policy. Under torchrun, together with other ranks.

    Raises ValueError for a run that cannot be resumed, or not with this config; RuntimeError
    for NaN or infinity; WorkerError for a failed worker; OSError where a file cannot be
    written. The last checkpoint is then whole."""
    old, saved = load_checkpoint(resume) if resume else (config, {})
    for name in KEPT:
        before, now = getattr(old, name), getattr(config, name)
        if before != now:
            raise ValueError(f"{resume} has {name} = {before}, which cannot become {now}")
    with (
        process_group(config.device),
        contextlib.closing(make_envs(config, config.num_envs)) as envs,
    ):
        learner = PPO(envs, config)
        if saved:
            learner.load_state_dict(saved["learner"])
        if learner.rank == 0:
            folder = pathlib.Path(resume) if resume else new_run(config)
            run = Run(folder, learner, saved)
        try:
            while learner.steps < learner.total_steps:
                row = learner.update()
                if learner.rank == 0:
                    run.add(row)
        except BaseException:
            if learner.rank == 0:
                say(f"stopped; to go on: python thrust.py --resume {folder}")
            raise
    if learner.rank > 0:
        return Result(learner.policy, np.zeros(0), None)
    say(f"page: {folder / 'page.html'}")
    return Result(learner.policy, tell_evaluation(learner.policy, config), folder)


# ==============================================================================================
# 8. Command line
# ==============================================================================================
# Needs: import argparse, signal; parts 1, 2, 3, 4, 5, 6, 7, 9
#
# Every knob of Config is a flag. Exit codes: 0 when all is done, 2 for a wrong flag, 130 after
# Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 1 for any other failure.

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def stop(number, frame):
    """The first signal raises, so that workers and temporary files are cleared away. A second
    one ends the process, even if an environment's code swallowed the first."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    raise SystemExit(128 + number)


def main(argv=None):
    """Runs the command line, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="thrust.py", usage=argparse.SUPPRESS, allow_abbrev=False,
        description="python thrust.py [--KNOB VALUE ...] [--resume RUN | --evaluate RUN]",
        argument_default=argparse.SUPPRESS,  # so that a flag that was not given leaves no trace
    )  # fmt: skip
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", metavar="RUN", help="go on with the run in the folder RUN")
    either.add_argument("--evaluate", metavar="RUN", help="play the policy in the folder RUN")
    for field in dataclasses.fields(Config):
        kind, text = type(field.default), f"{field.metadata['help']} (default: {field.default})"
        options = {"type": int, "nargs": "*"} if kind is tuple else {"type": kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **options)
    knobs = vars(parser.parse_args(argv))
    resume, evaluated = knobs.pop("resume", None), knobs.pop("evaluate", None)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, stop)
    try:
        run = resume or evaluated
        base = load_checkpoint(run)[0] if run else Config()
        try:
            config = dataclasses.replace(base, **knobs)
        except ValueError as error:
            parser.error(str(error))
        if evaluated:
            tell_evaluation(load(evaluated).to(config.device), config)
        else:
            train(config, resume=resume)
        return 0
    except Exception as error:
        text = str(error) if isinstance(error, (ValueError, RuntimeError)) else in_a_line(error)
        print("thrust:", text.partition("\n")[0], file=sys.stderr)
        return 1
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])


# ==============================================================================================
# 9. Page
# ==============================================================================================
# Needs: import base64, json, sys; parts 1, 2, 3, 4, 5, 6, 7
#
# People would rather look than read a log. So a run has a page: one HTML file that loads
# nothing from anywhere, with the learning curve and, for CartPole, the policy at work. The
# browser computes the physics of part 2 and the networks of part 3, 50 steps a second; a slider
# goes back to what the policy was earlier. Nothing more is said about PPO here.

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Thrust</title>
<style>
  :root { color-scheme: light dark; --accent: #2f80ed; accent-color: var(--accent); }
  body { max-width: 44rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere;
    font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
  button { margin: 0.2rem 0; padding: 0.5rem 0.9rem; font: inherit; }
  label { display: flex; flex-wrap: wrap; column-gap: 1rem; margin-top: 1rem; }
  output { margin-left: auto; }
  input, svg, progress { display: block; width: 100%; touch-action: pan-y; }
  small, text { opacity: 0.75; font-size: 0.8rem; }
  text { fill: currentColor; stroke: Canvas; stroke-width: 4; paint-order: stroke; }
  path, polyline { fill: none; stroke: currentColor; vector-effect: non-scaling-stroke; }
  .faint { opacity: 0.25; }
  .dashed { opacity: 0.6; stroke-dasharray: 4 4; }
  .accent { fill: none; stroke: var(--accent); stroke-width: 2; }
  #pole { stroke-width: 0.07; stroke-linecap: round; vector-effect: none; }
</style>
<h1 id="name"></h1> <p id="summary"></p>
<section id="live" hidden>
  <svg viewBox="-2.6 -1.4 5.2 1.55" role="img" aria-label="a cart with a pole hinged to it">
    <path class="faint" d="M-2.6 0H2.6M-2.4 0V.12M0 0V.12M2.4 0V.12"/>
    <g id="cart">
      <rect x="-.27" y="-.22" width=".54" height=".2" rx=".03" fill="currentColor"/>
      <path class="dashed" d="M-.234 -1.32L0 -.22L.234 -1.32"/>
      <path id="push" class="accent" d="M.35 -.12H.75M.65 -.18L.75 -.12L.65 -.06"/>
      <g transform="translate(0 -.22)"><path id="pole" class="accent" d="M0 0V-1"/></g>
    </g>
  </svg>
  <p><button id="left">← Push</button> <button id="right">Push →</button>
    <button id="pause">Play</button> <button id="again">Start over</button>
    <output id="status"></output></p>
  <label>The policy after <output id="age"></output></label>
  <input id="policy" type="range" min="0" aria-label="the policy, earlier or later in training">
  <label>Probability of a push to the right <output id="probability"></output></label>
  <progress id="bar"></progress>
  <label>Value: discounted reward to come <output id="value"></output></label>
  <label>Position, velocity, angle, angular velocity <output id="state"></output></label>
  <p><small>Keys: ← and → push with 40 N for one step, on top of the policy's own 10 N; space
    pauses; R starts over. The policy takes the more probable action. The game is lost beyond
    the dashed lines, 12°, or the ends of the track, 2.4 m.</small></p>
</section>
<label>Mean return of the last 100 episodes <output id="at"></output></label>
<svg id="chart" height="304"></svg>
<script>
"use strict";
const run = RUN_DATA, P = run.physics, $ = (id) => document.getElementById(id);
const format = (x, notation) => x.toLocaleString("en", {notation, maximumFractionDigits: 2});

// CartPole.step, operation for operation; `force` in newtons
function step([x, speed, angle, spin], force) {
  const sin = Math.sin(angle), cos = Math.cos(angle);
  const temp = (force + P.POLE_MOMENT * (spin * spin) * sin) / P.TOTAL_MASS;
  const turn = (P.GRAVITY * sin - cos * temp)
    / (P.HALF_LENGTH * (P.FOUR_THIRDS - P.POLE_MASS * (cos * cos) / P.TOTAL_MASS));
  const pull = temp - P.POLE_MOMENT * turn * cos / P.TOTAL_MASS;
  return [x + P.TAU * speed, speed + P.TAU * pull, angle + P.TAU * spin, spin + P.TAU * turn];
}
const fallen = ([x, , angle]) => Math.abs(x) > P.X_LIMIT || Math.abs(angle) > P.ANGLE_LIMIT;

// A network whose weights begin at `at`: [its outputs, where its weights end]
function forward(weights, at, sizes, inputs) {
  sizes.slice(1).forEach((size, layer) => {
    const biases = at + inputs.length * size;
    inputs = Array.from({length: size}, (_, i) => {
      const sum = inputs.reduce((sum, x) => sum + weights[at++] * x, weights[biases + i]);
      return layer < sizes.length - 2 ? Math.tanh(sum) : sum;
    });
    at += size;
  });
  return [inputs, at];
}
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt());
const floats = (text) => new Float32Array(bytes(text).buffer);
const policies = run.policies.map((p) => ({...p, weights: floats(p.weights)}));

function think({weights, mean, std}, state) {
  const scaled = state.map((x, i) => (Math.fround(x) - mean[i]) / std[i]);
  const obs = mean.length ? scaled.map((x) => Math.max(-10, Math.min(10, x))) : state;
  const [logits, end] = forward(weights, 0, [4, ...run.hidden, 2], obs);
  const [[value]] = forward(weights, end, [4, ...run.hidden, 1], obs);
  return {right: 1 / (1 + Math.exp(logits[0] - logits[1])), value};  // softmax of two
}

const live = {};
function begin() {
  live.state = [0, 0, 0, 0].map(() => Math.random() * 0.1 - 0.05);
  live.policy = policies[$("policy").value];
  Object.assign(live, {steps: 0, push: 0, arrow: 0, rest: 50});
  draw();
}
function advance() {
  if (fallen(live.state)) return --live.rest || begin();  // after a second on the ground
  const force = P.FORCES[live.thought.right > 0.5 ? 1 : 0] + 40 * live.push;
  Object.assign(live, {state: step(live.state, force), steps: live.steps + 1, push: 0});
  draw();
}
function push(arrow) {
  Object.assign(live, {push: live.push + arrow, arrow, shown: live.steps + 15});
  draw();
}
function draw() {
  const {state, steps, policy} = live, {right, value} = live.thought = think(policy, state);
  $("cart").setAttribute("transform", `translate(${state[0]})`);
  $("pole").setAttribute("transform", `rotate(${state[2] * 180 / Math.PI})`);
  $("push").setAttribute("transform", `scale(${steps < live.shown ? live.arrow : 0} 1)`);
  $("status").textContent = `${fallen(state) ? "fell at step" : "step"} ${format(steps)}`;
  $("age").textContent = `${format(policy.steps)} steps`;
  $("probability").textContent = right.toFixed(3);
  $("bar").value = right;
  $("value").textContent = value.toFixed(1);
  $("state").textContent = state.map((x) => x.toFixed(2)).join(", ");
}
function toggle() {
  live.timer = live.timer ? clearInterval(live.timer) : setInterval(advance, 20);
  $("pause").textContent = live.timer ? "Pause" : "Play";
}
const buttons = {left: () => push(-1), right: () => push(1), pause: toggle, again: begin};
const keys = {ArrowLeft: "left", ArrowRight: "right", " ": "pause", r: "again", R: "again"};
function press(event) {
  const taken = event.target.closest(event.key === " " ? "button" : "input");
  if (taken || event.ctrlKey || event.altKey || event.metaKey || !keys[event.key]) return;
  event.preventDefault();
  buttons[keys[event.key]]();
}

function ticks(low, high, most) {  // round numbers, from `low` or a little below
  const least = (high - low) / most, power = 10 ** Math.floor(Math.log10(least));
  const gap = power * [1, 2, 5, 10].find((f) => f * power >= least);
  const first = Math.floor(low / gap), last = Math.floor(high / gap);
  return Array.from({length: last - first + 1}, (_, i) => (first + i) * gap);
}
function chart({clientX = 1e6} = {}) {  // with the value at the pointer, or else the last
  const points = run.curve.filter(([, value]) => !isNaN(value));
  const values = [0, 1, ...points.map(([, value]) => value), ...run.bars.map(([bar]) => bar)];
  const high = Math.max(...values), rows = ticks(Math.min(...values), high, 6);
  const box = $("chart").getBoundingClientRect(), right = box.width - 20;
  const x = (steps) => 44 + steps / run.end * (right - 44);
  const y = (value) => 20 + (high - value) / (high - rows[0]) * 240;
  const text = (x, y, at, what) => `<text x="${x}" y="${y}" text-anchor="${at}">${what}</text>`;
  const short = (value) => format(value, "compact");
  const rule = (value, kind) => `<path class="${kind}" d="M44 ${y(value)}H${right}"/>`;
  const far = ([steps]) => Math.abs(box.left + x(steps) - clientX);
  const read = points.reduce((best, p) => far(p) < far(best) ? p : best, points[0]);
  $("at").textContent = read ? `${format(read[1])} at ${format(read[0])} steps` : "none yet";
  $("chart").innerHTML = [
    ...rows.map((v) => rule(v, "faint") + text(36, y(v) + 4, "end", short(v))),
    ...ticks(0, run.end, right / 80).map((v) => text(x(v), 280, "middle", short(v))),
    text(right, 298, "end", "environment steps"),
    `<polyline class="accent" points="${points.map(([s, v]) => [x(s), y(v)]).join(" ")}"/>`,
    read ? `<circle class="accent" cx="${x(read[0])}" cy="${y(read[1])}" r="4"/>` : "",
    ...run.bars.map(([bar, name]) => rule(bar, "dashed")
      + text(right, y(bar) + (y(bar) < 140 ? 16 : -6), "end", `${bar} solves ${name}`)),
  ].join("");
}

$("name").textContent = document.title = run.name;
$("summary").textContent = run.summary;
if (policies.length) {
  for (const id in buttons) $(id).onclick = buttons[id];
  document.onkeydown = press;
  $("policy").max = $("policy").value = policies.length - 1;
  $("policy").oninput = begin;
  $("live").hidden = false;
  begin();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) toggle();
}
$("chart").onpointermove = $("chart").onpointerdown = chart;
new ResizeObserver(() => chart()).observe($("chart"));
</script>
</html>
"""


def make_page(saved: dict) -> str:
    """The page of a run, as HTML, from what its checkpoint holds."""
    config, told = Config(**json.loads(saved["config"])), json.loads(saved["told"])
    steps, bars, policies = saved["learner"]["counts"][1], list(BARS.items()), []
    moments = [(m["steps"], m["policy"]) for m in saved["snapshots"] if m["steps"] < steps]
    moments.append((steps, saved["learner"]["policy"]))
    if config.env != "CartPole":  # Gymnasium, if it is used, has been imported by now
        known = getattr(sys.modules.get("gymnasium"), "registry", {})
        threshold = getattr(known.get(config.env.rpartition(":")[2]), "reward_threshold", None)
        bars, moments = [] if threshold is None else [(threshold, config.env)], []
    for at, policy in moments:
        names = [name for name in policy if name.startswith(("actor", "critic"))]
        arrays = [policy[name].cpu().flatten() for name in names]
        weights = base64.b64encode(torch.cat(arrays).numpy().tobytes()).decode()
        mean, var = (policy.get(f"normalizer.{k}", torch.ones(0)) for k in ("mean", "var"))
        scale = {"mean": mean.tolist(), "std": var.clamp(min=1e-8).sqrt().tolist()}
        policies.append({"steps": at, "weights": weights, **scale})
    data = {
        "name": f"{config.env}, seed {config.seed}",
        "end": (end := max(steps, config.num_updates * config.batch_size)),
        "summary": f"Trained by Thrust for {steps:,} of {end:,} steps.",
        "curve": told["curve"],
        "bars": bars,
        "physics": {k: v.tolist() for k, v in vars(CartPole).items() if hasattr(v, "tolist")},
        "hidden": config.hidden,
        "policies": policies,
    }
    # A string may have \u003c for <, so that no </script> in it ends the script.
    return PAGE.replace("RUN_DATA", json.dumps(data).replace("<", "\\u003c"))


if __name__ == "__main__":
    gc.freeze()  # what was imported stays: to look for garbage in it at the end takes 0.2 s
    sys.exit(main())
