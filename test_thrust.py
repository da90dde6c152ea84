# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24,<2.5", "torch>=1.13,<=2.13.0", "pytest>=7.2,<10"]
# ///
"""Tests of thrust.py, under the same part numbers. Each name is a claim. If you read one, read
part 5's first: whole updates beside a PPO in plain lines, on torch's Adam and distributions.
What starts processes or writes files comes last, apart. Tests that need a package outside
requirements.txt are skipped where it is missing, unless THRUST_ALL_TESTS is set, as in CI."""

import concurrent.futures
import copy
import csv
import dataclasses
import doctest
import functools
import importlib
import json
import math
import multiprocessing as mp
import os
import pathlib
import pickle
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections import namedtuple
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations, prune

import thrust

torch.set_num_threads(1)  # as in a run; on a busy machine two can take thirty times as long
ZEROS, ONES = np.zeros(8, int), np.ones(8, int)
BOX = thrust.Box(-np.ones(4, np.float32), np.ones(4, np.float32), (4,))
TWO = thrust.Discrete(2)
MultiDiscrete = namedtuple("MultiDiscrete", "nvec shape dtype", defaults=[np.int64])
SWITCHES = namedtuple("MultiBinary", "shape dtype")((3,), np.int8)


def oracle(name):
    """Imports a package that newcomers need not have."""
    if os.environ.get("THRUST_ALL_TESTS"):
        return importlib.import_module(name)
    package = name.split(".")[0].replace("_", "-")
    return pytest.importorskip(name, reason=f"needs {package}: pip install {package}")


def small(**knobs):
    """A config that trains for a second: six updates of eight gradient steps."""
    sizes = {"num_envs": 8, "num_steps": 16, "minibatch_size": 64, "total_steps": 8 * 16 * 6}
    return thrust.Config(**{**sizes, "epochs": 4, "eval_episodes": 4, **knobs})


def learner_of(envs=None, policy=None, **knobs):
    config = small(**knobs)
    return thrust.PPO(envs or thrust.CartPole(config.num_envs), config, policy)


def weights_of(policy):
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])


def same(a, b):
    """Whether two arrays are equal in dtype, shape and every bit."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def equal(a, b):
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return same(a, b) if hasattr(a, "shape") else a == b


def record(envs, steps, skill=False):
    """All that `steps` steps of play return; what `info` has, of the rows that count."""
    rng, got, obs = default_rng(steps), [], np.zeros((envs.num_envs, 4))
    for _ in range(steps):
        actions = rng.integers(0, 2, envs.num_envs)
        if skill:  # so that episodes are long
            actions = 1 * (obs @ [0, 0.02, 1, 0.5] > 0)
        obs, reward, terminated, truncated, info = envs.step(actions)
        got += [obs, reward, terminated, truncated]
        if (ended := terminated | truncated).any():
            got += [info["_final_obs"], np.stack(info["final_obs"][ended])]
        if isinstance(envs, thrust.EnvPool):  # whose arrays are valid until the next step
            got = [*map(np.copy, got)]
    return got


def gymnasiums(name, num_envs, **options):  # its own vector environment
    mode = {"autoreset_mode": oracle("gymnasium").vector.AutoresetMode.SAME_STEP}
    return oracle("gymnasium").make_vec(name, num_envs, "sync", mode, **options)


class Game:
    """An environment of one's own. A step pays ±1, as the action has the sign of what is seen
    first or not, the last at times a jackpot; games end at any time, in either way or both."""

    metadata, state = {"autoreset_mode": "SameStep"}, np.zeros(3)  # (no method)
    rates = np.array([0.15, 0.15, 0.02])

    def __init__(self, num_envs, actions=TWO, scale=(1.0,) * 4, offset=0.0, jackpot=0.0):
        ones = np.ones(len(scale))
        self.single_observation_space = thrust.Box(-ones, ones, ones.shape, np.float64)
        self.num_envs, self.single_action_space, self.close = num_envs, actions, lambda: None
        self.scale, self.offset, self.jackpot = scale, offset, jackpot

    def draw(self):
        return self.offset + self.scale * self.rng.normal(size=(self.num_envs, len(self.scale)))

    def reset(self, *, seed=None, options=None):
        self.seed, self.rng = seed, default_rng(seed)
        self.obs = self.draw()
        return self.obs.copy(), {}

    def step(self, actions):
        chosen, seen = actions.reshape(self.num_envs, -1)[:, 0], (self.obs - self.offset)[:, 0]
        terminated, truncated, rare = (self.rng.random((self.num_envs, 3)) < self.rates).T
        ended, reached, self.obs = terminated | truncated, self.draw(), self.draw()
        reward = np.where((seen > 0) == (chosen > 0), 1.0, -1.0) + self.jackpot * (ended & rare)
        self.obs[~ended] = reached[~ended]
        return self.obs.copy(), reward, terminated, truncated, {"final_obs": reached}


Endless = type("Endless", (Game,), {"rates": np.zeros(3)})


# == 1. Config =================================================================================


def test_numpys_numbers_become_pythons_and_whole_updates_are_counted():
    c = small(hidden=np.array([32]), num_envs=np.int64(8), anneal=np.bool_(False), gamma=1)
    assert repr((c.num_envs, c.hidden, c.anneal, c.gamma)) == "(8, (32,), False, 1.0)"
    assert (c.batch_size, c.num_updates, small(total_steps=999).num_updates) == (128, 6, 7)


# == 2. CartPole ===============================================================================


def plain_pole(state, action):
    """One step of one pole, as Florian (2007) has it: equations 23 and 24, without friction."""
    x, x_dot, theta, theta_dot = map(float, state)
    g, mass, pole, half, tau = 9.8, 1.1, 0.1, 0.5, 0.02
    cos, sin = math.cos(theta), math.sin(theta)
    force = 10.0 if action else -10.0
    push = (force + pole * half * theta_dot**2 * sin) / mass
    turn = (g * sin - cos * push) / (half * (4 / 3 - pole * cos**2 / mass))
    pull = push - pole * half * turn * cos / mass
    return x + tau * x_dot, x_dot + tau * pull, theta + tau * theta_dot, theta_dot + tau * turn


def test_its_poles_move_fall_and_begin_anew_as_the_equations_say():
    envs, rng, starts = thrust.CartPole(2, 30), default_rng(0), default_rng(8)  # seeded 7, 8
    obs, state, length, falls, ends = (
        envs.reset(seed=7)[0],
        starts.uniform(-0.05, 0.05, 4),
        0,
        0,
        0,
    )
    for t in range(900):
        assert same(obs[1], np.float32(state))
        actions = rng.integers(2, size=2) if t // 90 % 2 else 1 * (obs @ [0.1, 0.2, 1, 0.5] > 0)
        state, length = plain_pole(envs.state()["state"][1], actions[1]), length + 1
        obs, reward, terminated, truncated, info = envs.step(actions)
        assert terminated[1] == (abs(state[0]) > 2.4 or abs(state[2]) > math.radians(12))
        assert truncated[1] == (length == 30) and reward.tolist() == [1, 1]
        if terminated[1] or truncated[1]:
            assert same(info["final_obs"][1], np.float32(state)) and info["_final_obs"][1]
            state, length = starts.uniform(-0.05, 0.05, 4), 0
            falls, ends = falls + terminated[1], ends + 1
    assert falls > 9 and ends - falls > 9


@pytest.mark.parametrize("limit", [500, 12])
def test_it_is_gymnasiums_cartpole_bit_for_bit_also_continued_from_its_state(limit):
    theirs = gymnasiums("CartPole-v1", 8, max_episode_steps=limit)
    ours, spare = thrust.CartPole(8, limit), thrust.CartPole(8, limit)
    got, expected = ([env.reset(seed=5)[0]] for env in (ours, theirs))
    for turn in range(60):  # random play, and with some skill
        got += record(ours, 97, skill=turn % 6 > 4)
        expected += record(theirs, 97, skill=turn % 6 > 4)
        spare.set_state(ours.state())
        ours, spare = spare, ours
    assert all(map(same, got, expected))  # only now: nothing may have been written over
    assert same(ours.reset()[0], theirs.reset()[0])  # the streams go on
    assert ours.state()["episodes"].min() > 128  # more than a block of start states


def test_what_is_no_action_is_refused_and_changes_nothing_and_results_are_the_callers():
    env = thrust.CartPole(3)
    env.step(ZEROS[:3])[1][:] = 7
    assert env.step(ZEROS[:3])[1].tolist() == [1, 1, 1]
    before = str(env.state())
    for actions in ([0, 1], [[0, 1, 0]], [0, 1, 2], [0, -1, 1], [0.0, 1.0, 0.0], [True] * 3, 1):
        with pytest.raises(ValueError, match="actions must be 3 ints, 0 or 1; got"):
            env.step(np.array(actions))
    assert str(env.state()) == before != str(thrust.CartPole(3).state())  # without a seed: any


# == 3. ActorCritic ============================================================================


def make_policy(seed=0, space=TWO, **options):
    return thrust.ActorCritic(BOX, space, seed=seed, **options)


def some_obs(size):
    return torch.from_numpy(default_rng(0).standard_normal((size, 4), np.float32))


def test_initial_weights_are_orthogonal_with_gains_and_leave_the_global_generator():
    before, (a, b, c) = torch.get_rng_state(), map(make_policy, (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*map(weights_of, (a, b))) and not torch.equal(*map(weights_of, (a, c)))
    for layer, gain in zip([*a.actor[::2], *a.critic[::2]], [2, 2, 0.01**2, 2, 2, 1]):
        squares = torch.linalg.svdvals(layer.weight.detach()) ** 2 / gain
        assert abs(squares - 1).max() < 1e-5 and not layer.bias.any()  # float32, 64 numbers


@pytest.mark.parametrize("space", [TWO, MultiDiscrete([[3, 2], [2, 4]], (2, 2)), SWITCHES, BOX])
def test_actions_are_drawn_from_the_distribution_that_judges_them(space):
    policy, obs = make_policy(space=space), some_obs(1).repeat(40_000, 1)
    policy.actor[-1].weight.data *= 100  # so that probabilities differ
    if space is BOX:
        policy.actions.log_std.data[:] = torch.tensor([0.0, 0.5, -1.0, 1.0])
    drawn = policy.act(obs, generator=default_rng(0))
    assert same(drawn, policy.act(obs, generator=default_rng(0)))
    assert not same(policy.act(obs), policy.act(obs)) and drawn.shape == (40_000, *space.shape)
    logprob, entropy, _ = policy.evaluate(obs, torch.from_numpy(drawn))
    # the mean of -log π over draws is the entropy, within five standard deviations of a mean
    assert abs((logprob + entropy).mean()) < 5 * logprob.std() / 200 and entropy[0] > 0.5
    greedy = torch.from_numpy(policy.act(obs[:1], greedy=True))
    assert policy.evaluate(obs[:1], greedy)[0] >= logprob.max()


def test_observations_are_arrays_or_tensors_of_any_shape_and_offset_or_discrete():
    obs = np.ones((5, 2, 2))
    for norm in (False, True):
        policy = thrust.ActorCritic(BOX._replace(shape=(2, 2)), TWO, (), norm_obs=norm)
        for other in (torch.tensor(obs), *map(obs.astype, (np.float32, np.uint8, bool))):
            assert torch.equal(policy.value(other), policy.value(obs))
    policy, obs = make_policy(norm_obs=True), 1e5 + 1e-3 * default_rng(0).normal(size=(99, 4))
    policy.encoder.measure(torch.tensor(obs))
    for one in (policy, policy.float()):
        std, mean = torch.std_mean(one.encode(obs), 0, unbiased=False)
        assert max(abs(std - 1).max(), abs(mean).max()) < 1e-5  # float32
    assert "encoder.mean" in policy.state_dict() and "encoder.var" in policy.state_dict()
    policy = thrust.ActorCritic(thrust.Discrete(3, start=-1), TWO, ())
    policy.critic[0].weight.data[:] = torch.tensor([10.0, 20.0, 30.0])
    assert policy.value(np.array([-1, 1, 0, 1])).tolist() == [10, 30, 20, 30]
    for number in (-2, 2):
        with pytest.raises(RuntimeError, match="Class values must be"):
            policy.act(np.array([number]))


def test_hooks_and_functional_call_reach_the_policy_as_they_reach_any_module():
    policy, others, obs, calls = make_policy(), make_policy(seed=1), some_obs(7), []
    for module in (policy, policy.actor[0], policy.critic[-1], policy.encoder):
        module.register_forward_hook(lambda module, inputs, outputs: calls.append(module))
    policy.evaluate(obs, torch.zeros(7, dtype=torch.int64))
    assert calls == [policy.encoder, policy.actor[0], policy.critic[-1], policy]
    call = pytest.importorskip("torch.func").functional_call
    both = call(policy, dict(others.named_parameters()), (obs,))
    assert all(map(torch.equal, both, others(obs)))


# == 4. Rollout ================================================================================


def gae_by_definition(rewards, values, next_values, terminated, truncated, gamma, lam):
    """Â_t = Σ_k (γλ)^k δ_{t+k}, up to the end of the episode; O(T²), one number at a time."""
    advantages = np.zeros(rewards.shape)
    for t, n in np.ndindex(rewards.shape):
        for s in range(t, len(rewards)):
            following = 0.0 if terminated[s, n] else next_values[s, n]
            delta = rewards[s, n] + gamma * following - values[s, n]
            advantages[t, n] += (gamma * lam) ** (s - t) * delta
            if terminated[s, n] or truncated[s, n]:
                break
    return advantages


def torchrls(rewards, values, next_values, terminated, truncated, gamma, lam):
    functional = oracle("torchrl.objectives.value.functional")
    arrays = values, next_values, rewards, terminated | truncated, terminated
    tensors = [torch.from_numpy(a.T.copy())[..., None] for a in arrays]  # (N, T, 1)
    theirs = functional.generalized_advantage_estimate(gamma, lam, *tensors)
    return theirs[0][..., 0].numpy().T


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("theirs", [gae_by_definition, torchrls])
def test_gae_is_its_definition_and_torchrls(theirs, gamma, lam):
    numbers = rewards, values, next_values = default_rng(3).normal(size=(3, 6, 100))
    flags = terminated, _ = default_rng(4).random((2, 6, 100)) < 0.4  # so that all cases occur
    expected = theirs(*numbers, *flags, gamma, lam)
    next_values[terminated] = np.nan  # are not read
    advantages, returns = thrust.gae(*numbers, *flags, gamma, lam)
    # float64, numbers of size 1: their last bit is 2**-52. Torchrl's are float32 in parts.
    atol = 1e-12 if theirs is gae_by_definition else 2e-6
    np.testing.assert_allclose(advantages, expected, atol=atol)
    np.testing.assert_allclose(returns, expected + values, atol=atol)


# == 5. PPO ====================================================================================


class PlainPPO:
    """PPO once more, in plain lines, with torch's own distributions, Adam and clipping. It is
    shown what a learner has played, and has to come to the same weights."""

    def __init__(self, learner, choices):
        self.config, self.choices = learner.config, choices
        self.policy = copy.deepcopy(learner.policy)  # for its two networks and log σ
        self.optimizer = torch.optim.Adam(self.policy.parameters(), eps=1e-5)
        self.seen, self.sums, self.running = np.zeros((0, 3)), [], 0.0
        self.steps = self.gradient_steps = 0

    def judge(self, obs, action):  # → log-probability, entropy and value of each row
        outputs, value = self.policy.actor(obs), self.policy.critic(obs)[:, 0]
        if self.choices:
            parts = outputs.split(self.choices, 1)
            several = [torch.distributions.Categorical(logits=part) for part in parts]
        else:
            pairs = zip(outputs.T, self.policy.actions.log_std.exp())
            several = [torch.distributions.Normal(mean, std) for mean, std in pairs]
        logprob = sum(one.log_prob(column) for one, column in zip(several, action.T))
        return logprob, sum(one.entropy() for one in several), value

    def normalised(self, obs):  # by what was seen in earlier updates
        if self.steps:
            obs = (obs - self.seen.mean(0)) / np.sqrt(np.maximum(self.seen.var(0), 1e-8))
        return torch.tensor(np.clip(obs, -10, 10).reshape(-1, 3))

    def scaled(self, rewards, ended):  # by the discounted sums seen so far, these included
        for t in range(len(rewards)):
            self.running = self.config.gamma * self.running + rewards[t]
            self.sums.append(self.running)
            self.running = np.where(ended[t], 0.0, self.running)
        return np.clip(rewards / np.std(self.sums), -10, 10)

    def update(self, r, generator):
        """Learns from the rollout r; the generator gives the order of minibatches."""
        c, obs, next_obs = self.config, self.normalised(r.obs), self.normalised(r.next_obs)
        action = torch.tensor(r.action).reshape(len(obs), -1)
        with torch.no_grad():
            logprob, entropy, value = self.judge(obs, action)
            next_value = self.policy.critic(next_obs)
        reward = self.scaled(r.reward, r.terminated | r.truncated)
        values = (x.view(reward.shape).numpy() for x in (value, next_value))
        flags = r.terminated, r.truncated
        advantage = gae_by_definition(reward, *values, *flags, c.gamma, c.gae_lambda)
        advantage = torch.tensor(advantage).flatten()
        rate = c.learning_rate * (1 - self.steps / c.total_steps if c.anneal else 1)
        self.optimizer.param_groups[0]["lr"] = rate
        log = self.improve(generator, obs, action, logprob, advantage, value + advantage)
        self.seen = np.concatenate([self.seen, *r.obs])
        self.steps += len(obs)
        self.gradient_steps += len(log)
        shown = log if c.target_kl else log[-len(log) // c.epochs :]  # of the last epoch
        row = {name: np.mean([one[name].item() for one in shown]) for name in log[0]}
        unexplained = (advantage.var() / (value + advantage).var()).item()
        row |= {"entropy": entropy.mean().item(), "explained_variance": 1 - unexplained}
        return row | {"learning_rate": rate, "gradient_steps": self.gradient_steps}

    def improve(self, generator, *batch):
        c, size, log = self.config, len(batch[0]), []
        for _ in range(c.epochs):
            order = generator.permutation(size)
            for rows in np.array_split(order, math.ceil(size / c.minibatch_size)):
                obs, action, old_logprob, advantage, returns = (x[rows] for x in batch)
                logprob, entropy, value = self.judge(obs, action)
                ratio = (logprob - old_logprob).exp()
                kl = (ratio - 1 - ratio.log()).mean()
                if log and 0 < c.target_kl < kl:
                    return log
                advantage = (advantage - advantage.mean()) / advantage.std()
                clipped = ratio.clamp(1 - c.clip, 1 + c.clip)
                policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                value_loss = ((value - returns) ** 2).mean()
                loss = policy_loss + c.vf_coef * value_loss - c.ent_coef * entropy.mean()
                self.optimizer.zero_grad()
                loss.backward()
                norm = clip_grad_norm_(self.policy.parameters(), c.max_grad_norm or math.inf)
                self.optimizer.step()
                row = {"policy_loss": policy_loss, "value_loss": value_loss, "approx_kl": kl}
                outside = (ratio != clipped).double().mean()
                log.append({**row, "clip_fraction": outside, "grad_norm": norm})
        return log


UNUSUAL = {
    "num_envs": 8, "num_steps": 16, "total_steps": 2000, "minibatch_size": 50, "epochs": 3,
    "learning_rate": 0.02, "gamma": 0.6, "gae_lambda": 0.7, "clip": 0.07, "ent_coef": 0.05,
    "vf_coef": 0.8, "max_grad_norm": 0.3, "norm_obs": True, "norm_reward": True,
}  # fmt: skip
KINDS = [(thrust.Discrete(3), [3], {}), (MultiDiscrete([3, 2], (2,)), [3, 2], {})]
KINDS += [(BOX, None, {"anneal": False})]
KINDS += [(BOX, None, {"target_kl": 0.004, "max_grad_norm": 0.0, "minibatch_size": 9999})]


@pytest.mark.parametrize(("space", "choices", "others"), KINDS)
def test_whole_updates_are_those_of_a_plain_ppo(space, choices, others, monkeypatch):
    """Three updates at knobs none of which has its default, in float64."""
    config, orders, events = thrust.Config(**{**UNUSUAL, **others}), [], []
    envs = Game(8, space, scale=[1, 100, 0], offset=[0, 50, 0.3], jackpot=1e3)  # cut off at 10
    policy = thrust.ActorCritic(envs.single_observation_space, space, (16,), norm_obs=True)
    learner = thrust.PPO(envs, config, policy.double())
    plain, before = PlainPPO(learner, choices), weights_of(policy)
    r, improve = learner.rollout, learner._improve
    edges = r.terminated[0], r.terminated[-1], r.truncated[0], r.truncated[-1]  # views

    def spy(batch, rate):
        logprob = policy.evaluate(batch.obs, batch.action)[0]
        assert abs(logprob - batch.logprob).max() < 1e-12  # every ratio is 1 at first
        orders.append(copy.deepcopy(learner.generator))
        return improve(batch, rate)

    monkeypatch.setattr(learner, "_improve", spy)
    for _ in range(3):
        row, expected = learner.update(), plain.update(r, orders.pop())
        # Only the clipping differs: theirs divides by norm + 1e-6, which is up to 3e-6 of the
        # norm, and Adam passes on no more than that share of 27 steps of 0.02.
        theirs = weights_of(plain.policy)
        torch.testing.assert_close(weights_of(policy), theirs, atol=2e-6, rtol=0)
        assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-4)
        events.append([x.any() for x in (*edges, r.reward > 99)])
    assert (weights_of(policy) - before).abs().median() > 0.02 and np.any(events, 0).all()
    full = 9 * math.ceil(128 / config.minibatch_size)
    assert (plain.gradient_steps < full) == bool(config.target_kl)  # which ended some early


def stages(**knobs):
    """What two updates of a learner do, in the order in which it is done."""
    learner = learner_of(Game(knobs.get("num_envs", 8)), **knobs)
    found = {"weights": weights_of(learner.policy)}
    with mock.patch.object(thrust, "ppo_loss", wraps=thrust.ppo_loss) as spy:
        learner.update()
    batches = [call.args[1] for call in spy.call_args_list]
    found["games"] = learner.rollout.obs.copy(), learner.rollout.action.copy()
    found["targets"] = torch.cat([batch.returns for batch in batches]).unique()
    found["minibatches"] = [len(batch.returns) for batch in batches]
    found["update"] = weights_of(learner.policy)
    learner.update()
    return {**found, "next": weights_of(learner.policy)}


# The first stage that a knob changes, and another value than small()'s. None: those of runs.
FIRST = {
    "seed": ("weights", 1), "hidden": ("weights", (32,)), "num_envs": ("games", 4),
    "num_steps": ("games", 8), "gamma": ("targets", 0.5), "gae_lambda": ("targets", 0.5),
    "norm_reward": ("targets", False), "minibatch_size": ("minibatches", 32),
    "epochs": ("minibatches", 2), "target_kl": ("minibatches", 1e-7), "clip": ("update", 1e-4),
    "ent_coef": ("update", 0.1), "vf_coef": ("update", 1.0), "learning_rate": ("update", 0.01),
    "max_grad_norm": ("update", 0.1), "anneal": ("next", False), "total_steps": ("next", 999),
    "norm_obs": ("next", False), "env": (None, "x"), "workers": (None, 2), "threads": (None, 2),
    "timeout": (None, 9.0), "runs": (None, "x"), "checkpoint_seconds": (None, 9.0),
    "eval_episodes": (None, 9), "device": (None, "cpu:0"),
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(thrust.Config)])
def test_every_knob_changes_what_it_should_and_nothing_before_it(name):
    stage, value = FIRST[name]
    usual, other = stages(), stages(**{name: value})
    differing = [key for key in usual if not equal(usual[key], other[key])]
    assert differing[:1] == [stage] * bool(stage)


def test_a_rollout_holds_the_states_reached_and_the_log_the_last_100_episodes_and_the_rate():
    envs, ends = thrust.CartPole(8, max_episode_steps=7), 0
    envs._reward *= 3
    learner = learner_of(envs, norm_reward=False, gamma=0.0)
    for update in range(1, 9):
        row, r = learner.update(), learner.rollout
        ended = r.terminated | r.truncated
        assert same(r.next_obs[:-1][~ended[:-1]], r.obs[1:][~ended[:-1]])
        assert (np.abs(r.obs[1:][ended[:-1]]) <= 0.05).all()  # as all starts of CartPole's
        assert np.abs(r.next_obs[ended]).mean() > 0.1
        ends += ended.sum()
        assert (row["steps"], row["episodes"], row["mean_length"]) == (128 * update, ends, 7)
        # the rate is not yet 0 in the last of six updates, nor below 0 later
        assert row["learning_rate"] == pytest.approx(1e-3 * max(0, 7 - update) / 6, abs=1e-12)
        assert math.isnan(row["explained_variance"])  # not -inf; all returns are equal
    assert row["mean_return"] == 21 and len(learner.recent) == 100 < ends
    assert math.isnan(learner_of(Endless(8)).update()["mean_return"])


PLACES = [(name, x) for name in ("obs", "last obs") for x in (math.nan, math.inf)]
PLACES += [("reward", x) for x in (math.nan, -math.inf, 1e25, 1e30)]


# (Infinity in obs with norm_obs would be 10 to the loss, and the normaliser's mean be lost.)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("name", "value"), PLACES)
def test_nan_and_infinity_raise_before_anything_has_learned_from_them(name, value, norm):
    learner = learner_of(Game(8), norm_obs=norm, norm_reward=norm, minibatch_size=128)
    learner.envs.rates = np.full(3, 0.5)  # some game ends in the last step
    learner.update()
    before, results = copy.deepcopy(learner.policy.state_dict()), []

    def broken(actions):
        results.append(Game.step(learner.envs, actions))
        obs, reward, ended = results[-1][:3]
        if len(results) == 16:  # the last step; "last obs": in the first of a new game alone
            (reward if name == "reward" else obs)[ended if name == "last obs" else ...] = value
        return results[-1]

    learner.envs.step = broken
    if norm and value in (1e25, 1e30):  # are scaled
        assert math.isfinite(learner.update()["grad_norm"])
        return
    with np.errstate(all="ignore"), pytest.raises(RuntimeError, match=r"length is |NaN"):
        learner.update()
    assert equal(before, learner.policy.state_dict())


def trained(policy=None, disturb=lambda learner: None):
    learner = learner_of(policy=policy)
    for _ in range(3):
        disturb(learner)
        learner.update()
    return weights_of(learner.policy)


def test_weights_follow_from_the_seed_whatever_others_draw_or_train_or_leave_in_gradients():
    other, policy = learner_of(seed=1), make_policy(norm_obs=True)

    def disturb(learner):
        other.update()
        learner.policy.zero_grad()
        learner.policy.value(torch.rand(9, 4)).sum().backward()

    def generators():
        return str((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()))

    before, copies = generators(), (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)))
    weights = [trained(policy=one) for one in (policy, *copies)]
    assert torch.equal(*weights[:2]) and torch.equal(*weights[1:]) and before == generators()
    assert torch.equal(trained(), trained(disturb=disturb))


def test_seeds_are_of_31_bits_and_no_purpose_or_update_shares_one():
    seeds = [thrust.derive_seed(i, j) for i in range(2500) for j in range(4)]
    learner = learner_of(Game(8))
    for learner.updates in range(100):
        learner.begin_episodes()
        seeds += [learner.envs.seed, learner.generator.bit_generator.state["state"]["state"]]
        assert learner.generator.random() != default_rng(learner.envs.seed).random()
    assert max(seeds[:10_000] + seeds[10_000::2]) < 2**31 - 10**6
    assert len({*seeds[:400], *seeds[10_000:]}) == 600


def test_learners_that_average_keep_equal_weights_and_moments_of_all_their_data():
    barrier, given = threading.Barrier(2, timeout=60), {}  # two of them, in two threads

    def average(tensor):
        given[threading.get_ident()] = tensor
        barrier.wait()
        mean = sum(given.values()) / 2
        barrier.wait()
        return mean

    configs = small(seed=0, target_kl=1e-4), small(seed=1, target_kl=1e-4)
    policies = make_policy(norm_obs=True), make_policy(norm_obs=True)
    a, b = (thrust.PPO(Game(8), *both, average=average) for both in zip(configs, policies))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(thrust.PPO.update, (a, b)))
    assert not same(a.rollout.obs, b.rollout.obs)
    assert rows[0]["gradient_steps"] == rows[1]["gradient_steps"] < 8
    assert equal(a.policy.state_dict(), b.policy.state_dict())
    assert equal(a.scale_rewards.moments.state_dict(), b.scale_rewards.moments.state_dict())
    obs = np.concatenate([one.rollout.obs.reshape(-1, 4) for one in (a, b)])
    np.testing.assert_allclose(a.policy.encoder.mean, obs.mean(0), atol=1e-12)
    np.testing.assert_allclose(a.policy.encoder.var, obs.var(0), atol=1e-12)


def trains(learner):
    """Whether an update changes all parameters that require a gradient, and no others."""
    before = copy.deepcopy(learner.policy.state_dict())
    learner.update()
    parameters = learner.policy.named_parameters()
    return all(torch.equal(p, before[name]) != p.requires_grad for name, p in parameters)


LAYERS = nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.Conv2d(3, 4, 2), nn.Flatten()
CNN = nn.Sequential(*LAYERS).to(memory_format=torch.channels_last)
DEEDS = {
    "layer": lambda policy: policy.actor.__setitem__(2, nn.Linear(64, 64)),
    "encoder": lambda policy: setattr(policy, "encoder", copy.deepcopy(CNN)),
    "prune": lambda policy: prune.l1_unstructured(policy.critic[2], "weight", 0.5),
    "weight_norm": lambda policy: parametrizations.weight_norm(policy.actor[0]),
    "assign": lambda policy: policy.load_state_dict(policy.state_dict(), assign=True),
    "freeze": lambda policy: policy.actor.requires_grad_(False),
    "double": lambda policy: policy.double(),
    "float": lambda policy: policy.double().float(),
}


# ("freeze": Adam's running mean must not move on what was trained before.)
@pytest.mark.parametrize("deed", DEEDS)
def test_what_is_changed_before_ppo_is_trained_and_later_too_or_refused_if_replaced(deed):
    if deed in ("weight_norm", "assign") and torch.__version__ < "2.1":
        pytest.skip("is not in this torch")
    first, second = make_policy(norm_obs=True), make_policy(norm_obs=True)
    DEEDS[deed](first)
    learners = [learner_of(policy=policy) for policy in (first, second)]
    learners[1].update()
    DEEDS[deed](second)
    if deed not in ("freeze", "double", "float"):
        with pytest.raises(RuntimeError, match="parameters were replaced: make a new PPO"):
            learners.pop().update()
    for learner in learners:
        assert trains(learner) and learner.adam.m.dtype == weights_of(learner.policy).dtype


def test_dropout_and_batch_norm_are_in_train_mode_in_gradient_steps_alone():
    policy, calls, layers = make_policy(), [], (nn.BatchNorm1d(8), nn.Dropout())
    policy.actor = nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(8, 2))
    for layer in layers:
        layer.register_forward_hook(lambda m, x, y: calls.append((m.training, len(x[0]))))
    learner = learner_of(policy=policy)
    assert trains(learner) and trains(learner)
    thrust.evaluate(policy, thrust.CartPole(3), seed=0, limit=1)
    # an update: 16 steps, the whole rollout at once, and 8 gradient steps
    update = [(False, 8)] * 16 + [(False, 128)] + [(True, 64)] * 8
    assert calls[::2] == calls[1::2] == [(False, 8), *update, *update, (False, 3)]


def test_a_whole_update_is_stable_baselines3s_with_its_own_gae():
    """Two epochs over one batch; in the second, most of the ratios are beyond the band."""
    sb3 = oracle("stable_baselines3")
    knobs = {"learning_rate": 1e-2, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5}
    sizes = {"n_steps": 16, "batch_size": 128, "n_epochs": 2, "clip_range": 0.02, "seed": 0}
    vector = sb3.common.env_util.make_vec_env("CartPole-v1", 8)
    theirs = sb3.PPO("MlpPolicy", vector, device="cpu", **sizes, **knobs)
    knobs |= {"minibatch_size": 128, "epochs": 2, "clip": 0.02, "norm_obs": False}
    learner = learner_of(thrust.CartPole(8, 12), **knobs, norm_reward=False)
    actor, critic, r = learner.policy.actor, learner.policy.critic, learner.rollout
    layers = nn.ModuleList([actor[:4], critic[:4], actor[4], critic[4]])  # in their order
    for mine, other in zip(layers.parameters(), theirs.policy.parameters()):
        other.data.copy_(mine.data)
    old, buffer = copy.deepcopy(learner.policy), theirs.rollout_buffer
    assert learner.update()["clip_fraction"] > 0.1 and r.truncated.any()
    buffer.reset()
    buffer.observations[:], buffer.actions[..., 0] = r.obs, r.action
    with torch.no_grad():
        obs, action = torch.tensor(r.obs).flatten(0, 1), torch.tensor(r.action).flatten()
        logprob, _, value = (x.view(16, 8).numpy() for x in old.evaluate(obs, action))
        reached = old.value(r.next_obs.reshape(-1, 4)).view(16, 8)
    buffer.log_probs[:], buffer.values[:] = logprob, value
    # Its collector adds γ·V(final_obs) to the reward of a truncated step, and ends there.
    buffer.rewards[:] = r.reward + 0.99 * reached.numpy() * (r.truncated & ~r.terminated)
    ended, buffer.full = r.terminated | r.truncated, True
    buffer.episode_starts[1:] = ended[:-1]
    buffer.compute_returns_and_advantage(reached[-1], ended[-1])
    theirs.set_logger(sb3.common.logger.configure(None, []))
    theirs.train()
    for mine, other in zip(layers.parameters(), theirs.policy.parameters()):
        # A step is rate·g/(|g| + 1e-5), g off by 2**-24 or so: by a thousandth of the rate
        torch.testing.assert_close(mine.data, other.data, atol=1e-5, rtol=0)


def test_only_outside_the_band_on_the_winning_side_is_the_gradient_cut():
    #         inside    gained    lost, each with Â = 1 and with Â = -1
    ratio, sign = [1.15, 0.9, 1.5, 1.3, 0.7, 0.6], torch.tensor([1.0, -1.0] * 3)
    logprob, zeros = torch.tensor(ratio).log().requires_grad_(), torch.zeros(6)
    policy = SimpleNamespace(evaluate=lambda obs, action: (logprob, zeros, zeros))
    batch = thrust.Batch(zeros[:, None], zeros, zeros, sign, zeros)
    thrust.ppo_loss(policy, batch, thrust.Config(clip=0.2))[0].backward()
    assert (logprob.grad != 0).tolist() == [True, True, False, True, True, False]
    with pytest.raises(AssertionError, match="would make"):  # (M, M) of it
        thrust.ppo_loss(policy, batch._replace(returns=zeros[:, None]), small())


# == 6. Other games ============================================================================

FITS = [(np.float32, [1.1, 2.0]), (np.float32, [1, 2]), (np.float32, torch.ones(2))]
FITS += [(np.int32, np.array([1, 2])), (np.uint8, [0.0, 255.0]), (bool, [0, 1])]
MISFITS = [(np.int32, [2**31, 0]), (np.uint8, [-1, 256]), (np.int64, [0.5, 1]), (bool, [0, 2])]
MISFITS += [(np.int64, [math.nan, 1]), (np.float32, ["1", "2"]), (np.float32, [1j, 0])]
MISFITS += [(np.float32, [[1.0, 2.0]]), (np.float32, [1.0]), (np.float32, 1.0)]


def put_results(info, reward=(1, 2)):
    """What a batch of two may return, of which the second ended: (rows, obs, final_obs)."""
    (obs, final_obs), flags = np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), bool)
    results = np.ones((2, 3)), reward, [0, 1], [0, 0], info
    return thrust.put_step(results, obs, final_obs, np.zeros(2), *flags), obs, final_obs


def test_numbers_are_put_where_they_fit_and_refused_where_they_would_change_or_are_missing():
    for dtype, value in FITS:
        target = np.zeros(2, dtype)
        thrust.put(target, value, "obs")
        assert same(target, np.asarray(value).astype(dtype))
    for dtype, value in MISFITS:
        with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"^obs must fit into "):
            thrust.put(np.zeros(2, dtype), value, "obs")
    nines = [[0] * 3, [9] * 3]
    for last in (np.array([None, np.full(3, 9.0)], object), torch.tensor(nines), nines):
        rows, obs, final_obs = put_results({"final_obs": last})
        assert rows.tolist() == [1] and obs.all() and final_obs.tolist() == nines


def test_all_of_gymnasiums_kinds_of_action_are_drawn_and_trained_also_of_a_subclass():
    spaces = oracle("gymnasium").spaces
    Mine = type("Mine", (spaces.Box,), {})
    kinds = [spaces.Discrete(3, start=5), spaces.MultiDiscrete([2, 3], start=[1, 7])]
    kinds += [spaces.MultiBinary((2, 2)), Mine(-1, 1, (2,)), spaces.Box(0, 3, (2,), np.int32)]
    for space in kinds:
        learner = learner_of(Game(8, space))
        assert trains(learner) and thrust.ActorCritic(Mine(0, 1, (2,)), space)
        sent = learner.policy.to_env(learner.policy.act(some_obs(500)))
        assert sent.dtype == space.dtype and all(action in space for action in sent)
        assert len(np.unique(sent, axis=0)) >= 3


@pytest.mark.filterwarnings("error")  # of -inf + inf
def test_actions_are_in_units_of_the_box_where_it_has_limits_and_raw_where_not():
    low, high = np.array([[-1, 0, -np.inf, 2], [1, 512, np.inf, np.inf]], np.float32)
    policy = make_policy(space=thrust.Box(low, high, (4,)))
    action = policy.act(some_obs(999), generator=default_rng(0))
    sent, (a, b, c, d) = policy.to_env(action), action.T
    assert abs(action.std() / 0.7 - 1) < 5 / math.sqrt(2 * action.size)  # and means near 0
    assert abs(a).max() > 1 and action.dtype == sent.dtype == np.float32  # drawn beyond limits
    expected = a.clip(-1, 1), 256 + 256 * b.clip(-1, 1), c, d.clip(2)
    np.testing.assert_allclose(sent.T, expected, rtol=1e-6, atol=1e-4)  # float32, up to 512
    whole = thrust.Box(np.full(3, -2), np.full(3, 2), (3,), np.int32)  # rounded, not cut off
    sent = make_policy(space=whole).to_env(np.array([[0.3, -0.3, 9.0]]))
    assert sent.dtype == np.int32 and sent.tolist() == [[1, -1, 2]]


class Single:
    """As Gymnasium has them. It shows step and game, in float64 and always the same array. Its
    games end after three steps, the odd ones by termination, the others by truncation."""

    observation_space, action_space = thrust.Box(np.zeros(2), np.ones(2), (2,)), TWO

    def __init__(self):
        self.obs, self.calls, self.close = np.zeros(2), [], lambda: self.calls.append("closed")

    def reset(self, *, seed=None, options=None):
        self.calls.append((seed, options))
        self.obs[:] = 0, len(self.calls)
        return self.obs, {}

    def step(self, action):
        self.obs[0] += 1
        ends = self.obs[0] == 3
        return self.obs, int(action), ends and self.obs[1] % 2, ends and not self.obs[1] % 2, {}


def test_every_game_of_environments_one_by_one_is_seeded_and_its_end_is_copied():
    envs = thrust.GymEnvs(Single, 2)
    for _ in range(2):
        first, _ = envs.reset(seed=5, options="given")
        steps = [envs.step(np.array([0, 1])) for _ in range(7)]
    envs.close()
    assert same(first, np.float32([[0, 4], [0, 4]]))
    shown = [obs[1].tolist() for obs, *_ in steps]
    assert shown == [[1, 4], [2, 4], [0, 5], [1, 5], [2, 5], [0, 6], [1, 6]]
    flags = [(terminated[1], truncated[1]) for _, _, terminated, truncated, _ in steps]
    assert flags[2] == (False, True) and flags[5] == (True, False)
    assert steps[2][4]["final_obs"].tolist() == [[3, 4], [3, 4]]
    assert all(same(reward, np.array([0.0, 1.0])) for _, reward, *_ in steps)
    first, *later, end = envs.envs[1].calls
    assert first == (6, "given") and end == "closed"
    games = [(thrust.derive_seed(6, number), None) for number in (1, 2)]
    assert later == [*games, first, *games]


def test_environments_are_part_2s_a_modules_or_gymnasiums_or_given(capsys):
    gym, learners = (
        oracle("gymnasium"),
        (learner_of(), learner_of(gymnasiums("CartPole-v1", 8))),
    )
    rows = [[learner.update()["grad_norm"] for _ in range(3)] for learner in learners]
    assert rows[0] == rows[1]  # to the last bit
    envs = gymnasiums("CartPole-v1", 8)
    envs.metadata = {"autoreset_mode": "NextStep"}  # as another of its class may have left it
    thrust.require_same_step(envs)  # goes by its own attribute
    assert type(thrust.make_env("CartPole", 2)) is thrust.CartPole
    assert thrust.make_env(f"{__name__}:Game", 2).num_envs == 2
    obs = thrust.make_env("CartPole-v1", 3).reset(seed=7)[0]
    assert same(obs[1], gym.make("CartPole-v1").reset(seed=8)[0])
    both = gym.spaces.Dict(a=gym.spaces.Box(0, 9, (3,)), b=gym.spaces.Discrete(4))
    seen, text = {"a": np.ones(3, np.float32), "b": 2}, gym.spaces.Dict(a=gym.spaces.Text(4))

    def make(space):
        pole = gym.make("CartPole-v1")
        return gym.wrappers.TransformObservation(pole, lambda obs: seen, space)

    gym.register("Both-v0", lambda: make(both))
    gym.register("Text-v0", lambda: make(text))
    envs = thrust.make_env(f"{__name__}:Both-v0", 3)  # of a module that has no such name
    assert envs.reset()[0].tolist() == [[1, 1, 1, 0, 0, 1, 0]] * 3
    assert capsys.readouterr().err.count("observations of ") == 1  # not 3 times
    # else text would be taken, as if its letters' numbers were quantities
    with pytest.raises(ValueError, match=r" must be one of Box, Discrete; wrap it .*Filter"):
        learner_of(thrust.make_env("Text-v0", 8))


def poles(**attributes):
    """Eight CartPoles with other attributes."""
    vars(env := thrust.CartPole(8)).update(attributes)
    return env


NEXT_STEP, NO_SHAPE = {"autoreset_mode": "NextStep"}, SimpleNamespace(shape=None)
LETTERS = thrust.Box(None, None, (4,), np.dtype("U9"))
REFUSED = {  # what is said, and when
    "^num_envs must be int from 1 to 1000000; got 0": lambda: small(num_envs=0),
    "^num_envs must be .*; got 64.0": lambda: small(num_envs=64.0),
    "^num_envs must be .*; got True": lambda: small(num_envs=True),
    "^num_envs must be .*; got .64.": lambda: small(num_envs=[64]),
    "^gamma must be float from 0.0 to 1; got nan": lambda: small(gamma=math.nan),
    "^anneal must be bool; got 1": lambda: small(anneal=1),
    "^hidden must be a tuple of int from 1 to 100000; got 64": lambda: small(hidden=64),
    "^hidden must be .*; got ..64": lambda: small(hidden=((64,),)),
    "^one rollout, num_envs .* = 128, must be .* = 127": lambda: small(total_steps=127),
    "^one rollout, num_envs .* = 1, must be from 2": lambda: small(num_envs=1, num_steps=1),
    "^config.num_envs is 8, envs has 3": lambda: learner_of(thrust.CartPole(3)),
    "must be SAME_STEP, not NextStep: give": lambda: learner_of(poles(metadata=NEXT_STEP)),
    "CartPole must be SAME_STEP, not 7": lambda: learner_of(poles(autoreset_mode=7)),
    "is not a batch, with num_envs, .*; GymEnvs": lambda: learner_of(Single()),
    "zip.. argument 2 is shorter": lambda: thrust.GymEnvs(Single, 2).step([0]),
    "^text must be one of Box, Discrete; wrap": lambda: thrust.ActorCritic("text", TWO),
    "^text must be one of Discrete, .*Box; wrap": lambda: thrust.ActorCritic(BOX, "text"),
    "must fit into .*; got .* .2, 3": lambda: put_results({}, reward=np.ones((2, 3))),
    '`info` has no "final_obs"': lambda: put_results({}),
    'and `info` has no "final_obs"': lambda: put_results({"final_obs": None}),
    "^final_obs must fit": lambda: put_results({"final_obs": np.array([None, None])}),
    "numbers, not .*shape=None.*; wrap it": lambda: pool_of(single_observation_space=NO_SHAPE),
    "numbers, not Box.*; wrap it": lambda: pool_of(single_action_space=LETTERS),
    "must be SAME_STEP, not NextStep": lambda: pool_of(metadata=NEXT_STEP),
    "8 environments cannot have 0 workers": lambda: thrust.EnvPool(thrust.CartPole, 8, 0),
    "8 environments cannot have 9 workers": lambda: thrust.EnvPool(thrust.CartPole, 8, 9),
}


def pool_of(**attributes):
    return thrust.EnvPool(lambda num_envs: poles(**attributes), 8, 2)


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()


# == Processes and files =======================================================================

SOURCE, HERE = pathlib.Path(thrust.__file__), pathlib.Path(__file__)
METHODS = mp.get_all_start_methods()


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """A new folder, which is the current one, and from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def log_of(run):
    """The rows of log.csv, without what a clock says."""
    with open(pathlib.Path(run, "log.csv"), newline="") as file:
        clock = ("seconds", "steps_per_second")
        return [{k: v for k, v in r.items() if k not in clock} for r in csv.DictReader(file)]


# == The file ==================================================================================


def parts():
    """{number: (what its Needs line says, its text)} of the parts that have such a line."""
    text = SOURCE.read_text(encoding="utf-8").partition('\nif __name__ == "__main__"')[0]
    banner = r"^# =+\n# (\d+)\. .*\n# =+\n(?:# Needs: (.*)\n)?"
    _, *pieces = re.split(banner, text, flags=re.MULTILINE)
    return dict(zip(map(int, pieces[::3]), zip(pieces[1::3], pieces[2::3])))


USES = {  # what a copier does with a part alone, and what comes of it
    1: (lambda m: m.Config(num_steps=16).batch_size, 256),
    2: (lambda m: m.CartPole(3).reset(seed=1)[0].shape, (3, 4)),
    3: (lambda m: m.ActorCritic(BOX, TWO).act(np.zeros((3, 4), np.float32)).shape, (3,)),
    4: (lambda m: m.gae(*np.ones((3, 1, 1)), *np.zeros((2, 1, 1), bool), 0.5, 0.9)[0], 0.5),
    5: (lambda m: m.PPO(m.CartPole(8), m.Config(**vars(small()))).update()["steps"], 128),
    6: (lambda m: m.make_env("CartPole", 2).num_envs, 2),
    7: (lambda m: m.EnvPool(thrust.CartPole, 4, 2).step(ZEROS[:4])[0].shape, (4, 4)),
}


@pytest.mark.parametrize("number", USES)
def test_each_part_can_be_lifted_with_what_it_says_it_needs(number, in_tmp):
    needed, (use, value) = [number], USES[number]
    for i in needed:  # which grows meanwhile
        named = re.findall(r"\d", parts()[i][0].partition("; part")[2])
        needed += [n for n in map(int, named) if n not in needed]
    found = [parts()[i] for i in sorted(needed)]
    lines = [line for needs, _ in found for line in needs.split("; ") if "import" in line]
    text = "\n".join([*dict.fromkeys(lines), *(text for _, text in found)])
    (in_tmp / f"lifted_{number}.py").write_text(text, encoding="utf-8")
    assert use(importlib.import_module(f"lifted_{number}")) == value


def test_parts_1_to_5_are_ppo_and_nothing_else():
    text = "".join(parts()[number][1] for number in (2, 3, 4, 5))
    for word in ("rank", "thread", "checkpoint", "worker", "multiprocessing", "open("):
        assert word not in text, word


def test_examples_in_docstrings_are_true():
    results = doctest.testmod(thrust, extraglobs={"np": np})
    assert results.attempted > 0 and results.failed == 0


LOOP = parts()[5][1].partition("this trains:\n#\n")[2].replace("\n#", "\n").lstrip("#")
LOOP = f"from thrust import *\n{textwrap.dedent(LOOP)}"
README = SOURCE.with_name("README.md").read_text(encoding="utf-8")
PROGRAMS = [LOOP, *re.findall(r"```python\n(.*?)```", README, re.DOTALL)]


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_the_loop_of_part_5_and_the_programs_in_readme_run(number, in_tmp):
    """Each in the folder of a run."""
    program = PROGRAMS[number]
    for package in re.findall(r"^(?:import|from) (gymnasium|minatar)", program, re.M):
        oracle(package)
    thrust.train(small())
    (in_tmp / "program.py").write_text(program + "\nimport sys\n\nprint(*sys.modules)\n")
    path = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    out = subprocess.check_output([sys.executable, "program.py"], env=path, text=True)
    assert number > 0 or (out.count("\n") == 98 and "torch._dynamo" not in out)


def test_readmes_own_environment_is_learned_alike_with_workers(in_tmp, capsys):
    program = next(p for p in PROGRAMS if "class Walk" in p)
    (in_tmp / "my_game.py").write_text(program)
    for workers in "02":
        flags = f"--env my_game:Walk --num-envs 12 --total-steps 24576 --workers {workers}"
        thrust.main([*flags.split(), "--eval-episodes", "12"])
    first, second = re.findall("evaluation: .*\nweights: .*", capsys.readouterr().out)
    assert first == second and "mean return 1.0 ± 0.0 over 12 episodes" in first


# == 7. EnvPool ================================================================================

SHORT = functools.partial(thrust.CartPole, max_episode_steps=20)  # so that some are truncated
start_pool = functools.partial(thrust.EnvPool, start_method=METHODS[0])  # Python's choice


class Faulty(NamedTuple):
    """A make_env whose worker 1 misbehaves when `moment` comes; so may the others."""

    fault: str
    moment: str = "step"
    others: str = ""

    def __call__(self, num_envs):
        env, name = thrust.CartPole(num_envs), mp.current_process().name
        fault = self.fault if name.startswith("worker 1") else self.others
        if fault and name.startswith("worker"):
            method = getattr(env, self.moment, None) or self.misbehave("make", fault)
            setattr(env, self.moment, lambda *a, **k: self.misbehave(method(*a, **k), fault))
        return env

    def misbehave(self, result, fault):
        if fault == "raise":
            raise KeyError(7)
        if fault == "exit":
            os._exit(3)
        while fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == "hang":
            pass
        return [result[0][:, :1], *result[1:]]  # "narrow"


class Odd:
    """CartPoles that return float64 and lists, with options, a `state` that is no method, and a
    memory for their actions. First observations are draws from what all code shares."""

    state = "odd"

    def __init__(self, num_envs):
        self.poles = thrust.CartPole(num_envs)

    def __getattr__(self, name):
        return getattr(self.poles, name)

    def reset(self, *, seed=None, options=None):
        self.poles.reset(seed=seed)
        self.bonus, self.last = (options or {}).get("bonus", 0), np.zeros(self.num_envs)
        draws = [[random.random(), np.random.rand(), torch.rand(()), 1] for _ in self.last]
        return np.array(draws, float), {}

    def step(self, actions):
        obs, reward, *rest = self.poles.step(actions)
        reward += self.bonus + 10 * self.last
        self.last = actions
        return obs + 1e-12, reward.tolist(), *rest


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_pool_gives_the_same_bits_as_one_process_and_its_state_goes_on_in_either(
    workers, method
):
    reference = SHORT(7)
    with thrust.EnvPool(SHORT, 7, workers, start_method=method) as pool:
        assert len(mp.active_children()) == workers
        assert same(pool.reset(seed=3)[0], reference.reset(seed=3)[0])
        for source, target in ((pool, reference), (reference, pool)):
            assert all(map(same, record(pool, 99), record(reference, 99)))
            source.step(np.arange(7) % 2)
            target.set_state(source.state())
        assert all(map(same, record(pool, 99), record(reference, 99)))
        assert same(pool.reset()[0], reference.reset()[0])  # without a seed, they go on
        processes = mp.active_children()
    assert [process.exitcode for process in processes] == [0] * workers
    pool.close()
    for call in (pool.reset, pool.state, lambda: pool.step(ZEROS[:7])):
        with pytest.raises(RuntimeError, match=r"^this pool is closed$"):
            call()


def test_a_run_in_one_process_seeds_the_generators_that_all_code_shares(in_tmp):
    config = small(env=f"{__name__}:Odd", total_steps=256)
    assert torch.equal(*(weights_of(thrust.train(config).policy) for _ in range(2)))


def test_results_are_converted_in_one_memory_options_passed_on_shared_generators_seeded():
    plain, drawn = Odd(4), []
    with start_pool(Odd, 4, 2) as pool:
        assert pool.state is None and pool.set_state is None
        for options in (None, {"bonus": 5}, None):
            first = pool.reset(seed=2**32 + 5, options=options)[0]
            drawn.append(first[:, :3].copy())
            assert (drawn[-1][:2] != drawn[-1][2:]).all() and same(drawn[-1], drawn[0])
            plain.reset(seed=2**32 + 5, options=options)
            for t in range(50):
                obs, reward, *flags, info = pool.step(np.arange(t, t + 4) % 2)
                expected = plain.step(np.arange(t, t + 4) % 2)
                assert same(obs, np.float32(expected[0])) and np.shares_memory(obs, first)
                assert reward.tolist() == expected[1] and all(map(same, flags, expected[2:4]))
                assert same(info.get("_final_obs", ~flags[0] & flags[0]), flags[0] | flags[1])


def test_what_a_pool_cannot_take_is_refused_in_a_sentence_and_changes_nothing():
    reference = thrust.CartPole(8)
    with start_pool(thrust.CartPole, 8, 2) as pool:
        assert same(pool.reset(seed=np.int8(100))[0], reference.reset(seed=100)[0])
        for wrong in (ZEROS[:2], ZEROS[:, None], ZEROS + 0.5):
            with pytest.raises(ValueError, match=r"^action must .*int64"):
                pool.step(wrong)
        for seed in (-1, 1.0, True, [1] * 8, "1", np.bool_(True)):
            with pytest.raises(ValueError, match="seed must be None or an int from 0 on"):
                pool.reset(seed=seed)
        with pytest.raises(ValueError, match="a state must have 8 rows"):
            pool.set_state(thrust.CartPole(16).state())
        assert same(pool.step(ONES)[0], reference.step(ONES)[0])


FAULTS = {  # what is said, and the exit code (whoever raised may still run, or have ended)
    "raise": (rf"raised while {{}}: KeyError: 7 \({HERE.name}, line \d+\)", (None, 0)),
    "exit": ("died with exit code 3 while {}", (3,)),
    "kill": ("died with exit code -9 while {}", (-9,)),
    "hang": (r"was still {} after 0\.3 s", (None,)),
    "narrow": (r"raised while {}: ValueError: obs must .* \(4, 4\); got .*", (None, 0)),
}
MOMENTS = {"make": "starting", "reset": "resetting", "step": "stepping"}
MOMENTS |= {"state": "giving its state", "set_state": "taking a state"}
CASES = [(Faulty(fault, at), METHODS[0]) for fault in ("raise", "exit") for at in MOMENTS]
CASES += [(Faulty(fault), METHODS[-1]) for fault in FAULTS if hasattr(signal, "SIGKILL")]
CASES += [(Faulty("raise", others="hang"), METHODS[0])]  # which does not hide what was raised


@pytest.mark.parametrize(("faulty", "method"), CASES)
def test_a_worker_that_fails_is_one_error(faulty, method):
    timeout = 0.3 if "hang" in faulty else 60
    with pytest.raises(thrust.WorkerError) as caught:
        pool = thrust.EnvPool(faulty, 8, 2, start_method=method, timeout=timeout)
        pool.set_state(pool.state())
        pool.reset(seed=0)
        pool.step(ZEROS)
    error, (sentence, exitcodes) = caught.value, FAULTS[faulty.fault]
    line, *trace = str(error).splitlines()
    sentence = r"worker 1 \(environments 4 to 7\) " + sentence.format(MOMENTS[faulty.moment])
    assert re.fullmatch(sentence, line) and error.exitcode in exitcodes and error.worker == 1
    assert ("raised" in line) == bool(trace) and not mp.active_children()
    if trace:  # the worker's, and whole
        assert trace[0] == "Traceback (most recent call last):" and "in run_worker" in trace[1]
        assert trace[-1].partition(": ")[0] in ("KeyError", "ValueError")


# == 8. Runs ===================================================================================


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run, to compare others with: (config, result)."""
    knobs = {"norm_obs": True, "norm_reward": True, "hidden": (32, 16), "anneal": False}
    runs = str(tmp_path_factory.mktemp("undisturbed"))
    config = small(**knobs, total_steps=8 * 16 * 40, runs=runs)
    return config, thrust.train(config)


def assert_same_run(result, other):
    """Equal weights, log, returns, state and snapshots, bit for bit."""
    assert torch.equal(weights_of(result.policy), weights_of(other.policy))
    assert same(result.returns, other.returns) and log_of(result.run) == log_of(other.run)
    (_, saved), (_, others) = map(thrust.load_checkpoint, (result.run, other.run))
    assert all(equal(saved[name], others[name]) for name in ("learner", "snapshots", "steps"))


class Wide(thrust.CartPole):
    def _observe(self):  # float64 in a space of float32
        return self._state.T.copy()


sync_poles = functools.partial(gymnasiums, "CartPole-v1", max_episode_steps=20)
ENVS = ["CartPole", "test_thrust:Wide", "test_thrust:sync_poles", "Acrobot-v1"]


@pytest.mark.parametrize("env", ENVS)
def test_the_same_config_gives_the_same_weights_and_log_for_any_workers(env, in_tmp):
    if env in ENVS[2:]:
        oracle("gymnasium")
    knobs = {"env": env, "norm_obs": True, "norm_reward": True}
    first, *others = (thrust.train(small(workers=w, **knobs)) for w in (0, 2, 3))
    for other in others:  # those of three workers have uneven slices
        assert_same_run(first, other)
    assert len([*pathlib.Path("runs").glob("*-0-[23]")]) == 2  # no folder is used twice


def test_stopped_again_and_again_a_run_is_bit_for_bit_the_run_that_was_not(undisturbed, in_tmp):
    config, result = undisturbed
    config = dataclasses.replace(config, runs="here/there", checkpoint_seconds=0.03)
    run, add = pathlib.Path("here/there/CartPole-0"), thrust.Run.add
    for workers, last in ((2, 7), (0, 15), (1, 30)):

        def add_or_stop(self, row, last=last):
            add(self, row)
            if row["update"] >= last:
                raise KeyboardInterrupt

        with (
            mock.patch.object(thrust.Run, "add", add_or_stop),
            pytest.raises(KeyboardInterrupt),
        ):
            now = dataclasses.replace(config, workers=workers)
            thrust.train(now, resume=run if run.exists() else None)
        assert len(log_of(run)) == last and not mp.active_children()
    assert_same_run(thrust.train(dataclasses.replace(config, workers=3), resume=run), result)
    with open(run / "log.csv", newline="") as file:  # the clock goes on too
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert seconds == sorted(seconds) and len(set(seconds)) == 40


def test_a_finished_run_can_be_extended_and_what_may_not_change_is_told(in_tmp, capsys):
    run, _ = pathlib.Path("runs/CartPole-0"), thrust.train(small())
    flags = f"--resume {run} --total-steps 1700 --num-steps 64 --epochs 2"
    thrust.main(flags.split())
    rows = log_of(run)
    assert [int(row["update"]) for row in rows] == list(range(1, 8))
    assert [int(row["steps"]) for row in rows] == [*range(128, 769, 128), 1280]  # not beyond
    assert [int(row["gradient_steps"]) for row in rows] == [*range(8, 49, 8), 64]
    assert json.loads((run / "config.json").read_text())["epochs"] == 2
    changes = {"seed": 1, "hidden": (8,), "num_envs": 4, "env": "my:Env", "gamma": 0.5}
    for name, value in {**changes, "norm_obs": False, "norm_reward": False}.items():
        config = dataclasses.replace(small(), total_steps=1700, **{name: value})
        with pytest.raises(ValueError, match=f"{run} has {name} = .*cannot become"):
            thrust.train(config, resume=run)
    for flags in ("--seed 1", "--total-steps 1000"):
        with pytest.raises(SystemExit, match="2"):
            thrust.main(["--resume", str(run), *flags.split()])
        assert f"{run} has " in capsys.readouterr().err


def test_an_environment_without_state_is_resumed_in_new_episodes_and_no_sum_is_lost(in_tmp):
    run, config, saved = "runs/test_thrust-Game-0", small(env="test_thrust:Game"), []
    for total, resume in ((384, None), (768, run)):
        thrust.train(dataclasses.replace(config, total_steps=total), resume=resume)
        saved.append(thrust.load_checkpoint(run)[1]["learner"])
    first, second = saved
    assert not torch.equal(first["obs"], second["obs"])
    assert second["counts"][::2] == [768, 6] and second["counts"][1] > first["counts"][1] > 50
    assert second["scale"]["moments.count"] == 768 == second["policy"]["encoder.count"]
    assert [int(row["steps"]) for row in log_of(run)] == [128 * (i + 1) for i in range(6)]


def test_an_evaluation_that_never_ends_is_cut_off_and_says_so(in_tmp, capsys):
    policy = thrust.ActorCritic(BOX, TWO)
    returns, finished = thrust.evaluate(policy, Endless(3), 0, limit=50)
    assert returns.shape == (1, 3) and not finished.any()
    thrust.train(small(env="test_thrust:Endless", eval_episodes=6))
    line = capsys.readouterr().out.splitlines()[-2]
    assert " over 6 episodes, 6 of them cut off after 10,000" in line
    assert {row["mean_return"] for row in log_of("runs/test_thrust-Endless-0")} == {"nan"}


def test_an_evaluation_counts_whole_episodes_in_a_fixed_order(undisturbed):
    policy = undisturbed[1].policy
    returns, finished = thrust.evaluate(policy, thrust.CartPole(4), 7, episodes=3)
    assert finished.all() and returns.shape == (3, 4) and len({*returns.flat}) > 6
    for i, length in enumerate(returns.ravel()):  # each alone, in a game of its own
        envs, steps, ended = thrust.CartPole(1), 0, False
        obs, _ = envs.reset(seed=7 + i)
        while not ended:
            action = policy.to_env(policy.act(obs, greedy=True))
            obs, _, terminated, truncated, _ = envs.step(action)
            ended, steps = terminated[0] or truncated[0], steps + 1
        assert length == steps
    envs.metadata = {"autoreset_mode": "NextStep"}
    with pytest.raises(ValueError, match="must be SAME_STEP"):
        thrust.evaluate(policy, envs, 7)


def test_the_knobs_of_a_run_reach_their_places(in_tmp):
    pools = mock.patch.object(thrust, "EnvPool", wraps=thrust.EnvPool)
    pages = mock.patch.object(thrust, "make_page", return_value="")  # made with each checkpoint
    knobs = {"workers": 3, "timeout": 7.5, "threads": 2, "checkpoint_seconds": 1e9}
    with pools as pool, pages as page:
        result = thrust.train(small(**knobs, eval_episodes=20, runs="mine", seed=5))
        assert page.call_count == 2 and not mp.active_children()
        assert [call.args[1:] for call in pool.call_args_list] == [(8, 3)] * 2
        assert [call.kwargs for call in pool.call_args_list] == [{"timeout": 7.5}] * 2
        thrust.train(small(checkpoint_seconds=0.0))
        assert page.call_count == 2 + 7 and torch.get_num_threads() == 1
    assert result.returns.shape == (20,) and result.run == pathlib.Path("mine/CartPole-5")
    loaded = thrust.load(result.run)
    assert torch.equal(weights_of(loaded), weights_of(result.policy)) and not loaded.training
    with pytest.raises(NotImplementedError, match="meta"):  # a device without numbers
        learner_of(device="meta")


def test_a_run_that_fails_closes_its_workers_and_keeps_the_last_checkpoint(in_tmp):
    with pytest.raises(RuntimeError, match="usual causes"), np.errstate(all="ignore"):
        thrust.train(small(learning_rate=1e30, workers=2))
    assert not mp.active_children()
    assert thrust.load_checkpoint("runs/CartPole-0")[1]["steps"] < 768


def test_the_default_run_solves_cartpole_and_says_what_it_does(in_tmp, capsys):
    result = thrust.train(thrust.Config(**thrust.CARTPOLE))
    lines = capsys.readouterr().out.splitlines()
    assert result.returns.tolist() == [500.0] * 100
    assert all(math.isfinite(float(v)) for row in log_of(result.run) for v in row.values())
    names = sorted(path.name for path in result.run.iterdir())
    assert names == ["checkpoint.pt", "config.json", "log.csv", "page.html"]
    assert lines[0].startswith("training CartPole for 198,656 steps; everything is kept in")
    assert len([x for x in lines if re.match("passed (195|475): mean return", x)]) == 2
    assert lines[-3] == f"page: {result.run / 'page.html'}"
    assert lines[-2] == "evaluation: mean return 500.0 ± 0.0 over 100 episodes"
    assert re.fullmatch("weights: [0-9a-f]{64}", lines[-1])


# == 9. Command line ===========================================================================

WRONG_FLAGS = {
    "--num-envs 0": "num_envs must be int from 1 to 1000000; got 0",
    "--num-env 4": "unrecognized arguments: --num-env 4",
    "--resume a --evaluate b": "not allowed with argument",
    "--total-steps 9": "num_envs * num_steps = 2048, must be from 2 to total_steps = 9",
    "--workers 65": "workers must be at most num_envs = 64",
    "--resume nowhere": "nowhere/checkpoint.pt cannot be loaded as a checkpoint: FileNotFound",
    "--resume=": "checkpoint.pt cannot be loaded as a checkpoint: FileNotFound",
}


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_a_wrong_flag_is_one_line_and_code_2(flags, in_tmp, capsys):
    with pytest.raises(SystemExit) as done:
        thrust.main(flags.split())
    error = capsys.readouterr().err
    assert done.value.code == 2 and WRONG_FLAGS[flags] in error
    assert error.startswith("thrust.py: error: ") and error.count("\n") == 1
    assert not list(in_tmp.iterdir())
