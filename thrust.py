# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24,<2.5", "torch>=1.13,<=2.13.0"]
# ///
# Thrust 3.0, MIT licence, copyright 2026 the Thrust authors
"""Thrust: PPO in one file, to be read from top to bottom, copied from, and run.

PPO, Proximal Policy Optimization, trains a neural network to act. It lets the network play,
works out which of its actions led to more reward than expected, and makes those a little more
probable. Only a little, because what was learned from one way of playing is no longer true once
the way of playing has changed.

This is not a framework: no recurrent networks, replay memory, self-play, hyperparameter sweeps,
callbacks or plugins. It needs NumPy and PyTorch; Gymnasium, if it is there, has more games.
"Needs", at the head of parts 1 to 7, lists what a copy imports, and parts to copy with it.

    python thrust.py                     train on CartPole, to 500 of 500 points in seconds
    python thrust.py --env Acrobot-v1    train on another environment, here Gymnasium's
    python thrust.py --help              every knob and its default

PPO in six steps (words and letters below). `PPO.update`, in part 5, has the same numbers:

    1. Collect.    Let the policy play T steps in N environments at once; keep all of it.
    2. Value.      Ask a second network, the critic, how much reward to expect from each state.
    3. Advantage.  Work out, for every action, how much better it went than expected. (In a good
                   state much reward follows whatever one does; only the difference tells.)
    4. Improve.    Go over the data a few times, in small shuffled batches: make actions that
                   went better than expected more probable and the others less, but stop pushing
                   where a probability has moved far enough; and correct the critic.
    5. Measure.    How well did the policy play, and was the update healthy?
    6. Repeat.     The data is thrown away: the policy that played it no longer exists.

Words. An *environment* is what is played. What is seen of its *state* s is an *observation*, or
obs; what it does is an *action* a; what it is paid for one step is a *reward* r. These, and the
observation that follows, make one *transition*. An *episode* is one game from start to end; a
*rollout* is T steps of all N, wherever games begin or end. The *policy* π(a|s) gives each
action a probability, and the player draws from those. The *return* is the sum of an episode's
rewards; the *value* of a state is the sum of rewards that the policy can expect from there,
later ones counting less; the *advantage* of an action is how much more than that it brings. An
*epoch* is one pass over a rollout, in pieces called *minibatches*.

    N  environments played side by side         γ  discount: a reward k steps away counts γᵏ
    T  steps of each of them in a rollout       λ  1: advantages trust rewards seen,
    B  = T·N, the transitions in a rollout         0: those that are expected (part 4)
    M  transitions in a minibatch               ε  how far a probability is pushed (part 5)
    V, Â  estimated value and advantage         δ  one step's surprise (part 4)
"""

import dataclasses
import math
import time
from collections import deque, namedtuple
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ==============================================================================================
# 1. Config
# ==============================================================================================
# Needs: import dataclasses, numpy as np; from typing import Any
# Each knob stands here once: its default, the text that --help prints, the lowest and the
# highest value. CARTPOLE, below, has the command line's defaults for that game: it is so small
# that large minibatches and a large learning rate work best.


def knob(default: Any, help: str, low: Any = None, high: float = 1e30) -> Any:
    """A field of Config. A number has the type of `low`, and is from `low` to `high`."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (low, high)})


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Raises ValueError if one has a wrong type or is out of range."""

    env: str = knob("CartPole", "CartPole, an id of Gymnasium's, or module:callable(num_envs)")
    seed: int = knob(0, "the number that every random draw is derived from", 0)
    total_steps: int = knob(1_000_000, "steps to train for, of all environments together", 1)
    num_envs: int = knob(16, "environments played side by side (N)", 1, 10**6)
    num_steps: int = knob(128, "steps per rollout (T); few: trusts the critic more", 1, 10**6)
    minibatch_size: int = knob(256, "transitions per gradient step, at most (M)", 3)
    epochs: int = knob(10, "passes over a rollout; many: its data no longer fits the policy", 1)
    learning_rate: float = knob(1e-3, "Adam's; too large: what was learned is lost", 0.0)
    anneal: bool = knob(True, "lower the learning rate, update by update, towards 0")
    gamma: float = knob(0.99, "discount γ; about the next 1/(1-γ) steps count", 0.0, 1)
    gae_lambda: float = knob(0.95, "λ; 0: trust expected rewards, 1: only rewards seen", 0.0, 1)
    clip: float = knob(0.2, "ε; a probability moved by this share is pushed no further", 0.0, 1)
    ent_coef: float = knob(0.0, "weight of entropy: a reward for being undecided", 0.0)
    vf_coef: float = knob(0.5, "weight of the critic's squared error", 0.0)
    max_grad_norm: float = knob(0.5, "longer gradients are shrunk to this; 0: none is", 0.0)
    target_kl: float = knob(0.0, "end an update if KL (part 5) is above this; 0: never", 0.0)
    norm_obs: bool = knob(True, "scale Box observations to mean 0 and standard deviation 1")
    norm_reward: bool = knob(True, "divide rewards by the deviation of their discounted sums")
    hidden: tuple = knob((64, 64), "widths of each network's hidden layers", 1, 10**5)
    device: str = knob("cpu", "where the networks learn: cpu or cuda")
    threads: int = knob(1, "torch's threads; more would slow down such small networks", 1, 1024)
    workers: int = knob(0, "processes that step the environments; 0: this process", 0)
    timeout: float = knob(60.0, "seconds that a worker may take for one step", 0.0)
    runs: str = knob("runs", "folder in which runs are kept")
    checkpoint_seconds: float = knob(2.0, "least seconds between checkpoints", 0.0)
    eval_episodes: int = knob(100, "episodes played after training", 1, 10**6)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            given, (low, high) = getattr(self, field.name), field.metadata["range"]
            several = type(field.default) is tuple
            kind = type(field.default if low is None else low)
            values = np.ravel(given).tolist()  # NumPy's numbers become Python's
            values = [float(x) if (kind, type(x)) == (float, int) else x for x in values]
            fits = all(type(x) is kind and (low is None or low <= x <= high) for x in values)
            if not fits or np.ndim(given) != int(several):
                rule = f"a tuple of {kind.__name__}" if several else kind.__name__
                rule += "" if low is None else f" from {low} to {high}"
                raise ValueError(f"{field.name} must be {rule}; got {given!r}")
            object.__setattr__(self, field.name, tuple(values) if several else values[0])
        if not 2 <= self.batch_size <= self.total_steps:
            size = f"one rollout, num_envs * num_steps = {self.batch_size},"
            raise ValueError(f"{size} must be from 2 to total_steps = {self.total_steps}")

    @property
    def batch_size(self) -> int:
        """B: the transitions in one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Rollouts in total_steps; what is left over is not played."""
        return self.total_steps // self.batch_size


CARTPOLE = {
    "num_envs": 64, "num_steps": 32, "minibatch_size": 512, "epochs": 3, "gamma": 0.98,
    "learning_rate": 6e-3, "norm_obs": False, "norm_reward": False, "total_steps": 200_000,
}  # fmt: skip


# ==============================================================================================
# 2. CartPole
# ==============================================================================================
# Needs: import math, numpy as np; from collections import namedtuple
# A pole stands on a cart, hinged at its foot. At every step, 50 times a second, the player
# pushes the cart with a fixed force to the left (action 0) or to the right (action 1), and is
# paid 1. The game is lost if the pole leans more than 12 degrees or the cart leaves the track.
#
# An episode can end in two ways, and the difference matters in part 4:
#
#   terminated   the game itself is over: the pole fell. No reward can follow from here.
#   truncated    the game was cut off: here, after 500 steps. The pole still stands, and more
#                reward would have followed; it is just not going to be played.
#
# Both flags belong to the step that ended the episode, not to the one after. The environment
# itself begins the next game, within that same step (Gymnasium's name for it is SAME_STEP), so
# no environment is idle: `obs` is then the first observation of the next game, and the last
# one of the game that ended is in `info["final_obs"]`, in the same row. Gymnasium is the
# library in which most environments are published; its CartPole and this one agree bit for bit.

# Spaces say what observations and actions look like, in Gymnasium's words: a Box holds arrays
# of numbers from low to high, a Discrete n whole numbers, from start on.
Box = namedtuple("Box", "low high shape dtype", defaults=[np.float32])
Discrete = namedtuple("Discrete", "n start shape dtype", defaults=[0, (), np.int64])


class CartPole:
    """N independent CartPoles, with the interface of a Gymnasium vector environment.

    Observations are float32 (N, 4): the cart's position x (m) and velocity ẋ (m/s), the pole's
    angle θ (rad, clockwise) and angular velocity θ̇ (rad/s). Actions are integers (N,), 0 or 1.
    Rewards are float64 (N,), always 1. What `reset` and `step` return is never overwritten. The
    equations are Barto, Sutton and Anderson's (1983), without friction, as corrected by Florian
    (2007); the order of operations is Gymnasium's, as another would round differently."""

    # 0-d arrays: converting Python's numbers would take a tenth of a step's time at N = 64
    GRAVITY, TAU = np.array(9.8), np.array(0.02)  # m/s²; s from one step to the next
    POLE_MASS, TOTAL_MASS = np.array(0.1), np.array(0.1 + 1.0)  # kg; the latter with the cart
    HALF_LENGTH = np.array(0.5)  # m, from the hinge to the pole's centre of mass
    POLE_MOMENT = np.array(0.1 * 0.5)  # kg·m, mass times half length
    FOUR_THIRDS = np.array(4.0 / 3.0)  # a rod 2l long, turned at its end: 4/3·m·l²
    FORCES = np.array([-10.0, 10.0])  # newtons, of action 0 and action 1
    X_LIMIT, ANGLE_LIMIT = np.array(2.4), np.array(12 * 2 * math.pi / 360)  # m, rad
    ONE, BLOCK = np.array(1), 128  # one step; how many start states are drawn in one call

    metadata = {"autoreset_mode": "SameStep"}  # the value of SAME_STEP

    def __init__(self, num_envs: int, max_episode_steps: int = 500):
        self.num_envs, self.max_episode_steps = num_envs, np.array(max_episode_steps)
        high = np.array([2 * self.X_LIMIT, np.inf, 2 * self.ANGLE_LIMIT, np.inf], np.float32)
        self.single_observation_space = Box(-high, high, high.shape)  # twice the limits
        self.single_action_space = Discrete(2)
        self._state = np.zeros((4, num_envs))  # rows: x, ẋ, θ, θ̇
        self._reward = np.ones(num_envs)
        # Steps of the running episodes, episodes begun, and seeds
        self._steps, self._episodes, self._seeds = np.zeros((3, num_envs), np.int64)
        self._starts = np.zeros((num_envs * self.BLOCK, 4))  # drawn in advance, in blocks
        self.reset(seed=int(np.random.SeedSequence().generate_state(1)[0]))  # unpredictable

    def reset(self, *, seed: int | None = None, options: None = None):
        """Begins an episode everywhere: (obs, {}). Environment i draws its start states from a
        generator seeded seed + i; without a seed, each takes its next start state."""
        if seed is not None:
            self._seeds[:], self._episodes[:] = range(seed, seed + self.num_envs), 0
            self.set_state(self.state())  # makes the generators
        self._begin_episodes(np.arange(self.num_envs))
        return self._observe(), {}

    def step(self, actions: np.ndarray):
        """Pushes every cart once: (obs, reward, terminated, truncated, info). Where episodes
        ended, `info` has "final_obs": float32 (N, 4), and "_final_obs": bool (N,), its rows
        that count. Raises ValueError unless actions are (N,) integers 0 or 1."""
        actions = np.asarray(actions)
        whole = actions.shape == (self.num_envs,) and actions.dtype.kind in "iu"
        # In one call: the bitwise or of all is 0 or 1 if and only if each of them is.
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
        obs, info, ended = self._observe(), {}, terminated | truncated
        if len(rows := ended.nonzero()[0]):
            info = {"final_obs": obs, "_final_obs": ended}
            self._begin_episodes(rows)
            obs = self._observe()
        return obs, self._reward.copy(), terminated, truncated, info

    def close(self):
        """There is nothing to release."""

    def state(self) -> dict[str, np.ndarray]:
        """Copies of all that the future depends on, N rows each: to resume a run exactly."""
        arrays = self._state.T, self._steps, self._episodes, self._seeds
        return dict(zip(("state", "steps", "episodes", "seeds"), map(np.copy, arrays)))

    def set_state(self, state: dict[str, np.ndarray]):
        """Goes on from what `state` returned, in this or in another CartPole of N poles."""
        self._state.T[:], self._steps[:] = state["state"], state["steps"]
        self._episodes[:], self._seeds[:] = state["episodes"], state["seeds"]
        drawn = self._episodes // self.BLOCK * self.BLOCK * 4  # random numbers used before
        pairs = zip(self._seeds.tolist(), drawn.tolist())
        bits = [np.random.PCG64(seed).advance(count) for seed, count in pairs]
        self._generators = [np.random.Generator(each) for each in bits]
        self._draw_starts((self._episodes % self.BLOCK > 0).nonzero()[0])

    def _observe(self):
        return self._state.T.astype(np.float32)  # (N, 4)

    def _begin_episodes(self, rows):  # (k,) of the environments
        episodes = self._episodes[rows]
        place = episodes % self.BLOCK
        if np.count_nonzero(place) < len(place):  # some block is used up
            self._draw_starts(rows[place == 0])
        self._state.T[rows] = self._starts.take(rows * self.BLOCK + place, axis=0)
        self._episodes[rows], self._steps[rows] = episodes + self.ONE, 0

    def _draw_starts(self, rows):
        """The start states of the next episodes. (128 draws take twice as long as one.)"""
        for i in rows:
            starts = self._generators[i].uniform(-0.05, 0.05, (self.BLOCK, 4))
            self._starts[i * self.BLOCK : (i + 1) * self.BLOCK] = starts


# ==============================================================================================
# 3. ActorCritic
# ==============================================================================================
# Needs: import math, numpy as np, torch, torch.nn.functional as F; from torch import nn; part 6
# Two networks look at the same observation. The *actor* is the policy: it gives each action a
# probability, and is all that is needed to play. (Its outputs are called logits; softmax,
# exp(logit) divided by the sum of all exp(logit), makes them probabilities.) The *critic*
# estimates the value: how much reward, later rewards discounted, the policy will still collect
# from here. It is needed only to train, because "better than expected" takes somebody who
# expects. They share no weights: the critic's gradients are large, and would shape common
# layers for predicting rewards, at the cost of the actor.
#
# Initial weights are orthogonal, so that signals neither explode nor vanish at the start. The
# gains by which they are multiplied are customary in PPO: √2 in hidden layers, 1 for the
# critic's output, and 0.01 for the actor's, so that all actions are almost equally probable.


def mlp(sizes, gain):
    """mlp([4, 64, 64, 2], ...) is 4 → 64 → tanh → 64 → tanh → 2; `gain` is the last layer's."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        linear = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(linear.weight, math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    nn.init.orthogonal_(linear.weight, gain)  # the last one again, with its own gain
    return nn.Sequential(*layers[:-1])


class Choice(nn.Module):
    """How one action among n is drawn, and its probability found. (Part 6 has other kinds.)"""

    def __init__(self, space):
        super().__init__()
        self.space, self.num_outputs = space, int(space.n)

    def draw(self, logits, greedy, generator):  # NumPy's, (k rows, n) → int64 (k,), from 0
        # Gumbel-max: argmax(logit + Gumbel noise) is a draw from softmax(logits)
        noise = 0 if greedy else generator.gumbel(size=logits.shape)
        return (logits + noise).argmax(-1)

    def judge(self, logits, action):  # tensors → log π(a|s) and entropy, (k,) each
        logprobs = logits.log_softmax(-1)  # (k, n)
        logprob = -F.nll_loss(logprobs, action, reduction="none")  # (k,) of `action`
        # Entropy, -Σ π·log π: log n if all n actions are equally probable, 0 if one is certain
        return logprob, -(logprobs.exp() * logprobs).sum(-1)

    def to_env(self, action):  # as the environment counts
        return (action + getattr(self.space, "start", 0)).astype(self.space.dtype)


class ActorCritic(nn.Module):
    """A policy, and the value of the states that it visits.

    observation_space  Box of any shape (flattened) or Discrete (one-hot)
    action_space       Discrete, MultiDiscrete, MultiBinary or Box
    hidden             widths of the hidden layers, of the actor's and of the critic's
    seed               of the initial weights; torch's global generator is left as it was
    norm_obs           normalise observations of a Box first (part 6)

    Observations are arrays or tensors, (k, *observation shape). ValueError for other spaces."""

    def __init__(
        self, observation_space, action_space, hidden=(64, 64), *, seed=0, norm_obs=False
    ):
        super().__init__()
        box = Normalizer if norm_obs else lambda space: nn.Flatten()  # Normalizer etc.: part 6
        self.encoder = by_kind(observation_space, {"Box": box, "Discrete": OneHot})
        self.actions = by_kind(action_space, ACTIONS)
        inputs = int(getattr(observation_space, "n", math.prod(observation_space.shape)))
        self.register_buffer("like", torch.zeros(()), persistent=False)  # tells dtype, device
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA too
            self.actor = mlp([inputs, *hidden, self.actions.num_outputs], 0.01)
            self.critic = mlp([inputs, *hidden, 1], 1.0)

    def encode(self, obs):  # (k, *observation shape) → (k, inputs)
        return self.encoder(torch.as_tensor(obs, device=self.like.device)).to(self.like)

    def forward(self, obs):
        """The actor's outputs, (k, num_outputs), and V of each observation, (k,)."""
        x = self.encode(obs)
        return self.actor(x), self.critic(x).squeeze(-1)

    @torch.no_grad()
    def act(self, obs, *, greedy=False, generator=None) -> np.ndarray:
        """An action for each observation, (k, *action shape), for `to_env`: the most probable
        if greedy, else drawn with a NumPy generator (None: a new, unseeded one)."""
        generator = generator or (None if greedy else np.random.default_rng())
        return self.actions.draw(self.actor(self.encode(obs)).cpu().numpy(), greedy, generator)

    def evaluate(self, obs, action):
        """What the networks now say of actions taken: (logprob, entropy, value), (k,) each."""
        outputs, value = self(obs)
        return *self.actions.judge(outputs, action), value

    def value(self, obs):
        """V of each observation, (k,)."""
        return self.critic(self.encode(obs)).squeeze(-1)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Actions as drawn → as the environment takes them."""
        return self.actions.to_env(action)


# ==============================================================================================
# 4. Rollout
# ==============================================================================================
# Needs: import numpy as np, torch; from typing import NamedTuple
# T steps of N environments. A transition keeps the observation that its action was chosen from,
# and the one that it led to. One environment; s is what is seen of a state, z in the next game:
#
#                  t = 0    1    2    3    4
#     obs             s0   s1   s2   z0   z1      (T, N, *observation shape)
#     action          a0   a1   a2   b0   b1      (T, N, *action shape)
#     reward          r0   r1   r2   q0   q1      (T, N)
#     ended            ·    ·    ■    ·    ·      (T, N): ■ terminated or truncated
#     next_obs        s1   s2   s3   z1   z2      (T, N, *observation shape)
#
# Action a2 ended its game. The environment began the next one within that step and returned z0,
# which has nothing to do with a2; s3, to which a2 really led, was in `final_obs`.
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
# V(s_t). γ keeps the sums of endless games finite; what happens much later says little anyway.
#
# Putting V(s') in the place of rewards that were not seen is called bootstrapping. Rewards
# break off in three ways. After *terminated* none are left, and V(s') counts as 0. After
# *truncated* there would have been some, and V(s') counts. At the end of the rollout the game
# goes on, and V(s') counts as well. In all three the sum of surprises stops. If a time limit is
# taken for a fall, the critic learns that 500 steps of balance end in disaster, with nothing in
# the observation to tell when (arXiv:1712.00378).
#
# V + Â, what was expected plus how much better it went, is the critic's target. It is called
# "returns", but unlike an episode's return it is discounted and partly bootstrapped.


def gae(rewards, values, next_values, terminated, truncated, gamma, lam):
    """Generalized Advantage Estimation, arXiv:1506.02438, equations 11 and 16: (advantages,
    returns). All arrays are NumPy's, (T, N): faster here than torch's.

    values, next_values    V(s_t) and V(s'_t), the latter without effect where terminated
    terminated, truncated  bool: step t ended the game; it was cut off then (or both)

    Three steps of one environment, γ = λ = ½, the last one a termination, so that the 9.0 has
    no effect; δ = (0, 0, -1):

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


class Rollout:
    """One rollout, until the next overwrites it. `action`: N of any, for shape and dtype."""

    def __init__(self, num_steps: int, envs, action: np.ndarray):
        shape, space = (num_steps, envs.num_envs), envs.single_observation_space
        self.obs, self.next_obs = np.zeros((2, *shape, *space.shape), space.dtype)
        self.action = np.zeros((num_steps, *action.shape), action.dtype)
        self.reward = np.zeros(shape)
        self.terminated, self.truncated = np.zeros((2, *shape), bool)


# ==============================================================================================
# 5. PPO
# ==============================================================================================
# Needs: import math, time; from collections import deque; parts 1, 3, 4, 6
# The policy gradient in one sentence: change the weights so that the log-probability of each
# action taken rises in proportion to its advantage. Why? In a state, a changed π brings Σ π·Â
# more than the old one, whose Â it is; a sum over actions. As ∇log π = ∇π / π, the gradient of
# that is Σ π·(Â·∇log π), the mean of Â·∇log π over actions drawn from π. So this is right only
# for the policy that took the actions, hence for one small gradient step. But data is costly,
# and PPO wants many gradient steps from the same data. For that it needs two things.
#
# A *ratio*. After the first gradient step, the policy is no longer the one that played. So each
# action is weighted by how much more probable it has become: ratio = π(a|s) / π_old(a|s). Then
# the mean of ratio·Â over the actions that the old policy took estimates the mean Â of those
# that the new one would take in the same states. (That it would also come to other states is
# ignored: one more reason to stay close.) Say left has Â = +1, right has Â = -1, and the old
# policy takes each half of the time; a new one that goes left in 8 of 10 cases has a mean of
# 0.8·1 - 0.2·1 = 0.6. The old one's data says the same: with ratios 0.8/0.5 = 1.6 and 0.2/0.5 =
# 0.4, the mean of 1.6 and -0.4 is 0.6. Where a ratio is 1, its gradient is ∇log π, as before.
#
# A *clip*. Nothing yet keeps the optimiser from making one lucky action a hundred times more
# probable, although at that distance from the data the estimate is worth nothing. So the ratio
# is held constant outside 1 ± ε, and a constant has no gradient: once an action has gained (or
# lost) a share ε of its probability, there is nothing more to win from it until fresh data
# speaks. But steps for the sake of other actions can also carry a ratio out of the band the
# wrong way, against the sign of Â; there the gradient that brings it back must remain. The
# *smaller* of the unclipped and the clipped term does all of this:
#
#                     ratio < 1-ε             within the band        ratio > 1+ε
#         Â > 0       ratio·Â: pull it back   ratio·Â: push it up    (1+ε)·Â: enough
#         Â < 0       (1-ε)·Â: enough         ratio·Â: push it down  ratio·Â: pull it back
#
#     objective =  mean( min( ratio·Â, clip(ratio, 1-ε, 1+ε)·Â ) )
#                 - vf_coef · mean( (V - returns)² )  +  ent_coef · mean( entropy )
#
# Entropy is how undecided the policy is; a little reward for it keeps the policy trying. And
# vf_coef matters though no weights are shared: long gradients of both are shrunk as one.


def ppo_loss(policy, batch: Batch, config: Config, measure: bool = True):
    """The loss of arXiv:1707.06347, equations 7 and 9, on one minibatch: (a scalar to descend,
    a dict of scalars for the log, which is empty unless `measure`)."""
    logprob, entropy, value = policy.evaluate(batch.obs, batch.action)  # (M,) each
    shapes = {x.shape for x in (logprob, entropy, value, batch.logprob, batch.advantage)}
    assert shapes == {batch.returns.shape}, f"(M, 1) with (M,) would make (M, M): {shapes}"
    # Mean 0, deviation 1, however large rewards are. A number subtracted from all Â may turn a
    # sign, but not the expected gradient while ratios are 1: in every state, Σ ∇π = 0.
    std, mean = torch.std_mean(batch.advantage)
    advantage = (batch.advantage - mean) / (std + 1e-8)
    log_ratio = logprob - batch.logprob
    ratio = log_ratio.exp()  # π(a|s) / π_old(a|s)
    # mean( min( ratio·Â, clip(ratio, 1-ε, 1+ε)·Â ) ). Only one edge of the clip can be the
    # smaller term, the table's "enough": (1+ε)·Â if Â > 0, (1-ε)·Â if Â < 0.
    enough = advantage + config.clip * advantage.abs()
    surrogate = torch.min(ratio * advantage, enough).mean()
    value_loss = F.mse_loss(value, batch.returns)
    loss = config.vf_coef * value_loss - surrogate  # minus the objective
    if config.ent_coef:
        loss = loss - config.ent_coef * entropy.mean()
    if not measure:
        return loss, {}
    with torch.no_grad():
        # KL(π_old ‖ π), the Kullback-Leibler divergence, says how far the policy has moved: the
        # mean of -log ratio over the old policy's actions. Adding ratio - 1, whose mean there
        # is Σ π_old·(π/π_old) - 1 = 0, makes every term 0 or more, and so the estimate steadier
        # (Schulman 2020, "Approximating KL divergence").
        return loss, {
            "policy_loss": -surrogate.detach(),  # near 0: advantages have mean 0
            "value_loss": value_loss.detach(),  # may rise while returns still grow
            "approx_kl": (ratio - 1 - log_ratio).mean(),  # while it learns, 0.001 to 0.03
            "clip_fraction": ((ratio - 1).abs() > config.clip).float().mean(),  # outside
        }


class Adam:
    """Adam (arXiv:1412.6980) steps against m, a running mean of the gradients g, divided by the
    root of v, a running mean of g²: so all weights move about equally fast. Long gradients are
    shrunk first, as one huge g² would keep v large, and steps tiny, for long. All gradients are
    one vector here. (torch.optim.Adam would import torch's compiler, which takes a second.)"""

    def __init__(self, parameters, average=None):
        self.parameters, self.steps = list(parameters), 0
        self.average = average or (lambda tensor: tensor)
        self.sizes = [p.numel() for p in self.parameters]
        self.m, self.v = torch.zeros(2, sum(self.sizes))

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Shrinks a gradient longer than `max_grad_norm`, unless that is 0, steps, and returns
        its length before. If that is NaN or infinite, RuntimeError, and no weight moves."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        g = self.average(torch.cat([grad.reshape(-1) for grad in grads]))
        norm = torch.linalg.vector_norm(g).item()
        if not math.isfinite(norm):
            causes = "a learning rate or rewards that are too large, or NaN from an environment"
            raise RuntimeError(f"the gradient's length is {norm}; usual causes are {causes}")
        if 0 < max_grad_norm < norm:
            g *= max_grad_norm / norm
        self.steps += 1
        # m ← β₁·m + (1 - β₁)·g;  v ← β₂·v + (1 - β₂)·g², with β₁ = 0.9, β₂ = 0.999
        self.m = self.m.to(g).lerp_(g, 1 - 0.9)
        self.v = self.v.to(g).lerp_(g * g, 1 - 0.999)
        # Both began at 0, and are too small at first: m̂ = m / (1 - β₁ⁿ), v̂ = v / (1 - β₂ⁿ)
        rate, root = learning_rate / (1 - 0.9**self.steps), math.sqrt(1 - 0.999**self.steps)
        # w ← w - learning rate · m̂ / (√v̂ + 1e-5); the last number is customary in PPO
        changes = self.m / (self.v.sqrt() / root + 1e-5)
        for p, change in zip(self.parameters, changes.split(self.sizes)):
            if p.grad is not None:  # else it is frozen, or was not used
                p.sub_(change.view_as(p), alpha=rate)
        return norm


class PPO:
    """The learner. `update` improves `policy` by one rollout; `steps` counts environment steps.

    envs     a vector environment in SAME_STEP mode, which nobody else steps from now on
    policy   a module with `act`, `evaluate`, `value` and `to_env`; None: an ActorCritic
    average  returns a tensor's mean over all processes that train together (part 8)

    RuntimeError for NaN, infinity, and parameters that were replaced after this was made."""

    def __init__(self, envs, config: Config, policy=None, *, average=None):
        require_same_step(envs)  # in part 6, as derive_seed, RewardScale, put and put_step are
        if envs.num_envs != config.num_envs:
            raise ValueError(f"config.num_envs is {config.num_envs}, envs has {envs.num_envs}")
        if policy is None:
            spaces = envs.single_observation_space, envs.single_action_space
            seed, norm_obs = derive_seed(config.seed, 0), config.norm_obs
            policy = ActorCritic(*spaces, config.hidden, seed=seed, norm_obs=norm_obs)
        self.envs, self.config, self.policy = envs, config, policy.to(config.device).eval()
        self.adam = Adam(policy.parameters(), average)
        self.scale_rewards = RewardScale(config, average) if config.norm_reward else None
        self.steps = self.episodes = self.updates = 0
        self.recent: deque = deque(maxlen=100)  # (return, length) of finished episodes
        self.begin_episodes()
        self.rollout = Rollout(config.num_steps, envs, policy.act(self.obs, greedy=True))

    def begin_episodes(self):
        """Begins new episodes and a new generator, seeded by the number of this update."""
        draws, games = (derive_seed(self.config.seed, i, self.updates) for i in (1, 2))
        self.generator, self.obs = np.random.default_rng(draws), self.envs.reset(seed=games)[0]
        self.running = np.zeros((2, self.config.num_envs))  # return, length of those episodes

    def update(self) -> dict:
        """Plays one rollout, improves the policy, and returns the log's row."""
        began, config = time.perf_counter(), self.config
        if [*map(id, self.policy.parameters())] != [*map(id, self.adam.parameters)]:
            raise RuntimeError("the policy's parameters were replaced: make a new PPO")
        self.policy.eval()
        self._collect()  # 1. Collect.
        batch, entropy = self._advantages()  # 2. Value. 3. Advantage.
        left = max(0.0, 1 - self.steps / config.total_steps)  # the share still to come
        rate = config.learning_rate * (left if config.anneal else 1.0)
        self.policy.train()  # this matters only for networks with dropout and the like
        measured = self._improve(batch, rate)  # 4. Improve.
        self.policy.eval()
        encoder: Any = getattr(self.policy, "encoder", None)
        if hasattr(encoder, "measure"):  # part 6's: its scale changes only between updates
            encoder.measure(batch.obs, self.adam.average)
        self.steps += config.batch_size
        self.updates += 1
        mean_return, mean_length = np.mean(self.recent or [(math.nan, math.nan)], 0).tolist()
        means = {k: sum(float(s[k]) for s in measured) / len(measured) for k in measured[0]}
        unexplained = batch.advantage.var().item() / (batch.returns.var().item() or math.nan)
        return {  # 5. Measure. (6, repeat, is the caller's loop.)
            "update": self.updates,
            "steps": self.steps,
            "episodes": self.episodes,  # that ended so far
            "mean_return": mean_return,  # of the last 100; NaN before the first
            "mean_length": mean_length,  # of the same, in steps
            **means,
            "entropy": entropy,  # of the policy that played
            "explained_variance": 1 - unexplained,  # 1: V predicts all; 0 or less: a mean would
            "learning_rate": rate,
            "gradient_steps": self.adam.steps,  # so far
            "steps_per_second": config.batch_size / (time.perf_counter() - began),
        }

    def _collect(self):
        """Plays T steps in every environment. The critic is asked later, about all at once."""
        rollout, policy = self.rollout, self.policy
        for t in range(self.config.num_steps):
            put(rollout.obs[t], self.obs, "obs")  # part 6: copies it, if it fits
            rollout.action[t] = policy.act(rollout.obs[t], generator=self.generator)
            results = self.envs.step(policy.to_env(rollout.action[t]))
            reached, flags = rollout.next_obs[t], (rollout.terminated[t], rollout.truncated[t])
            ended = put_step(results, reached, reached, rollout.reward[t], *flags)  # rows
            self.obs = results[0]  # of the next episode, where one ended
            self.running[0] += rollout.reward[t]
            self.running[1] += 1
            if len(ended):
                self.episodes += len(ended)
                self.recent.extend(self.running[:, ended].T.tolist())
                self.running[:, ended] = 0
        if not all(np.isfinite(x).all() for x in (rollout.obs, rollout.next_obs, self.obs)):
            raise RuntimeError("an environment returned NaN or infinity as an observation")

    @torch.no_grad()
    def _advantages(self):
        """The rollout as a Batch of B transitions, and the mean entropy of the policy."""
        r, config, reward = self.rollout, self.config, self.rollout.reward
        arrays = r.obs, r.action
        obs, action = (torch.from_numpy(x).flatten(0, 1).to(config.device) for x in arrays)
        logprob, entropy, value = self.policy.evaluate(obs, action)
        values = value.cpu().numpy().reshape(reward.shape)  # (T, N)
        # Most s' are the next step's s, but not those where an episode or the rollout ends.
        next_values, ended = np.roll(values, -1, axis=0), r.terminated | r.truncated
        others = np.vstack([ended[:-1], np.ones_like(ended[-1:])])
        next_values[others] = self.policy.value(r.next_obs[others]).cpu().numpy()
        if self.scale_rewards:
            reward = self.scale_rewards(reward, ended)
        gamma, lam = config.gamma, config.gae_lambda
        both = gae(reward, values, next_values, r.terminated, r.truncated, gamma, lam)
        advantage, returns = (torch.from_numpy(x).to(value).flatten() for x in both)
        return Batch(obs, action, logprob, advantage, returns), entropy.mean().item()

    def _improve(self, batch: Batch, rate: float) -> list[dict]:
        """Gradient steps; returns what the last epoch measured (with target_kl, all epochs)."""
        config, size = self.config, len(batch.returns)
        count = math.ceil(size / config.minibatch_size)  # of gradient steps in an epoch
        measured: list[dict] = []
        for epoch in range(config.epochs):
            measure = epoch == config.epochs - 1 or config.target_kl > 0
            order = torch.from_numpy(self.generator.permutation(size)).to(config.device)
            # Almost equal pieces: as M ≥ 3, none has just one transition, and no deviation.
            pieces = (x[order].tensor_split(count) for x in batch)
            for part in map(Batch, *pieces):
                loss, stats = ppo_loss(self.policy, part, config, measure)
                limit = config.target_kl if measured else 0  # before the first step, KL is 0
                if limit and self.adam.average(stats["approx_kl"]) > limit:
                    return measured  # without this minibatch, which takes no step
                for p in self.adam.parameters:
                    p.grad = None
                loss.backward()
                stats["grad_norm"] = self.adam.step(rate, config.max_grad_norm)
                if measure:
                    measured.append(stats)
        return measured


# PPO is complete here, with a few helpers of part 6. After `from thrust import *`, this trains:
#
#     config = Config(**CARTPOLE)
#     learner = PPO(CartPole(config.num_envs), config)
#     for _ in range(config.num_updates):
#         print(learner.update()["mean_return"])

# ==============================================================================================
# 6. Other games
# ==============================================================================================
# Needs: import math, numpy as np, torch; from torch import nn; parts 2, 3
#
# CartPole is kind to a network: it shows four small numbers, asks for one of two actions,
# and pays 1. This part is for environments that are not so kind.

# What only parts 6 to 10 import stands here: above, NumPy and torch are enough.
import argparse
import base64
import contextlib
import csv
import datetime
import functools
import gc
import hashlib
import importlib
import io
import json
import multiprocessing as mp
import os
import pathlib
import pickle
import random
import signal
import sys
import threading
import traceback


def put(target: np.ndarray, value, name: str):
    """Copies `value` into `target`, in target's dtype. Raises ValueError for another shape, and
    where numbers would change by more than rounding; an assignment would do so in silence."""
    value, whole = np.asarray(value), target.dtype.kind in "biu"
    same = value.dtype == target.dtype
    fits = same or whole or np.can_cast(value.dtype, target.dtype, "same_kind")
    if fits and value.shape == target.shape:
        target[...] = value
        if same or not whole or np.array_equal(target, value):
            return
    expected, got = f"{target.dtype} {target.shape}", f"{value.dtype} {value.shape}"
    raise ValueError(f"{name} must fit into {expected}; got {got}")


def put_step(results: tuple, obs, final_obs, reward, terminated, truncated) -> np.ndarray:
    """Copies what an environment's `step` returned into these arrays; returns the rows where an
    episode ended. In those rows, final_obs (it may be obs) gets the last observation."""
    put(obs, results[0], "obs")
    put(reward, results[1], "reward (a number; mo_gymnasium's LinearReward makes one)")
    put(terminated, results[2], "terminated")
    put(truncated, results[3], "truncated")
    ended = (terminated | truncated).nonzero()[0]
    if len(ended):
        if results[4].get("final_obs") is None:
            raise ValueError('an episode ended, and `info` has no "final_obs"')
        last, rows = np.asarray(results[4]["final_obs"])[ended], final_obs[ended]
        put(rows, np.stack(last) if last.dtype == object else last, "final_obs")
        final_obs[ended] = rows
    return ended


def require_same_step(envs):
    """ValueError unless `envs` begins a new episode in the step that ends one."""
    if not all(hasattr(envs, name) for name in ("num_envs", "reset", "step", "close")):
        needed = "with num_envs, reset, step and close; GymEnvs(make, num_envs) makes one"
        raise ValueError(f"{envs} is not a batch, {needed}")
    mode = getattr(envs, "metadata", {}).get("autoreset_mode")
    mode = getattr(envs, "autoreset_mode", mode)  # its own; metadata may be of all its class
    if getattr(mode, "value", mode) != "SameStep":  # Gymnasium's enum, or plain text
        how = "give autoreset_mode=AutoresetMode.SAME_STEP, or use GymEnvs(make, num_envs)"
        kind = type(envs).__name__
        raise ValueError(f"the autoreset_mode of {kind} must be SAME_STEP, not {mode}: {how}")


def has_state(envs) -> bool:
    """Whether `envs` can be saved and go on; an attribute `state` is not enough."""
    return all(callable(getattr(envs, name, None)) for name in ("state", "set_state"))


def derive_seed(seed: int, *purpose: int) -> int:
    """A seed for one purpose (0 weights, 1 draws, 2 environments, 3 evaluation, 4 ranks). It is
    below 2³¹ - 10⁶, so that seed + i, of environment i, suits simulators that take 31 bits."""
    sequence = np.random.SeedSequence(seed, spawn_key=purpose)
    return int(sequence.generate_state(1)[0]) % (2**31 - 10**6)


class Choices(nn.Module):
    """An array of independent choices, each with its own logits; the i-th is among nvec[i]."""

    to_env = Choice.to_env

    def __init__(self, space):
        super().__init__()
        self.space, nvec = space, getattr(space, "nvec", np.full(space.shape, 2))
        self.each = [Choice(Discrete(n)) for n in np.ravel(nvec).tolist()]
        self.sizes = [choice.num_outputs for choice in self.each]
        self.num_outputs = sum(self.sizes)

    def draw(self, logits, greedy, generator):  # (k, num_outputs) → int64 (k, *shape)
        parts = np.split(logits, np.cumsum(self.sizes)[:-1], axis=1)
        drawn = [choice.draw(x, greedy, generator) for choice, x in zip(self.each, parts)]
        return np.stack(drawn, 1).reshape(-1, *self.space.shape)

    def judge(self, logits, action):  # log-probabilities and entropies of all add up
        parts = logits.split(self.sizes, 1), action.reshape(len(action), -1).unbind(1)
        judged = [choice.judge(x, a) for choice, x, a in zip(self.each, *parts)]
        return tuple(torch.stack(x).sum(0) for x in zip(*judged))


class Normal(nn.Module):
    """Actions that are real numbers (Box). An output is the mean of a normal distribution; its
    deviation σ is a parameter, at first 0.7. (With 1, HalfCheetah learned to slide on its back;
    with 0.5, BipedalWalker to stand still.) If the box has limits, the network knows them as
    ±1: all boxes are learned alike. Draws are clipped for the environment, not for the loss."""

    def __init__(self, space):
        super().__init__()
        low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
        limited = np.isfinite(low) & np.isfinite(high)
        low, high = np.where(limited, low, -1.0), np.where(limited, high, 1.0)
        self.middle, self.half_width = (low + high) / 2, (high - low) / 2
        self.space, self.num_outputs = space, math.prod(space.shape)
        self.log_std = nn.Parameter(torch.full((self.num_outputs,), math.log(0.7)))

    def draw(self, means, greedy, generator):  # (k, num_outputs) → float32 (k, *shape)
        noise = 0 if greedy else generator.standard_normal(means.shape, np.float32)
        std = self.log_std.detach().exp().cpu().numpy()
        return (means + std * noise).reshape(-1, *self.space.shape)

    def judge(self, means, action):
        # Each number: log π(a|s) = -½·((a - mean) / σ)² - log σ - c, entropy = ½ + log σ + c,
        # with c = ½·log 2π. All of them: the sums.
        log_scale = (self.log_std + 0.5 * math.log(2 * math.pi)).sum()
        error = (action.reshape(means.shape) - means) / self.log_std.exp()
        logprob = -0.5 * error.square().sum(1) - log_scale
        return logprob, (0.5 * self.num_outputs + log_scale).expand_as(logprob)

    def to_env(self, action):
        low, high, dtype = self.space.low, self.space.high, np.dtype(self.space.dtype)
        scaled = np.clip(self.middle + self.half_width * action, low, high)
        return (scaled if dtype.kind == "f" else scaled.round()).astype(dtype)


class OneHot(nn.Module):
    """Discrete observations become n numbers, of which one is 1 and the others 0."""

    def __init__(self, space):
        super().__init__()
        self.n, self.start = int(space.n), int(getattr(space, "start", 0))

    def forward(self, obs):  # (k,) → int64 (k, n)
        return F.one_hot(obs.long() - self.start, self.n)


class Normalizer(nn.Module):
    """Shifts and scales K numbers by the mean and deviation of all rows measured so far, and
    cuts them off at ±10; in float64, as an offset may be far larger than the deviation."""

    def __init__(self, space):
        super().__init__()
        zeros = torch.zeros(math.prod(space.shape), dtype=torch.float64)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", zeros)
        self.register_buffer("var", zeros + 1)

    def _apply(self, convert, *rest):  # .float() and the like leave it exact; devices change
        return super()._apply(lambda x: x.to(convert(x).device), *rest)

    def measure(self, x, average=None):
        """Adds the rows of x, (k, ...), by the formula of Chan, Golub and LeVeque (1979)."""
        x, average = x.reshape(len(x), -1).double(), average or (lambda tensor: tensor)
        mean = average(x.mean(0))
        var = average((x - mean).square().mean(0))
        total, shift = self.count + len(x), mean - self.mean
        self.var = (self.count * self.var + len(x) * var) / total
        self.var += self.count * len(x) * (shift / total).square()
        self.mean, self.count = self.mean + shift * len(x) / total, total

    def std(self):
        return self.var.clamp(min=1e-8).sqrt()

    def forward(self, x):  # (k, ...) → float64 (k, K)
        return ((x.reshape(len(x), -1).double() - self.mean) / self.std()).clamp(-10, 10)


class RewardScale(nn.Module):
    """Divides rewards by the deviation of R ← γ·R + r, and cuts them off at ±10. R looks back
    where a value looks ahead; over a long game, R varies about as much as values do."""

    def __init__(self, config, average=None):
        super().__init__()
        self.gamma, self.average = config.gamma, average
        self.moments = Normalizer(Box(0, 0, (1,)))
        self.register_buffer("sums", torch.zeros(config.num_envs, dtype=torch.float64))  # R

    def forward(self, reward, ended):  # float64 (T, N), bool (T, N)
        sums, running = np.zeros(reward.shape), self.sums.numpy()
        for t in range(len(reward)):
            sums[t] = running[:] = self.gamma * running + reward[t]
            running[ended[t]] = 0
        self.moments.measure(torch.from_numpy(sums.reshape(-1, 1)), self.average)
        return (reward / self.moments.std().item()).clip(-10, 10)


WRAP = "wrap it (Gymnasium: FlattenObservation, FilterObservation, TransformAction, ...)"
ACTIONS = {"Discrete": Choice, "MultiDiscrete": Choices, "MultiBinary": Choices, "Box": Normal}


def by_kind(space, makers: dict) -> nn.Module:
    """makers[kind](space), where kind is the name of the space's class or of an ancestor: so
    Gymnasium's spaces will do as well as part 2's. ValueError if there is none."""
    for kind in type(space).__mro__:
        if kind.__name__ in makers:
            return makers[kind.__name__](space)
    raise ValueError(f"{space} must be one of {', '.join(makers)}; {WRAP}")


class GymEnvs:
    """N of Gymnasium's environments, stepped one by one; `make()` makes one. Environment i is
    seeded seed + i, and anew for each episode: some would else draw from the system's clock."""

    metadata = {"autoreset_mode": "SameStep"}

    def __init__(self, make, num_envs: int):
        self.envs, self.num_envs = [make() for _ in range(num_envs)], num_envs
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self._seeds: Any = [None] * num_envs  # of each environment's first episode
        self._episodes = [0] * num_envs  # that were begun

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self._seeds, self._episodes = range(seed, seed + self.num_envs), [0] * self.num_envs
        return self._begin(range(self.num_envs), options), {}

    def step(self, actions):
        results = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        reached, reward, *flags, _ = zip(*results)
        obs = final_obs = self._stack(reached)  # a copy: `reset` may overwrite the originals
        put(both := np.zeros((2, self.num_envs), bool), flags, "terminated, truncated")
        terminated, truncated = both
        ended = terminated | truncated
        if ended.any():
            obs = obs.copy()
            obs[ended] = self._begin(ended.nonzero()[0])
        info = {"final_obs": final_obs, "_final_obs": ended}
        return obs, np.array(reward, np.float64), terminated, truncated, info

    def close(self):
        for env in self.envs:
            env.close()

    def _begin(self, rows, options=None):
        obs = []
        for i in rows:
            seed, number = self._seeds[i], self._episodes[i]
            seed = derive_seed(seed, number) if number and seed is not None else seed
            obs.append(self.envs[i].reset(seed=seed, options=options)[0])
            self._episodes[i] += 1
        return self._stack(obs)

    def _stack(self, rows):
        space = self.single_observation_space
        put(obs := np.empty((len(rows), *space.shape), space.dtype), np.stack(rows), "obs")
        return obs


@functools.cache
def say_once(text: str):
    print(text, file=sys.stderr)


def make_game(name: str):
    """One of Gymnasium's environments, with Dict and Tuple observations flattened."""
    try:
        import gymnasium
    except ImportError:
        hint = "Gymnasium, which may know it, is not installed: pip install gymnasium"
        raise ImportError(f"{name} is not Thrust's own, and {hint}") from None
    from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

    def is_numeric(space):
        if isinstance(space, (Dict, Tuple)):
            parts = space.values() if isinstance(space, Dict) else space
            return all(map(is_numeric, parts))
        return isinstance(space, (Box, Discrete, MultiBinary, MultiDiscrete))

    env = gymnasium.make(name)
    space = env.observation_space
    if isinstance(space, (Box, Discrete)) or not is_numeric(space):
        return env  # the latter, text or graphs, will be refused
    if mp.parent_process() is None:  # not once for each worker
        say_once(f"observations of {name} are flattened: {space}")
    return gymnasium.wrappers.FlattenObservation(env)


def make_env(name: str, num_envs: int):
    """What `--env` names: "CartPole" is part 2's; "games:doors" is what `doors` in the module
    games makes of num_envs; any other is Gymnasium's, "games:Doors-v1" with games imported."""
    if name == "CartPole":
        return CartPole(num_envs)
    module, _, attribute = name.rpartition(":")
    make = getattr(importlib.import_module(module), attribute, None) if module else None
    return make(num_envs) if make else GymEnvs(lambda: make_game(name), num_envs)


# ==============================================================================================
# 7. EnvPool
# ==============================================================================================
# Needs: import time, numpy as np, torch; part 6
# An environment written in Python uses one core, however many there are. The pool splits N
# environments over W worker processes, each of which steps a slice of its own:
#
#             the learner's process                      worker 0          worker 1
#       step: writes actions   ──── go ──────────────▶   steps rows        steps rows
#             waits            ◀─── done ─────────────   0 ... N/2-1       N/2 ... N-1
#                     │                                     │                 │
#       ┌─────────────▼─────────────────────────────────────▼─────────────────▼────────┐
#       │ shared memory:  action | obs | final_obs | reward | terminated | truncated   │
#       └──────────────────────────────────────────────────────────────────────────────┘
#
# A step uses no pipe. `go` and `done` are semaphores, a pair for each worker: between `done`
# and `go` the learner writes into the memory, between `go` and `done` the worker, in its rows.
# Whoever waits polls for a short while, because being woken takes as long as stepping a
# hundred CartPoles; only then it sleeps, to leave the core to others. Resets and states are
# rare, and take words: these go through a pipe, as do answers, and the traceback of what a
# worker raises. A pool pays where environments are slow, cores are free and the run is long:
# starting the first worker takes as long as importing torch. CartPole is faster without.

STEP, WORD, CLOSE = range(3)  # orders; a WORD comes through the pipe
give_way = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has only the latter


class WorkerError(RuntimeError):
    """A worker raised, died or did not answer in time, and the pool has been closed. `worker`
    is its number, `exitcode` its exit code: negative for a signal, None while it runs."""

    def __init__(self, worker, problem):
        super().__init__(f"{worker.name} {problem}")
        self.worker, self.exitcode = worker.number, worker.exitcode


def acquire(semaphore, timeout) -> bool:
    """Acquires `semaphore` within `timeout` seconds (None: for ever); False if it could not."""
    until = time.perf_counter() + 200e-6
    while not (taken := semaphore.acquire(False)) and time.perf_counter() < until:
        give_way()
    return taken or semaphore.acquire(True, timeout)


def seed_globals(seed: int):
    """Seeds the generators that all code of a process shares; some environments use them."""
    for each in (random.seed, np.random.seed, torch.manual_seed):
        each(seed % 2**32)


def obey(env, part, obs, method, argument):
    """Carries out a word in a worker; returns the answer."""
    if method == "state":
        return {name: np.asarray(array) for name, array in env.state().items()}
    if method == "set_state":
        return env.set_state({name: array[part] for name, array in argument.items()})
    if "seed" in argument:
        argument["seed"] = int(argument["seed"]) + part.start
        seed_globals(argument["seed"])  # they would be alike in all workers
    return put(obs, env.reset(**argument)[0], "obs")


def run_worker(w, part: slice, make_env, memory, layout, order, failed, ours, pipe, go, done):
    """What worker w runs: it makes the environments of its rows, and carries out orders."""

    def end_with_learner():
        mp.parent_process().join()
        kill_group(0)  # its own
        os._exit(1)  # even if the worker is stuck in an environment's Python code

    with contextlib.suppress(AttributeError):  # Windows has no groups of processes
        os.setpgid(0, 0)  # what environments start is in it too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's to handle
    threading.Thread(target=end_with_learner, daemon=True).start()
    ours.close()  # the learner's end; else this worker would not notice its closing
    action, *results = (array[part] for array in np.frombuffer(memory, layout)[0])
    try:
        acquire(go, None)  # until all workers are started
        if order.value == CLOSE:
            return
        env = make_env(part.stop - part.start)
        mp.util.Finalize(None, env.close, exitpriority=100)  # also after an exception
        done.release()
        while acquire(go, None) and order.value != CLOSE:
            if order.value == STEP:
                put_step(env.step(action.copy()), *results)  # environments may keep the copy
                done.release()
            else:
                answer = pickle.dumps(obey(env, part, results[0], *pipe.recv()))
                done.release()
                pipe.send_bytes(answer)  # last, as a large answer waits here until it is read
    except BaseException as error:
        file, line = traceback.extract_tb(error.__traceback__)[-1][:2]
        what = f"{type(error).__name__}: {error} ({os.path.basename(file)}, line {line})"
        failed.value = w
        done.release()
        with contextlib.suppress(OSError):  # the pool may be closed by now
            pipe.send(f"{what}\n{traceback.format_exc()}")


def kill_group(number: int):
    """Kills a worker's group of processes, with what its environments have started."""
    with contextlib.suppress(AttributeError, OSError):
        os.killpg(number, signal.SIGKILL)


def end_workers(workers: list, order, timeout):
    """Tells the workers to close their environments; kills those that do not end in time."""
    order.value, deadline = CLOSE, time.monotonic() + min(timeout, 1e6)
    try:
        for worker in workers:
            worker.go.release()
            worker.pipe.close()  # one that waits there gets an error
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
    finally:  # also after Ctrl-C
        for worker in workers:
            worker.kill()
            kill_group(worker.pid)
            worker.join(1)


class EnvPool(contextlib.AbstractContextManager):
    """N environments, stepped by W worker processes; itself a vector environment.

    `make_env(n)` makes a vector environment of n, as CartPole does; environment i is seeded
    seed + i, so results are the same for any number of workers. Arrays are views into shared
    memory, valid until the next step. Workers have `timeout` seconds to answer, and to close.
    They import your program, which therefore needs `if __name__ == "__main__":`, and find
    make_env at the top level of a module; under start_method "fork" neither is needed."""

    metadata = {"autoreset_mode": "SameStep"}

    def __init__(self, make_env, num_envs, workers, *, start_method=None, timeout=60.0):
        if not 1 <= workers <= num_envs:
            raise ValueError(f"a pool of {num_envs} environments cannot have {workers} workers")
        with contextlib.closing(make_env(1)) as env:  # only to see what they look like
            require_same_step(env)
            obs, action = env.single_observation_space, env.single_action_space
            if not has_state(env):
                self.state = self.set_state = None  # there is nothing to save
        for space in (obs, action):
            if space.shape is None or np.dtype(space.dtype).kind not in "biuf":
                raise ValueError(f"a pool shares arrays of numbers, not {space}; {WRAP}")
        self.single_observation_space, self.single_action_space = obs, action
        self.num_envs, self.timeout, self._workers = num_envs, timeout, []
        context = mp.get_context(start_method or ("spawn" if os.name == "nt" else "forkserver"))
        context.set_forkserver_preload(["numpy", "torch"])  # loaded before workers fork
        # Shared: one record, whose fields are the arrays; the last two are the flags
        rows = action, obs, obs, np.float64(), np.bool_(), np.bool_()
        layout = np.dtype([("", row.dtype, (num_envs, *row.shape)) for row in rows], align=True)
        memory = context.RawArray("b", layout.itemsize)
        self._arrays = list(np.frombuffer(memory, layout)[0])
        self._order, self._failed = context.RawValue("i"), context.RawValue("i", -1)
        # Runs once: when you call it, when the pool is forgotten, or when the program ends,
        # before Python waits for its processes; never in a fork of the learner.
        ending = self._workers, self._order, timeout
        self.close = mp.util.Finalize(self, end_workers, ending, exitpriority=10)
        for w in range(workers):
            part = slice(num_envs * w // workers, num_envs * (w + 1) // workers)
            ours, theirs = context.Pipe()
            go, done = context.Semaphore(0), context.Semaphore(0)
            shared = memory, layout, self._order, self._failed, ours, theirs, go, done
            worker = context.Process(target=run_worker, args=(w, part, make_env, *shared))
            worker.name = f"worker {w} (environments {part.start} to {part.stop - 1})"
            worker.start()
            theirs.close()  # so that `ours` gives errors where the worker is dead
            worker.number, worker.pipe, worker.go, worker.done = w, ours, go, done
            self._workers.append(worker)
        self._ask("starting", timeout=max(timeout, 60.0))  # importing takes long

    def __exit__(self, *exception):
        self.close()

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Begins an episode everywhere: (obs, {})."""
        whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
        if seed is not None and not (whole and seed >= 0):
            raise ValueError(f"seed must be None or an int from 0 on; got {seed!r}")
        given = {"seed": seed, "options": options}
        self._ask("resetting", "reset", {k: v for k, v in given.items() if v is not None})
        return self._arrays[1], {}

    def step(self, actions: np.ndarray):
        """As CartPole's, but what is returned is valid only until the next step."""
        action, obs, final_obs, reward, terminated, truncated = self._arrays
        put(action, actions, "action")
        self._ask("stepping")
        ended = terminated | truncated
        info = {"final_obs": final_obs, "_final_obs": ended} if np.count_nonzero(ended) else {}
        return obs, reward, terminated, truncated, info

    def state(self) -> dict[str, np.ndarray]:
        """What the environments' future depends on, N rows each."""
        states = self._ask("giving its state", "state", None)
        return {name: np.concatenate([each[name] for each in states]) for name in states[0]}

    def set_state(self, state: dict[str, np.ndarray]):
        """Goes on from what `state` returned, with this or another number of workers."""
        if any(len(array) != self.num_envs for array in state.values()):
            raise ValueError(f"a state must have {self.num_envs} rows")
        self._ask("taking a state", "set_state", state)

    def _ask(self, doing, *word, timeout=None):
        """Has all workers step, or carry out a word; returns the answers. Ten times a second it
        looks if one failed. It counts looks: time spent suspended must not count."""
        if not self.close.still_active():
            raise RuntimeError("this pool is closed")
        looks, timeout, failed = 0, timeout or self.timeout, self._failed
        try:
            self._order.value = WORD if word else STEP
            for worker in self._workers:
                worker.go.release()
                if word:
                    with contextlib.suppress(OSError):  # it is dead, as the next loop finds
                        worker.pipe.send(word)
            for worker in self._workers:
                while failed.value < 0 and not acquire(worker.done, 0.1):
                    looks += 1
                    if (code := worker.exitcode) is not None and failed.value < 0:
                        raise WorkerError(worker, f"died with exit code {code} while {doing}")
                    if looks * 0.1 >= timeout:
                        raise WorkerError(worker, f"was still {doing} after {timeout:g} s")
            if failed.value >= 0:
                worker = self._workers[failed.value]
                raise WorkerError(worker, f"raised while {doing}: {worker.pipe.recv()}")
            answers = []
            for worker in self._workers if word else []:
                answers.append(worker.pipe.recv())
            return answers
        except EOFError:
            self.close()
            raise WorkerError(worker, f"died while {doing}") from None
        except BaseException:  # Ctrl-C too: workers and learner are out of step from here on
            self.close()
            raise


# ==============================================================================================
# 8. Runs
# ==============================================================================================
# `train` is the loop at the end of part 5, with what makes a run easy to follow and hard to
# lose. A run is a folder with its config; a log, a row for every update; a checkpoint; and a
# page (part 10). The checkpoint holds all that the future depends on. It is written before the
# first update, every few seconds, and after the last, and replaces the old one in one step.
# So Ctrl-C, a kill and a power cut are one case: what came after it is played again, bit for
# bit. (With one rank, and environments that have `state`, as CartPole has. Others begin new
# episodes.)
#
# The same config, whatever its workers, gives the same weights, bit for bit, with the same
# machine and package versions, because every seed is derived from config.seed. (That is so with
# one rank, and environments that draw from generators which `reset` seeds.)
#
# Several processes, called ranks, can train one policy together; torchrun starts them. Each
# plays num_envs environments, with seeds of its own, until all of them together have played
# total_steps. Before every gradient step all take the mean of their gradients; so their
# weights, at first those of rank 0, stay equal. Rank 0 alone writes and reads the folder: other
# machines may have none, or an old one.

BARS = [195, 475]  # mean returns that count as solving CartPole-v0 and CartPole-v1
OWN = {"runs", "device", "threads", "workers", "timeout"}  # knobs in which ranks may differ
# Knobs that a resumed run cannot change: what was saved depends on them
KEPT = "env", "seed", "hidden", "num_envs", "norm_obs", "norm_reward"
say = functools.partial(print, flush=True)


def make_envs(config: Config):
    """The environments of `config`, in workers if it has any. To be closed after use."""
    make = functools.partial(make_env, config.env)
    if not config.workers:
        seed_globals(config.seed)
        return make(config.num_envs)
    return EnvPool(make, config.num_envs, config.workers, timeout=config.timeout)


def evaluate(policy, envs, seed: int, episodes: int = 1, limit: int = 10_000):
    """Plays `episodes` whole episodes in each of N environments, always with the most probable
    action: (returns float64, finished bool), (episodes, N) each. What has not ended after
    `limit` steps counts with what it had collected. (Not on the environments of a learner that
    is to go on: it would not notice that they have moved.)"""
    require_same_step(envs)
    policy.eval()
    returns = np.zeros((episodes, envs.num_envs))
    finished = np.zeros(returns.shape, bool)
    for i in range(episodes):
        obs, _ = envs.reset(seed=seed + i * envs.num_envs)
        for _ in range(limit):
            actions = policy.to_env(policy.act(obs, greedy=True))
            obs, reward, terminated, truncated, _ = envs.step(actions)
            returns[i] += np.where(finished[i], 0, reward)  # of its first episode
            finished[i] |= np.logical_or(terminated, truncated)
            if finished[i].all():
                break
    return returns, finished


def tell_evaluation(policy, config: Config) -> np.ndarray:
    """Prints the evaluation and the weights' hash; gives the returns, (eval_episodes,)."""
    torch.set_num_threads(config.threads)
    rounds = math.ceil(config.eval_episodes / config.num_envs)
    with contextlib.closing(make_envs(config)) as envs:
        both = evaluate(policy, envs, derive_seed(config.seed, 3), rounds)
    returns, finished = (x.ravel()[: config.eval_episodes] for x in both)
    cut = "" if finished.all() else f", {np.sum(~finished)} of them cut off after 10,000 steps"
    mean = f"{returns.mean():.1f} ± {returns.std():.1f}"
    say(f"evaluation: mean return {mean} over {len(returns)} episodes{cut}")
    weights = nn.utils.parameters_to_vector(policy.parameters()).detach().cpu().numpy()
    say(f"weights: {hashlib.sha256(weights.tobytes()).hexdigest()}")  # equal if all bits are
    return returns


def learner_state(learner: PPO) -> dict:
    """All that the learner's future depends on, in tensors, ints, strings, lists and dicts."""
    envs, scale = learner.envs, learner.scale_rewards
    state = envs.state() if has_state(envs) else {}
    return {
        "policy": learner.policy.state_dict(),
        "adam": [learner.adam.m, learner.adam.v, learner.adam.steps],
        "scale": scale.state_dict() if scale else {},
        "counts": [learner.steps, learner.episodes, learner.updates],
        "recent": torch.tensor(list(learner.recent), dtype=torch.float64),
        "draws": json.dumps(learner.generator.bit_generator.state),
        "envs": {name: torch.from_numpy(array) for name, array in state.items()},
        "obs": torch.as_tensor(np.asarray(learner.obs, learner.rollout.obs.dtype)),
        "running": torch.from_numpy(learner.running),
    }


def restore(learner: PPO, state: dict, exactly: bool):
    """Goes on from what `learner_state` returned; if not exactly, in new episodes."""
    learner.policy.load_state_dict(state["policy"])
    learner.adam.m, learner.adam.v, learner.adam.steps = state["adam"]
    learner.steps, learner.episodes, learner.updates = state["counts"]
    learner.recent.extend(state["recent"].tolist())
    exactly = exactly and bool(state["envs"])
    if learner.scale_rewards:
        state["scale"]["sums"] *= exactly  # 0 for new episodes
        learner.scale_rewards.load_state_dict(state["scale"])
    learner.begin_episodes()
    if exactly:
        learner.generator.bit_generator.state = json.loads(state["draws"])
        learner.envs.set_state({name: x.numpy().copy() for name, x in state["envs"].items()})
        learner.obs, learner.running = (state[k].numpy().copy() for k in ("obs", "running"))


def as_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def replace_file(path: pathlib.Path, content: bytes):
    """Writes a file in one step: at any moment, `path` is the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        for patience in (0.01, 0.1, 1, 0):  # seconds; Windows refuses while somebody reads path
            try:
                return os.replace(temporary, path)
            except PermissionError:
                if not patience:
                    raise
                time.sleep(patience)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(run) -> tuple[Config, dict]:
    """The config of the run in the folder `run`, and all that was saved with it. It is loaded
    as data: code hidden in it is not run. ValueError for what is no checkpoint."""
    path = pathlib.Path(run, "checkpoint.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return Config(**json.loads(saved["config"])), saved
    except Exception as error:  # torch documents no exception types
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} cannot be loaded as a checkpoint: {reason}") from error


def load(run) -> ActorCritic:
    """The policy of the run in the folder `run`. `policy.to_env(policy.act(obs, greedy=True))`
    is what to send for a batch of observations."""
    config, saved = load_checkpoint(run)
    with contextlib.closing(make_env(config.env, 1)) as env:
        spaces = env.single_observation_space, env.single_action_space
    policy = ActorCritic(*spaces, config.hidden, norm_obs=config.norm_obs)
    policy.load_state_dict(saved["learner"]["policy"])
    return policy.eval()


def new_folder(config: Config) -> pathlib.Path:
    """Makes the folder <runs>/<env>-<seed>, or that with -2, -3, ... where it exists."""
    name = f"{config.env}-{config.seed}".replace("/", "-").replace(":", "-")
    pathlib.Path(config.runs).mkdir(parents=True, exist_ok=True)
    folder, count = pathlib.Path(config.runs, name), 1
    while True:
        try:
            folder.mkdir()  # fails where it exists, so two runs never share a folder
            return folder
        except FileExistsError:
            count += 1
            folder = folder.with_name(f"{name}-{count}")


class Run:
    """A run's folder and its lines on the screen. `saved` is what its checkpoint held, or {};
    `total` the steps that it will have. ValueError if another process has the run."""

    def __init__(self, folder, config: Config, learner: PPO, saved: dict, total: int):
        self.config, self.learner, self.total = config, learner, total
        self.folder = pathlib.Path(folder)
        self.log = open(self.folder / "log.csv", "a+", newline="")  # noqa: SIM115
        lock(self.log)
        self.steps = saved.get("steps", 0)
        if saved and load_checkpoint(folder)[1]["steps"] != self.steps:
            raise ValueError(f"{folder} has gone on since it was loaded")
        self.pole = config.env == "CartPole"  # which has bars to pass, and policies on the page
        self.bars = saved.get("bars", list(BARS) if self.pole else [])  # still to be passed
        self.snapshots = saved.get("snapshots", [])
        # Rows that came after the checkpoint will be played again.
        self.log.seek(0)
        lines = self.log.readlines()[: learner.updates + 1] if saved else []
        lines = [line for line in lines if line.endswith("\n")]  # the disk may have lost a part
        self.log.truncate(sum(map(len, lines)))
        self.seconds = 0.0  # of training so far
        self.curve: list = []  # (steps, mean return) of each every-th row
        self.newest: list = []  # and of the last one
        self.every = 1
        for row in csv.DictReader(lines):
            self.plot(row)
            self.seconds = float(row["seconds"])
        replace_file(self.folder / "config.json", as_json(config).encode())
        say(f"training {config.env} for {total:,} steps; everything is kept in {folder}")
        self.clock = time.monotonic()
        self.save()

    def __enter__(self):
        return self

    def __exit__(self, failed, *error):
        self.log.close()
        if failed:
            say(f"stopped; to go on: {launcher()} thrust.py --resume {self.folder}")

    def add(self, row: dict):
        """Logs an update; every few seconds, shows progress and saves."""
        now, mean, self.steps = time.monotonic(), row["mean_return"], row["steps"]
        self.seconds, self.clock = self.seconds + now - self.clock, now
        if self.log.seek(0, os.SEEK_END) == 0:
            print(*row, "seconds", sep=",", file=self.log)
        print(*row.values(), self.seconds, sep=",", file=self.log, flush=True)
        self.plot(row)
        while self.bars and row["episodes"] >= 100 and mean >= self.bars[0]:
            at = f"mean return of 100 episodes, {self.steps:,} steps, {self.seconds:.1f} s"
            say(f"passed {self.bars.pop(0)}: {at}")
        if self.pole and 7 * self.steps >= len(self.snapshots) * self.total:  # at most 8
            policy = {k: x.clone() for k, x in self.learner.policy.state_dict().items()}
            self.snapshots.append([self.steps, policy])
        if now - self.saved_at >= self.config.checkpoint_seconds or self.steps >= self.total:
            share = f"{self.steps:>11,} steps  {self.steps / self.total:4.0%}"
            say(f"{share}   return {mean:.1f}   {row['steps_per_second']:,.0f} steps/s")
            self.save()

    def save(self):
        """Replaces the checkpoint and the page."""
        os.fsync(self.log.fileno())  # so that no row is missing that the checkpoint counts
        saved = {name: getattr(self, name) for name in ("steps", "bars", "snapshots")}
        saved["config"] = as_json(self.config)
        saved["learner"] = learner_state(self.learner)
        torch.save(saved, memory := io.BytesIO())
        replace_file(self.folder / "checkpoint.pt", memory.getvalue())
        policies = [snapshot for snapshot in self.snapshots if snapshot[0] < self.steps]
        policies += [[self.steps, saved["learner"]["policy"]]] if self.pole else []
        curve = list(dict(self.curve + self.newest).items())
        page = make_page(self.config, curve, policies, self.total)
        replace_file(self.folder / "page.html", page.encode())
        self.saved_at = time.monotonic()

    def plot(self, row: dict):
        """Adds a row of the log to the page's curve; of long runs, only every k-th."""
        self.newest = [(int(row["steps"]), float(row["mean_return"]))]
        if int(row["update"]) % self.every == 0:
            self.curve += self.newest
        if len(self.curve) == 500:
            self.curve, self.every = self.curve[1::2], 2 * self.every


def lock(file):
    """Keeps other processes out while `file` is open. (On Windows, it does not.)"""
    with contextlib.suppress(ImportError, OSError):  # or where the file system has no locks
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{file.name} belongs to a process that is running") from None


def rank_and_count() -> tuple[int, int]:
    """This process's rank, and the number of ranks; (0, 1) where it trains alone."""
    dist = torch.distributed
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


@contextlib.contextmanager
def process_group():
    """Joins the other ranks, if torchrun started this process and it has not joined them yet;
    leaves them afterwards. Who hears nothing from another for five minutes gives up."""
    dist = torch.distributed
    ours = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    if ours:
        timeout = datetime.timedelta(minutes=5)
        store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
        # The store may remember ranks of before a restart: each start gets keys of its own.
        store = dist.PrefixStore(str((store.add("started", 1) - 1) // ranks), store)
        dist.init_process_group("gloo", None, timeout, ranks, rank, store)  # CPU and CUDA
    yield
    if ours:  # not after a failure: torchrun then ends all, and leaving would wait for others
        dist.destroy_process_group()


def from_rank_0(make):
    """What `make()` returns on rank 0, on all ranks; likewise a ValueError that it raises."""
    (rank, ranks), given = rank_and_count(), [None]
    if rank == 0:
        try:
            given = [make()]
        except ValueError as error:
            given = [error]
    if ranks > 1:
        torch.distributed.broadcast_object_list(given)
    if isinstance(given[0], ValueError):
        raise given[0]
    return given[0]


def launcher() -> str:
    """The command that starts as many ranks as there are now."""
    ranks = rank_and_count()[1]
    each = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))  # on this machine
    if ranks == 1:
        return "python"
    return f"torchrun --nnodes {ranks // each} --nproc-per-node {each}"


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Replaces `tensor`, in place, by its mean over all ranks."""
    torch.distributed.all_reduce(tensor)
    return tensor.div_(torch.distributed.get_world_size())


def row_of_all(row: dict, ranks: int) -> dict:
    """The log's row of all ranks: the mean of theirs, or the sum of steps and episodes."""
    sums = "steps", "episodes", "steps_per_second"
    means = mean_over_ranks(torch.tensor(list(row.values()), dtype=torch.float64)).tolist()
    both = [(name, x * ranks if name in sums else x) for name, x in zip(row, means)]
    return {name: round(x) if type(row[name]) is int else x for name, x in both}


def config_of_rank(config: Config, rank: int, ranks: int) -> Config:
    """The config with a seed and a share of the steps of its own. ValueError, on all ranks, if
    their configs differ in knobs outside OWN."""
    configs: list = [None] * ranks
    torch.distributed.all_gather_object(configs, config)
    for name in (field.name for field in dataclasses.fields(Config) if field.name not in OWN):
        values = [getattr(each, name) for each in configs]
        if len(set(values)) > 1:
            raise ValueError(f"all ranks must have the same {name}; they have {values}")
    seed, share = derive_seed(config.seed, 4, rank), config.total_steps // ranks
    return dataclasses.replace(config, seed=seed, total_steps=share)


# What `train` returns. Only rank 0 has `returns`, (episodes,), and `run`, its folder.
Result = namedtuple("Result", "policy returns run")


def resumable(run, old: Config, saved: dict, config: Config) -> dict:
    """`saved`, which was loaded from `run`; ValueError if it cannot go on with this config."""
    for name in (*KEPT, "gamma") if config.norm_reward else KEPT:  # its sums depend on gamma
        before, now = getattr(old, name), getattr(config, name)
        if before != now:
            raise ValueError(f"{run} has {name} = {before}, which cannot become {now}")
    if saved["steps"] > config.total_steps:
        raise ValueError(f"{run} has played more steps than total_steps = {config.total_steps}")
    return saved


def starting_point(config: Config, resume, restarted: bool) -> tuple[Any, dict]:
    """The run to go on with, and what was saved of it; or None and {}. After torchrun has
    restarted its ranks, that is the newest of this config, unless it is finished."""
    if resume is None and restarted:
        files = sorted(pathlib.Path(config.runs).glob("*/checkpoint.pt"), key=os.path.getmtime)
        configs = [file.with_name("config.json").read_text() for file in files]
        same = [file.parent for file, text in zip(files, configs) if text == as_json(config)]
        rollout = config.batch_size * rank_and_count()[1]  # in steps of all ranks
        if same and load_checkpoint(same[-1])[1]["steps"] + rollout <= config.total_steps:
            resume = same[-1]
    if resume is None:
        return None, {}
    return resume, resumable(resume, *load_checkpoint(resume), config)


def train(config: Config, *, resume=None) -> Result:
    """Trains as `config` says in a new folder, or goes on with the run in the folder `resume`;
    then evaluates the policy. Under torchrun, with other ranks. Sets torch's threads and,
    without workers, the seeds of global generators.

    Raises ValueError for a run that cannot be resumed, or not with this config, and for ranks
    that do not fit together; RuntimeError for NaN or infinity; WorkerError for a failed worker;
    OSError where a file cannot be written. The last checkpoint is then whole."""
    torch.set_num_threads(config.threads)
    with process_group():
        (rank, ranks), own, average = rank_and_count(), config, None
        restarts = torch.tensor(float(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
        if ranks > 1:
            own, average = config_of_rank(config, rank, ranks), mean_over_ranks
            average(restarts)  # torchrun counts those of each machine
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        run, saved = from_rank_0(lambda: starting_point(config, resume, restarts.item() > 0))
        with contextlib.closing(make_envs(own)) as envs:
            learner = PPO(envs, own, average=average)
            if saved:
                restore(learner, saved["learner"], exactly=ranks == 1)
                learner.steps = saved["steps"] // ranks  # which may be more or fewer now
            elif ranks > 1:
                for p in learner.policy.parameters():
                    torch.distributed.broadcast(p.detach(), 0)
            updates = (own.total_steps - learner.steps) // own.batch_size  # to go
            total = (learner.steps + updates * own.batch_size) * ranks
            with contextlib.ExitStack() as stack:
                if rank == 0:
                    run = Run(run or new_folder(config), config, learner, saved, total)
                    stack.enter_context(run)
                for _ in range(updates):
                    row = learner.update()
                    row = row_of_all(row, ranks) if ranks > 1 else row
                    if rank == 0:
                        run.add(row)
        if ranks > 1:
            torch.distributed.barrier()  # nobody leaves while others still send
    if rank > 0:
        return Result(learner.policy, np.zeros(0), None)
    say(f"page: {run.folder / 'page.html'}")
    return Result(learner.policy, tell_evaluation(learner.policy, config), run.folder)


# ==============================================================================================
# 9. Command line
# ==============================================================================================


@process_group()
def main(argv=None):
    """Runs the command line, where every knob of Config is a flag; returns the exit code."""
    sys.path.append(os.getcwd())  # so that --env finds modules there
    if hasattr(sys.stdout, "reconfigure"):  # pytest's stdout lacks it
        sys.stdout.reconfigure(errors="replace")  # for consoles without "±"
    parser = argparse.ArgumentParser(
        prog="thrust.py", usage=argparse.SUPPRESS, allow_abbrev=False,
        description="python thrust.py [--KNOB VALUE ...] [--resume RUN | --evaluate RUN]",
        argument_default=argparse.SUPPRESS,  # so that a flag that was not given leaves no trace
    )  # fmt: skip
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", metavar="RUN", help="go on with the run in the folder RUN")
    either.add_argument("--evaluate", metavar="RUN", help="play the policy in the folder RUN")
    for field in dataclasses.fields(Config):
        kind, text = type(field.default), f"{field.metadata['help']} (default: {field.default}"
        text += f"; CartPole: {CARTPOLE[field.name]})" if field.name in CARTPOLE else ")"
        options = {"type": int, "nargs": "*"} if kind is tuple else {"type": kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **options)
    knobs = vars(parser.parse_args(argv))
    resume, evaluated = knobs.pop("resume", None), knobs.pop("evaluate", None)
    try:
        if resume is None and evaluated is None:
            pole = knobs.get("env", "CartPole") == "CartPole"
            config = Config(**({**CARTPOLE, **knobs} if pole else knobs))
        else:
            run = evaluated if resume is None else resume
            old, saved = from_rank_0(lambda: load_checkpoint(run))
            config = dataclasses.replace(old, **knobs)
            if resume is not None:
                resumable(run, old, saved, config)
        if config.workers > config.num_envs:
            raise ValueError(f"workers must be at most num_envs = {config.num_envs}")
    except ValueError as error:
        parser.error(str(error))
    try:
        if evaluated is None:
            train(config, resume=resume)
        elif rank_and_count()[0] == 0:
            tell_evaluation(load(evaluated).to(config.device), config)
    except KeyboardInterrupt:
        return 130
    return 0


# ==============================================================================================
# 10. Page
# ==============================================================================================
# People would rather look than read a log. So a run has a page: one HTML file that loads
# nothing from anywhere, with the learning curve and, for CartPole, the policy at work. The
# browser computes the physics of part 2 and the actor of part 3. PPO does not occur here.

PAGE = r"""<!doctype html><html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Thrust</title> <link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; accent-color: #2f80ed; }
  body { max-width: 44rem; margin: auto; padding: 0 1rem; overflow-wrap: anywhere;
    font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
  button { padding: 0.5rem 1rem; font: inherit; }
  svg, #slider { display: block; width: 100%; fill: none; stroke: currentColor; }
  svg * { vector-effect: non-scaling-stroke; stroke-width: 2; }
  #chart { position: relative; margin: 2rem 0; }
  #chart svg { height: 15rem; overflow: visible; stroke: #2f80ed; }
  #chart div { position: absolute; width: 100%; font-size: 0.8rem; text-align: right; }
  #chart .tick { border-bottom: 1px solid #8886; text-align: left; translate: 0 -100%; }
  #chart .bar { border-top: 1px dashed; }
</style>
<h1 id="name"></h1> <p id="summary"></p>
<section id="live" hidden>
  <svg viewBox="-2.6 -1.4 5.2 1.6" role="img" aria-label="a cart with a pole hinged to it">
    <path d="M-2.4 .12V0H2.4V.12"/>
    <g id="cart">
      <rect x="-.27" y="-.22" width=".54" height=".2" rx=".03" fill="currentColor"/>
      <path d="M-.234 -1.32L0 -.22L.234 -1.32" stroke-dasharray="4" opacity=".6"/>
      <path id="pole" d="M0 -.22V-1.22" stroke="#2f80ed" style="stroke-width: 6"/>
    </g>
  </svg>
  <p><button onclick="push = -40">← Push</button> <button onclick="push = 40">Push →</button>
    <label><input id="play" type="checkbox"> Play</label></p>
  <label><span id="status"></span>, by the policy after <span id="age"></span> training steps
    <input id="slider" type="range" min="0" oninput="begin()"></label>
  <p>The arrow keys push too. The game is lost beyond the dashed lines or the track.</p>
</section>
<p>Mean return of the last 100 episodes: <span id="newest"></span></p>
<div id="chart">
  <svg viewBox="0 0 100 100" preserveAspectRatio="none"><polyline id="curve"/></svg>
</div>
<script>
const run = RUN_DATA, P = run.physics, $ = (id) => document.getElementById(id);
const format = (x) => x.toLocaleString("en", {maximumFractionDigits: 2});
function step([x, speed, angle, spin], force) {  // CartPole.step, operation for operation
  const sin = Math.sin(angle), cos = Math.cos(angle);
  const temp = (force + P.POLE_MOMENT * (spin * spin) * sin) / P.TOTAL_MASS;
  const inertia = P.FOUR_THIRDS - P.POLE_MASS * (cos * cos) / P.TOTAL_MASS;
  const turn = (P.GRAVITY * sin - cos * temp) / (P.HALF_LENGTH * inertia);
  const pull = temp - P.POLE_MOMENT * turn * cos / P.TOTAL_MASS;
  return [x + P.TAU * speed, speed + P.TAU * pull, angle + P.TAU * spin, spin + P.TAU * turn];
}
const fallen = ([x, , angle]) => Math.abs(x) > P.X_LIMIT || Math.abs(angle) > P.ANGLE_LIMIT;
function act({layers, mean, std}, state) {  // the action that the actor finds more probable
  let x = state.map(Math.fround);  // observations are float32
  if (mean.length) x = x.map((v, i) => Math.max(-10, Math.min(10, (v - mean[i]) / std[i])));
  layers.forEach(([weights, biases], depth) => {
    const inputs = depth ? x.map(Math.tanh) : x;
    x = Array.from(biases, (bias, row) =>
      inputs.reduce((sum, v, i) => sum + weights[row * inputs.length + i] * v, bias));
  });
  return x[1] > x[0] ? 1 : 0;
}
const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt());
const floats = (text) => new Float32Array(bytes(text).buffer);
for (const each of run.policies) each.layers = each.layers.map((pair) => pair.map(floats));

let policy, state, steps, push, rest;
function begin() {
  policy = run.policies[$("slider").value];
  state = [0, 0, 0, 0].map(() => Math.random() * 0.1 - 0.05);
  [steps, push, rest] = [0, 0, 50];
}
function advance() {
  if (fallen(state)) return --rest || begin();  // after a second on the ground
  state = step(state, P.FORCES[act(policy, state)] + push);
  [steps, push] = [steps + 1, 0];  // a push is of 40 N, and for one step
}
function frame() {
  if ($("play").checked) advance();
  $("cart").setAttribute("transform", `translate(${state[0]})`);
  $("pole").setAttribute("transform", `rotate(${state[2] * 180 / Math.PI} 0 -.22)`);
  $("status").textContent = `${fallen(state) ? "Fell at step" : "Step"} ${format(steps)}`;
  $("age").textContent = format(policy.steps);
}
if (run.policies.length) {
  $("live").hidden = false;
  $("slider").max = $("slider").value = run.policies.length - 1;
  $("play").checked = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  document.onkeydown = ({key}) => { push = {ArrowLeft: -40, ArrowRight: 40}[key] ?? push; };
  begin();
  setInterval(frame, 20);
}

const means = [0, 1, ...run.curve.map(([, mean]) => mean), ...run.bars.map(([bar]) => bar)];
const least = Math.min(...means), high = Math.max(...means);
const gap = 10 ** Math.floor(Math.log10(high - least)), low = gap * Math.floor(least / gap);
const y = (mean) => 100 * (high - mean) / (high - low);  // in percent, from the top
function rule(mean, kind, label) {
  const line = $("chart").appendChild(document.createElement("div"));
  Object.assign(line, {className: kind, textContent: label, style: `top: ${y(mean)}%`});
}
for (let mean = low; mean <= high; mean += gap) rule(mean, "tick", format(mean));
for (const [bar, version] of run.bars) rule(bar, "bar", `${bar} solves CartPole-${version}`);
rule(low, "", `${format(run.total)} steps`);
const points = run.curve.map(([at, mean]) => [100 * at / run.total, y(mean)]);
$("curve").setAttribute("points", points.join(" "));
$("newest").textContent = run.curve.length ? format(run.curve.at(-1)[1]) : "none yet";
$("name").textContent = document.title = run.name;
$("summary").textContent = run.summary;
</script>
"""


def make_page(config: Config, curve: list, policies: list, total: int) -> str:
    """The page of a run of `total` steps, as HTML. `curve` holds (steps, mean return), and
    `policies`, empty unless env is CartPole, (steps, state dict); the newest come last."""
    steps = max(at for at, _ in [(0, 0), *curve, *policies])
    summary = f"Trained for {steps:,} of {total:,} steps"
    data: dict = {
        "name": f"{config.env}, seed {config.seed}",
        "summary": summary if steps < total else f"Finished: {steps:,} steps",
        "total": max(steps, total),
        "curve": [(at, mean) for at, mean in curve if math.isfinite(mean)],  # NaN: none yet
        "bars": [(195, "v0"), (475, "v1")] if config.env == "CartPole" else [],
        "physics": {k: np.array(v).tolist() for k, v in vars(CartPole).items() if k.isupper()},
        "policies": [],
    }
    for at, policy in policies:
        arrays = [v.cpu().float().numpy() for k, v in policy.items() if k.startswith("actor.")]
        texts = [base64.b64encode(array.tobytes()).decode() for array in arrays]
        mean, var = (policy.get(f"encoder.{k}", torch.ones(0)) for k in ("mean", "var"))
        scale = {"mean": mean.tolist(), "std": var.clamp(min=1e-8).sqrt().tolist()}
        layers = list(zip(texts[::2], texts[1::2]))  # [(weights, biases), ...]
        data["policies"].append({"steps": at, "layers": layers, **scale})
    # A string may have \u003c for <, so that no </script> in it ends the script.
    return PAGE.replace("RUN_DATA", json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


if __name__ == "__main__":
    gc.freeze()  # else Python, before it ends, would look for garbage in all that it imported
    sys.exit(main())
