# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24,<2.5", "torch>=1.13,<=2.13.0", "pytest>=7.2,<10"]
# ///
"""Tests of thrust.py, under the same part numbers. Each name is a claim. If you read one, read
part 5's first: whole updates beside a PPO in plain lines, on torch's Adam and distributions.
Tests that need a package outside requirements.txt are skipped where it is missing, unless
THRUST_ALL_TESTS is set, as it is in CI."""

import contextlib
import copy
import csv
import dataclasses
import doctest
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing as mp
import os
import pathlib
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import namedtuple
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations, prune

import thrust

torch.set_num_threads(1)  # as in a run; on a busy machine two can take thirty times as long
BOX = thrust.Box(-np.ones(4, np.float32), np.ones(4, np.float32), (4,))
TWO = thrust.Discrete(2)
MultiDiscrete = namedtuple("MultiDiscrete", "nvec shape dtype", defaults=[np.int64])


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


def same(a, b):
    """Whether two arrays are equal in dtype, shape and every bit."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def weights_of(policy):
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])


def gymnasiums(name, num_envs, **options):  # its own vector environment
    mode = {"autoreset_mode": oracle("gymnasium").vector.AutoresetMode.SAME_STEP}
    return oracle("gymnasium").make_vec(name, num_envs, "sync", mode, **options)


class Game:
    """An environment of one's own. A step pays ±1, as the action has the sign of what is seen
    first or not, the last at times a jackpot; games end at any time, in either way or both."""

    metadata, state = {"autoreset_mode": "SameStep"}, np.zeros(3)  # (no method)

    def __init__(self, num_envs, actions=TWO, scale=(1.0,) * 4, offset=0.0, jackpot=0.0):
        ones = np.ones(len(scale))
        self.single_observation_space = thrust.Box(-ones, ones, ones.shape, np.float64)
        self.num_envs, self.single_action_space = num_envs, actions
        self.scale, self.offset, self.jackpot = scale, offset, jackpot

    def draw(self):
        return self.offset + self.scale * self.rng.normal(size=(self.num_envs, len(self.scale)))

    def reset(self, *, seed=None, options=None):
        self.seed, self.rng = seed, default_rng(seed)
        self.obs = self.draw()
        return self.obs.copy(), {}

    def step(self, actions):
        chosen, seen = actions.reshape(self.num_envs, -1)[:, 0], (self.obs - self.offset)[:, 0]
        rates, numbers = np.array([[0.15], [0.15], [0.01]]), self.rng.random((3, self.num_envs))
        terminated, truncated, rare = numbers < rates
        ended, reached, self.obs = terminated | truncated, self.draw(), self.draw()
        reward = np.where((seen > 0) == (chosen > 0), 1.0, -1.0) + self.jackpot * (ended & rare)
        self.obs[~ended] = reached[~ended]
        return self.obs.copy(), reward, terminated, truncated, {"final_obs": reached}


# == 1. Config =================================================================================

WRONG = {
    "num_envs": ("int from 1 to 1000000", 0, 64.0, True, "64", [64], None, math.inf),
    "gamma": ("float from 0.0 to 1", math.nan, 1.5, -0.1, "1", False),
    "anneal": ("bool", 1, "yes"),
    "hidden": ("a tuple of int from 1 to 100000", 64, (64, 0), (6.4,), (True,), ((64,),)),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_values_are_refused_with_knob_rule_and_value(name):
    for value in WRONG[name][1:]:
        with pytest.raises(ValueError) as error:
            thrust.Config(**{name: value})
        assert str(error.value) == f"{name} must be {WRONG[name][0]}; got {value!r}"
    for sizes in ({"total_steps": 127}, {"num_envs": 1, "num_steps": 1}):
        with pytest.raises(ValueError, match="one rollout, num_envs"):
            small(**sizes)
    c = small(hidden=np.array([32]), num_envs=np.int64(8), anneal=np.bool_(False), gamma=1)
    assert repr((c.num_envs, c.hidden, c.anneal, c.gamma)) == "(8, (32,), False, 1.0)"
    assert (c.batch_size, c.num_updates, small(total_steps=999).num_updates) == (128, 6, 7)


# == 2. CartPole ===============================================================================


@pytest.mark.parametrize(("limit", "steps"), [(500, 6000), (12, 400)])
def test_it_is_gymnasiums_cartpole_bit_for_bit_also_continued_from_its_state(limit, steps):
    theirs, rng = gymnasiums("CartPole-v1", 8, max_episode_steps=limit), default_rng(0)
    ours, spare, ends = thrust.CartPole(8, limit), thrust.CartPole(8, limit), np.zeros(3)
    got, expected = [obs := ours.reset(seed=5)[0]], [theirs.reset(seed=5)[0]]
    for t in range(steps):
        actions = rng.integers(0, 2, 8)
        if t // 1000 % 2:  # with some skill, so that episodes are long
            actions = 1 * (obs @ [0, 0.02, 1, 0.5] > 0)
        obs, *rest, info = ours.step(actions)
        *others, terminated, truncated, their_info = theirs.step(actions)
        got += [obs, *rest]
        expected += [*others, terminated, truncated]
        if (ended := terminated | truncated).any():
            got += [info["_final_obs"], info["final_obs"][ended]]
            expected += [ended, np.stack(their_info["final_obs"][ended])]
        ends += [x.sum() for x in (terminated, truncated, terminated & truncated)]
        if t % 97 == 0:
            spare.set_state(ours.state())
            ours, spare = spare, ours
    assert all(map(same, got, expected))  # only now: nothing may have been written over
    assert same(ours.reset()[0], theirs.reset()[0])  # the streams go on
    # more than a block of start states each, and games that ended in both ways at once
    assert (ends > ([8 * 128, 10, -1] if limit == 500 else [30, 10, 5])).all()


def test_what_is_no_action_is_refused_and_changes_nothing_and_results_are_the_callers():
    env = thrust.CartPole(3)
    env.step(np.zeros(3, int))[1][:] = 7
    assert env.step(np.zeros(3, int))[1].tolist() == [1, 1, 1]
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


@pytest.mark.parametrize("space", [TWO, MultiDiscrete([[3, 2], [2, 4]], (2, 2)), BOX])
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
    assert abs(policy.encode(obs).var(0, unbiased=False) - 1).max() < 1e-5  # float32
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
        config = self.config
        obs, next_obs = self.normalised(r.obs), self.normalised(r.next_obs)
        action = torch.tensor(r.action).reshape(len(obs), -1)
        with torch.no_grad():
            logprob, entropy, value = self.judge(obs, action)
            next_value = self.policy.critic(next_obs)
        reward = self.scaled(r.reward, r.terminated | r.truncated)
        data = reward, *(x.view(reward.shape).numpy() for x in (value, next_value))
        rest = r.terminated, r.truncated, config.gamma, config.gae_lambda
        advantage = torch.tensor(gae_by_definition(*data, *rest)).flatten()
        rate = config.learning_rate * (1 - self.steps / config.total_steps)
        self.optimizer.param_groups[0]["lr"] = rate
        log = self.improve(generator, obs, action, logprob, advantage, value + advantage)
        self.seen = np.concatenate([self.seen, *r.obs])
        self.steps += len(obs)
        self.gradient_steps += len(log)
        shown = log if config.target_kl else log[-len(log) // config.epochs :]  # last epoch's
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
KINDS += [(BOX, None, {}), (BOX, None, {"target_kl": 0.004, "max_grad_norm": 0.0})]


@pytest.mark.parametrize(("space", "choices", "limits"), KINDS)
def test_whole_updates_are_those_of_a_plain_ppo(space, choices, limits, monkeypatch):
    """Three updates at knobs none of which has its default, in float64."""
    config, orders, events = thrust.Config(**{**UNUSUAL, **limits}), [], []
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
    assert (plain.gradient_steps < 27) == bool(limits)  # target_kl ended some update early


def learner_of(envs=None, policy=None, **knobs):
    config = small(**knobs)
    return thrust.PPO(envs or thrust.CartPole(config.num_envs), config, policy)


def test_a_rollout_holds_the_states_reached_and_the_log_the_last_100_episodes_and_the_rate():
    envs, ends = thrust.CartPole(8, max_episode_steps=7), 0
    envs._reward *= 3
    learner = learner_of(envs, gamma=0.9)
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
    assert row["mean_return"] == 21 and len(learner.recent) == 100 < ends
    learner = learner_of(num_envs=2, num_steps=2, total_steps=8, anneal=False)
    row = [learner.update(), learner.update()][1]
    assert math.isnan(row["mean_return"]) and row["learning_rate"] == 1e-3
    row = learner_of(norm_reward=False, gamma=0.0).update()  # all returns are equal
    assert math.isnan(row["explained_variance"])  # not -inf


PLACES = [(name, x) for name in ("obs", "last obs") for x in (math.nan, math.inf)]
PLACES += [("reward", x) for x in (math.nan, -math.inf, 1e20, 1e30)]


# (Infinity in obs with norm_obs would be 10 to the loss, and the normaliser's mean be lost.)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("name", "value"), PLACES)
def test_nan_and_infinity_raise_before_anything_has_learned_from_them(name, value, norm):
    learner = learner_of(Game(8), norm_obs=norm, norm_reward=norm, minibatch_size=128)
    learner.update()
    before = copy.deepcopy(learner.policy.state_dict())
    step, times = learner.envs.step, itertools.count(1)

    def broken(actions):
        results = step(actions)
        if next(times) == (16 if name == "last obs" else 5):
            rows = results[2] | (name != "last obs")  # or in the first of a new game alone
            results[name == "reward"][rows] = value
        return results

    learner.envs.step = broken
    if norm and value in (1e20, 1e30):  # are scaled
        assert math.isfinite(learner.update()["grad_norm"])
        return
    with np.errstate(all="ignore"), pytest.raises(RuntimeError, match=r"length is |NaN"):
        learner.update()
    assert all(torch.equal(x, before[name]) for name, x in learner.policy.state_dict().items())


def trained(seed=0, policy=None, disturb=lambda learner: None):
    learner = learner_of(seed=seed, policy=policy)
    for _ in range(3):
        disturb(learner)
        before = [torch.get_rng_state().tolist(), str(np.random.get_state())]
        learner.update()
        assert before == [torch.get_rng_state().tolist(), str(np.random.get_state())]
    return weights_of(learner.policy)


def test_weights_follow_from_the_seed_whatever_others_draw_or_train_or_leave_in_gradients():
    other, policy = learner_of(seed=1), make_policy(norm_obs=True)

    def disturb(learner):
        other.update()
        learner.policy.zero_grad()
        learner.policy.value(torch.rand(9, 4)).sum().backward()

    assert torch.equal(trained(), trained(disturb=disturb))
    assert not torch.equal(trained(), trained(seed=1))
    copies = copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))
    weights = [trained(policy=one) for one in (policy, *copies)]
    assert torch.equal(*weights[:2]) and torch.equal(*weights[1:])
    seeds = [thrust.derive_seed(i, j) for i in range(100) for j in range(4)]
    learner = learner_of(Game(8))
    for learner.updates in range(100):
        learner.begin_episodes()
        seeds += [learner.envs.seed, learner.generator.bit_generator.state["state"]["state"]]
        assert learner.generator.random() != default_rng(learner.envs.seed).random()
    # 31 bits, as some environments take no more; no purpose or update shares one
    assert max(seeds[:400] + seeds[400::2]) < 2**31 - 10**6 and len(set(seeds)) == 600


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
    class Fixed:
        def evaluate(self, obs, action):
            return logprob, zeros, zeros

    #         inside    gained    lost, each with Â = 1 and with Â = -1
    ratio, sign = [1.15, 0.9, 1.5, 1.3, 0.7, 0.6], [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    logprob, zeros = torch.tensor(ratio).log().requires_grad_(), torch.zeros(6)
    batch = thrust.Batch(zeros[:, None], zeros, zeros, torch.tensor(sign), zeros)
    loss, stats = thrust.ppo_loss(Fixed(), batch, thrust.Config(clip=0.2))
    loss.backward()
    assert (logprob.grad != 0).tolist() == [True, True, False, True, True, False]
    # mean( min( ratio·Â, clip(ratio)·Â ) ), by hand; Â of ±1 in equal number scales by 1/std
    by_hand = np.mean([1.15, -0.9, 1.2, -1.3, 0.7, -0.8]) / np.std(sign, ddof=1)
    assert -stats["policy_loss"].item() == pytest.approx(by_hand, abs=1e-6)  # float32
    with pytest.raises(AssertionError, match="would make"):  # (M, M) of it
        thrust.ppo_loss(Fixed(), batch._replace(returns=zeros[:, None]), small())


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_adam_is_torchs_adam_with_its_gradient_clipping(limit):
    layers = nn.Linear(4, 8), nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    ours = [p for layer in layers for p in layer.double().parameters()]
    theirs = copy.deepcopy(ours)
    mine, other = thrust.Adam(ours), torch.optim.Adam(theirs, eps=1e-5)
    for step in range(1, 21):
        for p, q in zip(ours[1:], theirs[1:]):  # the first has no gradient
            p.grad = torch.randn_like(p) * 0.01 * step
            q.grad = p.grad.clone()
        before, rate = sum(p.grad.sum() for p in ours[1:]), 1e-2 / step
        expected = clip_grad_norm_(theirs, limit or math.inf).item()
        other.param_groups[0]["lr"] = rate
        other.step()
        assert mine.step(rate, limit) == pytest.approx(expected, rel=1e-12)  # sums in float64
        assert before == sum(p.grad.sum() for p in ours[1:])  # gradients are left as they are
    # Theirs divides by norm + 1e-6; without that, only float64's rounding is left
    torch.testing.assert_close(ours, theirs, atol=1e-6 if limit else 1e-12, rtol=0)


@pytest.mark.parametrize("size", [512, 128, 100, 9999])
def test_minibatches_cover_the_rollout_almost_equally_and_begin_at_ratio_1(size, monkeypatch):
    seen, original = [], thrust.ppo_loss

    def spy(policy, batch, *rest):
        logprob = policy.evaluate(batch.obs, batch.action)[0].detach()
        seen.append((batch.advantage, (logprob - batch.logprob).exp()))
        return original(policy, batch, *rest)

    monkeypatch.setattr(thrust, "ppo_loss", spy)
    learner = learner_of(num_envs=27, num_steps=19, total_steps=10**4, minibatch_size=size)
    for _ in range(3):
        seen.clear()
        learner.update()
        advantages, ratios = zip(*seen)
        # Logits of up to 10 have 2**-21 of rounding; a log-probability sums a few of them.
        assert abs(ratios[0] - 1).max() < 1e-5 and abs(ratios[-1] - 1).max() > 1e-3
        lengths = [len(advantage) for advantage in advantages]
        assert len(seen) == 4 * math.ceil(513 / size) and max(lengths) - min(lengths) <= 1
        epochs = torch.cat(advantages).view(4, 513)  # all of them, each time in another order
        assert (epochs.sort(1)[0] == epochs[0].sort()[0]).all() and len(epochs.unique()) > 500
        assert len(epochs.unique(dim=0)) == 4


def test_a_bandit_is_solved_though_seen_with_an_offset_far_larger_than_its_deviation():
    knobs = {"num_envs": 64, "num_steps": 8, "total_steps": 512 * 30, "learning_rate": 1e-2}
    learner = learner_of(
        Game(64, offset=100_000.004, scale=[1e-3]), **knobs, minibatch_size=128
    )
    row = [learner.update() for _ in range(30)][-1]
    assert row["mean_return"] > 0.9 * row["mean_length"]


# == 6. Other games ============================================================================

FITS = [(np.float32, [1.1, 2.0]), (np.float32, [1, 2]), (np.float32, torch.ones(2))]
FITS += [(np.int32, np.array([1, 2])), (np.uint8, [0.0, 255.0]), (bool, [0, 1])]
MISFITS = [(np.int32, [2**31, 0]), (np.uint8, [-1, 256]), (np.int64, [0.5, 1]), (bool, [0, 2])]
MISFITS += [(np.int64, [math.nan, 1]), (np.float32, ["1", "2"]), (np.float32, [1j, 0])]
MISFITS += [(np.float32, [[1.0, 2.0]]), (np.float32, [1.0]), (np.float32, 1.0)]


def test_numbers_are_put_where_they_fit_and_refused_where_they_would_change_or_are_missing():
    for dtype, value in FITS:
        target = np.zeros(2, dtype)
        thrust.put(target, value, "obs")
        assert same(target, np.asarray(value).astype(dtype))
    for dtype, value in MISFITS:
        with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"^obs must fit into "):
            thrust.put(np.zeros(2, dtype), value, "obs")
    results, nines = (np.ones((2, 3)), [1, 2], [0, 1], [0, 0]), [[0] * 3, [9] * 3]
    for last in (np.array([None, np.full(3, 9.0)], object), torch.tensor(nines), nines):
        (obs, final_obs), flags = np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), bool)
        targets = obs, final_obs, np.zeros(2), *flags
        assert thrust.put_step((*results, {"final_obs": last}), *targets).tolist() == [1]
        assert obs.all() and final_obs.tolist() == nines
    for info in ({}, {"final_obs": None}, {"final_obs": np.array([None, None])}):
        with pytest.raises(ValueError, match="final_obs"):
            thrust.put_step((*results, info), *targets)
    with pytest.raises(
        ValueError, match=r"^reward .*LinearReward.* \(2,\); got float64 \(2, 3\)"
    ):
        thrust.put_step((results[0], results[0], *results[2:], {}), *targets)


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
    for unknown in (("text", TWO), (BOX, "text")):
        with pytest.raises(ValueError, match=r"^text must be one of .*Box"):
            thrust.ActorCritic(*unknown)


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
    """As Gymnasium has them. It shows step and game, in float64 and always the same array."""

    observation_space, action_space = thrust.Box(np.zeros(2), np.ones(2), (2,)), TWO

    def __init__(self):
        self.obs, self.calls = np.zeros(2), []

    def reset(self, *, seed=None, options=None):
        self.calls.append((seed, options))
        self.obs[:] = 0, len(self.calls)
        return self.obs, {}

    def step(self, action):
        self.obs[0] += 1
        return self.obs, int(action), self.obs[0] == 3, False, {}

    def close(self):
        self.calls.append(("closed", None))


def test_every_game_of_environments_one_by_one_is_seeded_and_its_end_is_copied():
    envs, seen = thrust.GymEnvs(Single, 2), []
    for _ in range(2):
        seen.append(envs.reset(seed=5, options="given")[0])
        for _ in range(4):
            obs, reward, terminated, _, info = envs.step(np.array([0, 1]))
            seen += [obs, info["final_obs"]]
            assert same(reward, np.array([0.0, 1.0])) and terminated[0] == (seen[-1][0, 0] == 3)
    envs.reset()
    envs.close()
    (first, *obs), final_obs = [seen[9], *seen[10::2]], seen[11::2]  # of the second time
    assert [x[1].tolist() for x in obs] == [[1, 3], [2, 3], [0, 4], [1, 4]]
    assert first[1].tolist() == [0, 3] and final_obs[2].tolist() == [[3, 3]] * 2
    seeds, options = zip(*envs.envs[1].calls)
    assert options == ("given", None, "given", None, None, None) and seeds[5] == "closed"
    assert seeds[0] == 6 and seeds[:2] == seeds[2:4] and first.dtype == np.float32
    assert len({*seeds, envs.envs[0].calls[1][0]}) == 5


def test_environments_are_part_2s_a_modules_or_gymnasiums_or_given(capsys):
    gym = oracle("gymnasium")
    learners = learner_of(), learner_of(gymnasiums("CartPole-v1", 8))
    rows = [[learner.update()["grad_norm"] for _ in range(3)] for learner in learners]
    assert rows[0] == rows[1]  # to the last bit
    with pytest.raises(
        ValueError, match=r"must be SAME_STEP, not .*: give .*SAME_STEP, or use"
    ):
        learner_of(gym.make_vec("CartPole-v1", 8, "sync"))
    envs = gymnasiums("CartPole-v1", 8)
    envs.metadata = {"autoreset_mode": "NextStep"}  # as another of its class may have left it
    thrust.require_same_step(envs)
    assert type(thrust.make_env("CartPole", 2)) is thrust.CartPole
    assert thrust.make_env(f"{__name__}:Game", 2).num_envs == 2
    obs = thrust.make_env("CartPole-v1", 3).reset(seed=7)[0]
    assert same(obs[1], gym.make("CartPole-v1").reset(seed=8)[0])
    wrap, text = gym.wrappers.TransformObservation, gym.spaces.Dict(a=gym.spaces.Text(4))
    both = gym.spaces.Dict(a=gym.spaces.Box(0, 9, (3,)), b=gym.spaces.Discrete(4))
    seen = {"a": np.ones(3, np.float32), "b": 2}
    gym.register("Both-v0", lambda: wrap(gym.make("CartPole-v1"), lambda obs: seen, both))
    gym.register("Text-v0", lambda: wrap(gym.make("CartPole-v1"), lambda obs: {"a": "x"}, text))
    envs = thrust.make_env(f"{__name__}:Both-v0", 3)  # of a module that has no such name
    assert envs.reset()[0].tolist() == [[1, 1, 1, 0, 0, 1, 0]] * 3
    assert capsys.readouterr().err.count("observations of ") == 1  # not 3 times
    # else text would be taken, as if its letters' numbers were quantities
    with pytest.raises(ValueError, match=r" must be one of Box, Discrete; wrap it .*Filter"):
        learner_of(thrust.make_env("Text-v0", 8))


def test_ales_own_vector_environment_is_trained_as_it_is_or_refused_in_another_mode():
    modes, _ = oracle("gymnasium").vector.AutoresetMode, oracle("ale_py")
    options = {
        "img_height": 9,
        "img_width": 9,
        "stack_num": 1,
        "max_num_frames_per_episode": 99,
    }
    make = functools.partial(oracle("gymnasium").make_vec, "ALE/Breakout-v5", 8, **options)
    learner = learner_of(make("vector_entry_point", autoreset_mode=modes.SAME_STEP))
    assert trains(learner) and [learner.update() for _ in range(3)][2]["episodes"] >= 8
    with pytest.raises(ValueError, match=r"of AtariVectorEnv must be SAME_STEP"):
        learner_of(make("vector_entry_point", autoreset_mode=modes.NEXT_STEP))


# == Processes and files =======================================================================

SOURCE, HERE = pathlib.Path(thrust.__file__), pathlib.Path(__file__)
METHODS = mp.get_all_start_methods()
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="sends signals and reads /proc")
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Ctrl-C is not ignored, as it is in background jobs, whose children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """A new folder, which is the current one, and from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


SMALL_FLAGS = "--num-envs 4 --num-steps 32 --minibatch-size 64 --total-steps 384"
SMALL_FLAGS = f"{SMALL_FLAGS} --eval-episodes 2".split()  # three updates


def start(*command, env=os.environ, **options):
    """Starts a Python program that can import this file and thrust.py."""
    env = {**env, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, env=env, text=True, **{**pipes, **options})


def wait_for_rows(process, log, rows):
    """Waits until the log of a training has so many rows."""
    until = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") <= rows:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)


def equal(a, b):
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return same(a.numpy(), b.numpy()) if isinstance(a, torch.Tensor) else a == b


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


def lift(number, folder):
    """Writes a part into a file of its own, with what its Needs line names, and imports it."""
    needed, found = {number}, parts()
    while more := {int(n) for i in needed for n in named_parts(found[i][0])} - needed:
        needed |= more
    lines = dict.fromkeys(
        line for i in sorted(needed) for line in found[i][0].split("; ") if "import" in line
    )
    text = "\n".join([*lines, *(found[i][1] for i in sorted(needed))])
    (folder / f"lifted_{number}.py").write_text(text, encoding="utf-8")
    return importlib.import_module(f"lifted_{number}")


def named_parts(needs):
    return re.findall(r"\d", needs.partition("; part")[2])


def lifted_pool(module):
    with module.EnvPool(thrust.CartPole, 4, 2) as pool:
        return pool.step(np.zeros(4, int))[0].shape


USES = {  # what a copier does with a part alone, and what comes of it
    1: (lambda m: m.Config(num_steps=16).batch_size, 256),
    2: (lambda m: m.CartPole(3).reset(seed=1)[0].shape, (3, 4)),
    3: (lambda m: m.ActorCritic(BOX, TWO).act(np.zeros((3, 4), np.float32)).shape, (3,)),
    4: (lambda m: m.gae(*np.ones((3, 1, 1)), *np.zeros((2, 1, 1), bool), 0.5, 0.9)[0], 0.5),
    5: (lambda m: m.PPO(m.CartPole(8), m.Config(**vars(small()))).update()["steps"], 128),
    6: (lambda m: m.make_env("CartPole", 2).num_envs, 2),
    7: (lifted_pool, (4, 4)),
}


@pytest.mark.parametrize("number", USES)
def test_each_part_can_be_lifted_with_what_it_says_it_needs(number, in_tmp):
    use, value = USES[number]
    assert use(lift(number, in_tmp)) == value


def test_parts_1_to_5_are_ppo_and_nothing_else():
    text = "".join(parts()[number][1] for number in (2, 3, 4, 5))
    for word in ("rank", "thread", "checkpoint", "worker", "multiprocessing", "open("):
        assert word not in text, word


def run_the_loop_of_part_5():
    """In a process of its own: the program that the text gives, and what it must not touch."""

    def state():
        generators = random.getstate(), str(np.random.get_state()), str(torch.get_rng_state())
        return generators, torch.get_num_threads(), threading.active_count(), os.listdir()

    torch.set_num_threads(2)
    before = state()
    config = thrust.Config(**{**thrust.CARTPOLE, "total_steps": 6144})
    learner = thrust.PPO(thrust.CartPole(config.num_envs), config)
    for _ in range(config.num_updates):
        print(learner.update()["mean_return"])
    assert state() == before
    assert not any(name.startswith("torch._dynamo") for name in sys.modules)


def test_the_loop_at_the_end_of_part_5_trains_and_leaves_no_trace(in_tmp):
    loop = SOURCE.read_text(encoding="utf-8").split("PPO is complete here")[1][:400]
    for line in ("config = Config(**CARTPOLE)", "PPO(CartPole(config.num_envs), config)"):
        assert line in loop
    process = start("-c", "import test_thrust; test_thrust.run_the_loop_of_part_5()")
    out, err = process.communicate()
    assert err == "" and len(returns := out.splitlines()) == 3
    assert all(10 < float(mean) < 100 for mean in returns)


def test_examples_in_docstrings_are_true():
    results = doctest.testmod(thrust, extraglobs={"np": np})
    assert results.attempted > 0 and results.failed == 0


def readme_programs():
    text = SOURCE.with_name("README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("number", range(len(readme_programs())))
def test_the_programs_in_readme_run(number, in_tmp):
    """Each Python block, in the folder of a run."""
    program = readme_programs()[number]
    for package in ("gymnasium", "minatar", "mpe2"):
        if re.search(rf"^(import|from) {package}\b", program, re.MULTILINE):
            oracle(package)
    thrust.train(small())
    (in_tmp / "program.py").write_text(program.replace("1_000_000", "10_000"))
    process = start("program.py")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_readmes_own_environment_is_trained_by_its_name(in_tmp, capsys):
    program = next(p for p in readme_programs() if "class Walk" in p)
    (in_tmp / "my_game.py").write_text(program)
    flags = "--env my_game:Walk --total-steps 40960 --eval-episodes 16"
    thrust.main(flags.split())
    assert "evaluation: mean return 1.0 ± 0.0 over 16 episodes" in capsys.readouterr().out


def test_readmes_game_of_several_agents_is_trained_alike_with_workers(in_tmp, capsys):
    oracle("mpe2")
    program = next(p for p in readme_programs() if "class Spread" in p)
    (in_tmp / "spread.py").write_text(program)
    flags = "--env spread:Spread --num-envs 12 --num-steps 40 --total-steps 1440"
    for workers in ("0", "2"):
        thrust.main([*flags.split(), "--eval-episodes", "12", "--workers", workers])
    first, second = re.findall("weights: .*", capsys.readouterr().out)
    assert first == second


# == 7. EnvPool ================================================================================

ZEROS, ONES = np.zeros(8, int), np.ones(8, int)
SHORT = functools.partial(thrust.CartPole, max_episode_steps=20)  # so that some are truncated
start_pool = functools.partial(thrust.EnvPool, start_method=METHODS[0])  # Python's choice


def check_same(envs, reference, steps):
    """Plays both alike; every bit must agree. Returns how many were terminated, truncated."""
    ends, rng, got = np.zeros(2, int), np.random.default_rng(0), []
    for t in range(steps):
        actions = rng.integers(0, 2, reference.num_envs)
        if t // 1000 % 2:  # with some skill, so that episodes are long
            actions = 1 * (got[0] @ [0, 0.02, 1, 0.5] > 0)
        *got, info = envs.step(actions)
        *expected, expected_info = reference.step(actions)
        ended = expected[2] | expected[3]
        assert ("final_obs" in info) == ended.any()
        if ended.any():
            got.append(info["final_obs"][ended])
            expected.append(np.stack(expected_info["final_obs"][ended]))
        assert all(map(same, got, expected)), f"they differ at step {t}"
        ends += expected[2].sum(), expected[3].sum()
    return ends


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
        if fault == "quit":
            sys.exit("no")
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


class Busy(thrust.CartPole):
    """A step starts a process and raises; `close` takes a while. `reset` knows no options."""

    def __init__(self, file, num_envs):
        super().__init__(num_envs)
        self.file, self.child = file, mp.Process(target=time.sleep, args=(60,))

    def reset(self, *, seed=None):
        return super().reset(seed=seed)

    def step(self, actions):
        self.child.start()
        raise KeyError(7)

    def close(self):
        if self.child.pid:
            time.sleep(1.2)
            self.child.kill()
        with self.file.open("a") as file:
            file.write(f"{self.num_envs} ")


def check_closed(pool):
    state, step = thrust.CartPole(8).state(), functools.partial(pool.step, ZEROS)
    for call in [pool.reset, step, pool.state, functools.partial(pool.set_state, state)]:
        with pytest.raises(RuntimeError, match=r"^this pool is closed$"):
            call()
    assert not mp.active_children()


@pytest.mark.parametrize("cut", [(1,), (2,), (3,), *((2, m) for m in METHODS[1:])])
@np.printoptions(precision=3, threshold=2)
def test_a_pool_gives_the_same_bits_as_one_process_however_arrays_are_printed(cut):
    workers, method, reference = cut[0], *cut[1:], *METHODS[: 2 - len(cut)], SHORT(7)
    with thrust.EnvPool(SHORT, 7, workers, start_method=method) as pool:
        assert len(mp.active_children()) == workers
        assert same(pool.reset(seed=3)[0], reference.reset(seed=3)[0])
        assert all(check_same(pool, reference, 300) > 20)  # environment i is seeded seed + i
        assert same(pool.reset()[0], reference.reset()[0])  # without a seed, they go on


def test_a_run_in_one_process_seeds_the_generators_that_all_code_shares(in_tmp):
    config = small(env=f"{__name__}:Odd", total_steps=256)
    first, second = (thrust.train(config).policy.state_dict() for _ in range(2))
    assert equal(first, second)


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


def test_a_state_goes_on_in_any_number_of_workers_and_in_one_process():
    with start_pool(SHORT, 5, 1) as one, start_pool(SHORT, 5, 2) as two:
        one.reset(seed=3)
        for source, target in itertools.permutations([one, two, SHORT(5)], 2):
            for _ in range(15):
                source.step(np.arange(5) % 2)
            target.set_state(source.state())
            assert check_same(target, source, 60).sum() > 5


def test_a_state_larger_than_a_pipe_passes_through():
    with start_pool(thrust.CartPole, 16_384, 2) as pool:
        state = pool.state()
        pool.set_state({name: array + 2 for name, array in state.items()})
        assert all(same(array, state[name] + 2) for name, array in pool.state().items())


def test_what_does_not_fit_is_refused_in_a_sentence_and_changes_nothing():
    for workers in (-1, 0, 9):
        with pytest.raises(ValueError, match=f"8 environments cannot have {workers} workers"):
            start_pool(thrust.CartPole, 8, workers)
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


def test_environments_that_a_pool_cannot_have_are_refused_before_it_starts():
    spaces, env = oracle("gymnasium.spaces"), thrust.CartPole(1)
    text = thrust.Box(None, None, (4,), np.dtype("U9"))
    for space in (spaces.Dict({"a": spaces.Discrete(2)}), spaces.Tuple([]), text):
        env.single_observation_space = space
        with pytest.raises(
            ValueError, match=f"not {type(space).__name__}.*; wrap it .*Flatten"
        ):
            start_pool(lambda num_envs: env, 8, 2)
    env.metadata = {"autoreset_mode": "NextStep"}
    with pytest.raises(ValueError, match="must be SAME_STEP, not NextStep"):
        start_pool(lambda num_envs: env, 8, 2)


def test_a_pool_that_is_closed_has_no_workers_and_refuses_every_call():
    with contextlib.suppress(KeyError), start_pool(thrust.CartPole, 8, 2) as pool:
        processes = mp.active_children()
        raise KeyError
    assert [process.exitcode for process in processes] == [0, 0]
    pool.close()
    check_closed(pool)


def failure(make_env, timeout=60, method=METHODS[0]):
    """How 8 environments in 2 workers fail, at some moment. No process is left."""
    pool = None
    with pytest.raises(thrust.WorkerError) as caught:
        pool = thrust.EnvPool(make_env, 8, 2, start_method=method, timeout=timeout)
        pool.set_state(pool.state())
        pool.reset(seed=0)
        pool.step(ZEROS)
    if pool:
        check_closed(pool)
    assert caught.value.worker == 1 and not mp.active_children()
    return caught.value


FAULTS = {  # what is said, and the exit code (whoever raised may still run, or have ended)
    "raise": (rf"raised while {{}}: KeyError: 7 \({HERE.name}, line \d+\)", (None, 0)),
    "quit": (rf"raised while {{}}: SystemExit: no \({HERE.name}, line \d+\)", (None, 0)),
    "exit": ("died with exit code 3 while {}", (3,)),
    "kill": ("died with exit code -9 while {}", (-9,)),
    "hang": (r"was still {} after 0\.3 s", (None,)),
    "narrow": (r"raised while {}: ValueError: obs must .* \(4, 4\); got .*", (None, 0)),
}
MOMENTS = {"make": "starting", "reset": "resetting", "step": "stepping"}
MOMENTS |= {"state": "giving its state", "set_state": "taking a state"}
CASES = [(fault, at, METHODS[0]) for fault in ("raise", "exit") for at in MOMENTS]
CASES += [(fault, "step", METHODS[-1]) for fault in FAULTS if hasattr(signal, "SIGKILL")]


@pytest.mark.parametrize(("fault", "moment", "method"), CASES)
def test_a_worker_that_fails_is_one_error(fault, moment, method):
    error = failure(Faulty(fault, moment), 0.3 if fault == "hang" else 60, method)
    line, *trace = str(error).splitlines()
    sentence, exitcodes = FAULTS[fault]
    sentence = r"worker 1 \(environments 4 to 7\) " + sentence.format(MOMENTS[moment])
    assert re.fullmatch(sentence, line) and error.exitcode in exitcodes
    assert ("raised" in line) == bool(trace)
    if trace:  # the worker's, and whole
        assert trace[0] == "Traceback (most recent call last):" and "in run_worker" in trace[1]
        assert trace[-1].partition(": ")[0] in ("KeyError", "SystemExit", "ValueError")


def test_ctrl_c_and_words_that_cannot_be_sent_close_the_pool_at_once(capfd):
    pool = start_pool(Faulty("hang"), 8, 2, timeout=1)
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        pool.step(ZEROS)
    check_closed(pool)
    pool, began = start_pool(thrust.CartPole, 8, 2), time.monotonic()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pool.reset(options={"none": lambda: None})
    check_closed(pool)
    assert time.monotonic() - began < 10 and not capfd.readouterr().err


def test_a_worker_that_hangs_does_not_hide_what_another_raised():
    error = failure(Faulty("raise", others="hang"), timeout=1)
    assert "raised while stepping: KeyError: 7" in str(error)


@LINUX
@pytest.mark.parametrize("call", ["reset", "step", "set_state"])
def test_a_worker_that_died_between_two_calls_is_noticed_in_the_next(call):
    with start_pool(thrust.CartPole, 16_384, 2) as pool:
        arguments = {"set_state": [pool.state()], "step": [np.zeros(16_384, int)]}
        max(mp.active_children(), key=lambda worker: worker.name).kill()
        with pytest.raises(thrust.WorkerError, match=r"worker 1 .* died with exit code -9"):
            getattr(pool, call)(*arguments.get(call, []))


def test_environments_may_start_processes_and_are_closed_also_after_exceptions(tmp_path):
    closed = tmp_path / "closed"
    with start_pool(functools.partial(Busy, closed), 7, 2) as pool:
        assert closed.read_text() == "1 "  # the one for the spaces
        pool.reset(seed=0)
        with pytest.raises(thrust.WorkerError, match="KeyError: 7"):
            pool.step(np.zeros(7, int))
        assert sorted(closed.read_text().split()) == ["1", "3", "4"]


@LINUX
def test_a_pool_that_is_forgotten_ends_its_workers_even_one_that_is_stopped():
    pool = start_pool(thrust.CartPole, 8, 2, timeout=1)
    os.kill(mp.active_children()[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    del pool
    assert not mp.active_children() and time.monotonic() - began < 10


def start_pools(make_env=thrust.CartPole, methods=("fork", "forkserver")):
    pools = [thrust.EnvPool(make_env, 8, 2, start_method=method) for method in methods]
    start_pools.kept = pools  # until the process ends
    pools[0].reset(seed=0)
    return pools


def be_killed_while_stepping():
    for pool in start_pools(Faulty("hang", others="hang"), METHODS):
        threading.Thread(target=pool.step, args=[ZEROS], daemon=True).start()
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def be_interrupted_twice():
    pools = start_pools()
    with contextlib.suppress(KeyboardInterrupt):
        os.killpg(0, signal.SIGINT)
        time.sleep(9)
    threading.Timer(0.2, os.killpg, [0, signal.SIGINT]).start()
    while True:
        for pool in pools:
            pool.step(ZEROS)


def run_program(function):
    """Calls it in a new process: (exit code, stderr). That is read to its end, which does not
    come before all processes that inherited it have ended."""
    process = start("-c", f"import {HERE.stem}; {HERE.stem}.{function.__name__}()")
    try:
        error = process.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, error


@LINUX
def test_workers_end_with_a_learner_that_is_killed_or_never_closes_its_pools():
    assert run_program(be_killed_while_stepping)[0] == -signal.SIGKILL
    assert run_program(start_pools) == (0, "")


@LINUX
def test_ctrl_c_concerns_only_the_learner_and_is_one_traceback():
    code, error = run_program(be_interrupted_twice)
    assert code == -signal.SIGINT and error.endswith("\nKeyboardInterrupt\n")
    assert error.count("Traceback") == 1 and error.count("KeyboardInterrupt") == 1


# == 8. Runs ===================================================================================


class Stateless:
    """A contextual bandit, without a state. An episode is one step, which pays 1 for the action
    that the sign of the observation asks for, or else -1."""

    metadata = {"autoreset_mode": "SameStep"}
    single_observation_space = thrust.Box(np.zeros(1), np.ones(1), (1,))
    single_action_space = TWO

    def __init__(self, num_envs):
        self.num_envs, self.close = num_envs, lambda: None

    def reset(self, *, seed=None, options=None):
        self.rng = default_rng(seed)
        self.obs = self.rng.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
        return self.obs, {}

    def step(self, actions):
        reward = np.where((self.obs[:, 0] > 0) == (actions == 1), 1.0, -1.0)
        final_obs = self.obs
        self.obs = self.rng.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
        always = np.ones(self.num_envs, bool)
        return self.obs, reward, always, ~always, {"final_obs": final_obs}


class NextStep(thrust.CartPole):
    metadata = {"autoreset_mode": "NextStep"}


def gymnasium_cartpole(num_envs):
    return gymnasiums("CartPole-v1", num_envs, max_episode_steps=20)


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


@pytest.mark.parametrize("env", ["CartPole", "test_thrust:gymnasium_cartpole", "Acrobot-v1"])
def test_the_same_config_gives_the_same_weights_and_log_for_any_workers(env, in_tmp):
    if env != "CartPole":
        oracle("gymnasium")
    knobs = {"env": env, "norm_obs": True, "norm_reward": True}
    first, *others = (thrust.train(small(workers=w, **knobs)) for w in (0, 2, 3))
    for other in others:  # those of three workers have uneven slices
        assert_same_run(first, other)
    names = sorted(path.name for path in (in_tmp / "runs").iterdir())
    assert len(names) == 3 and names[1].endswith("-0-2")  # no folder is used twice


@POSIX
def test_killed_again_and_again_a_run_is_bit_for_bit_the_run_that_was_not(undisturbed, in_tmp):
    config, result = undisturbed
    run, flags = in_tmp / "here/there/CartPole-0", "--checkpoint-seconds 0.03 --epochs 4"
    flags += " --num-envs 8 --num-steps 16 --minibatch-size 64 --total-steps 5120 --no-anneal"
    flags += " --hidden 32 16 --norm-obs --norm-reward --eval-episodes 4 --runs here/there"
    flags += " --learning-rate 0.001 --gamma 0.99"
    for workers in (2, 0, 1):
        flags = f"--resume {run}" if run.exists() else flags
        rows = len(log_of(run)) if run.exists() else 0
        process = start(SOURCE, *flags.split(), "--workers", workers)
        wait_for_rows(process, run / "log.csv", rows + 6)
        process.kill()
        process.communicate()
        assert len(log_of(run)) < 40  # it was on its way
    config = dataclasses.replace(config, workers=3)
    assert_same_run(thrust.train(config, resume=run), result)


def test_a_finished_run_can_be_extended_and_what_may_not_change_is_told(in_tmp, capsys):
    thrust.train(small())
    flags = "--resume runs/CartPole-0 --total-steps 1700 --num-steps 32 --epochs 2"
    thrust.main(flags.split())
    rows = log_of("runs/CartPole-0")
    assert [int(row["update"]) for row in rows] == list(range(1, 10))
    assert [int(row["steps"]) for row in rows] == [*range(128, 769, 128), 1024, 1280, 1536]
    assert [int(row["gradient_steps"]) for row in rows] == [*range(8, 49, 8), 56, 64, 72]
    assert json.loads(pathlib.Path("runs/CartPole-0/config.json").read_text())["epochs"] == 2
    changes = {"seed": 1, "hidden": (8,), "num_envs": 4, "env": "my:Env", "gamma": 0.5}
    for name, value in {**changes, "norm_obs": False, "norm_reward": False}.items():
        config = dataclasses.replace(small(), total_steps=1700, **{name: value})
        with pytest.raises(ValueError, match=f"runs/CartPole-0 has {name} = .*cannot become"):
            thrust.train(config, resume="runs/CartPole-0")
    for flags in ("--seed 1", "--total-steps 1000"):
        with pytest.raises(SystemExit) as done:
            thrust.main(["--resume", "runs/CartPole-0", *flags.split()])
        assert done.value.code == 2 and "runs/CartPole-0 has " in capsys.readouterr().err


def test_an_environment_without_state_is_resumed_in_new_episodes(in_tmp):
    run, starts = "runs/test_thrust-Stateless-0", []
    for total in (384, 768):
        knobs = {"env": "test_thrust:Stateless", "total_steps": total}
        resume = run if total == 768 else None
        result = thrust.train(small(**knobs), resume=resume)
        starts.append(thrust.load_checkpoint(run)[1]["learner"]["obs"])
    assert [int(row["episodes"]) for row in log_of(run)] == [128 * (i + 1) for i in range(6)]
    assert not torch.equal(*starts) and result.run == pathlib.Path(run)


def test_the_page_and_the_checkpoint_of_a_long_run_stay_small(in_tmp):
    sizes = {"num_envs": 2, "num_steps": 2, "minibatch_size": 4, "epochs": 1}
    knobs = {"env": "test_thrust:Stateless", "hidden": (64, 64)}
    thrust.train(small(**sizes, **knobs, total_steps=4 * 600))
    run = pathlib.Path("runs/test_thrust-Stateless-0")
    policy = thrust.load_checkpoint(run)[1]["learner"]["policy"]
    weights = sum(x.numel() * x.element_size() for x in policy.values())
    assert (run / "checkpoint.pt").stat().st_size < 4 * weights
    page = (run / "page.html").read_text(encoding="utf-8")
    curve = json.JSONDecoder().raw_decode(page.split("run = ")[1])[0]["curve"]
    assert 125 <= len(curve) <= 250 and curve[-1][0] == 2400


class Endless(Stateless):
    """An episode that never ends."""

    def step(self, actions):
        obs, reward, terminated, truncated, _ = super().step(actions)
        return obs, np.ones(self.num_envs), truncated, truncated, {}


def test_an_evaluation_that_never_ends_is_cut_off_and_says_so(in_tmp, capsys):
    envs = Endless(3)
    policy = thrust.ActorCritic(envs.single_observation_space, TWO)
    returns, finished = thrust.evaluate(policy, envs, 0, limit=50)
    assert returns.tolist() == [[50, 50, 50]] and not finished.any()
    thrust.train(small(env="test_thrust:Endless", eval_episodes=12))
    line = capsys.readouterr().out.splitlines()[-2]
    assert "10000.0 ± 0.0 over 12 episodes, 12 of them cut off after 10,000" in line
    assert {row["mean_return"] for row in log_of("runs/test_thrust-Endless-0")} == {"nan"}


def test_an_evaluation_counts_whole_episodes_in_a_fixed_order(undisturbed):
    _, result = undisturbed
    returns, finished = thrust.evaluate(result.policy, thrust.CartPole(4), 7, episodes=3)
    assert finished.all() and returns.shape == (3, 4)
    for i, length in enumerate(returns.ravel()):  # each alone, in a game of its own
        envs, ended, steps = thrust.CartPole(1), False, 0
        obs, _ = envs.reset(seed=7 + i)
        while not ended:
            action = result.policy.to_env(result.policy.act(obs, greedy=True))
            obs, _, terminated, truncated, _ = envs.step(action)
            ended, steps = terminated[0] or truncated[0], steps + 1
        assert length == steps
    with pytest.raises(ValueError, match="must be SAME_STEP"):
        thrust.evaluate(result.policy, NextStep(4), 7)


def test_after_training_the_environments_are_closed_and_the_policy_is_that_of_the_run(in_tmp):
    result = thrust.train(small(workers=3, eval_episodes=20))
    assert not mp.active_children() and result.returns.shape == (20,)
    loaded = thrust.load(result.run)
    assert torch.equal(weights_of(loaded), weights_of(result.policy)) and not loaded.training
    with pytest.raises(RuntimeError, match="usual causes"), np.errstate(all="ignore"):
        thrust.train(small(workers=2, learning_rate=1e30))
    assert not mp.active_children()
    assert thrust.load_checkpoint("runs/CartPole-0-2")[1]["steps"] < 768


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_is_whole(in_tmp, monkeypatch):
    calls, original = itertools.count(), os.fsync

    def fsync(number):  # from the tenth call on, the disk is full
        if next(calls) >= 9:
            raise OSError(28, "No space left on device")
        original(number)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", fsync)
        thrust.train(small(checkpoint_seconds=0))
    assert not list(in_tmp.rglob("*.tmp"))
    saved = thrust.load_checkpoint("runs/CartPole-0")[1]
    assert 0 < saved["steps"] < 768
    thrust.train(small(), resume="runs/CartPole-0")
    assert len(log_of("runs/CartPole-0")) == 6


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


BAD = {"FileNotFoundError": None, "UnpicklingError": {"config": Evil()}}
BAD |= {"KeyError": {"other": 1}, "ValueError: gamma must": {"config": '{"gamma": 7.0}'}}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_checkpoint_is_one_sentence_and_not_run(reason, in_tmp, capsys):
    if BAD[reason] is not None:
        torch.save(BAD[reason], "checkpoint.pt")
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(SystemExit) as done:
            thrust.main([flag, "."])
        error = capsys.readouterr().err
        assert done.value.code == 2 and not os.path.exists("hacked")
        assert f"cannot be loaded as a checkpoint: {reason}" in error
        assert "Traceback" not in error


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such links")
def test_a_runs_folder_that_cannot_be_made_is_an_error_and_no_endless_loop(in_tmp):
    os.symlink(in_tmp / "nowhere" / "at all", in_tmp / "dangling")
    (in_tmp / "file").write_text("")
    for runs in ("dangling", "file"):
        with pytest.raises(OSError, match=runs):
            thrust.train(small(runs=runs))


no_group = not torch.distributed.is_available() or os.name == "nt"
DISTRIBUTED = pytest.mark.skipif(no_group, reason="no torch.distributed")


@DISTRIBUTED
@pytest.mark.skipif(torch.__version__ < "2.1", reason="older torch's own ranks fail or hang")
def test_two_ranks_under_torchrun_log_save_and_go_on_after_a_kill(in_tmp):
    def torchrun(port, *flags):
        launcher = "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port"
        return start(*launcher, port + os.getpid() % 10_000, SOURCE, *flags)

    flags = "--num-envs 4 --num-steps 16 --minibatch-size 32 --total-steps 5120 --norm-obs"
    flags += " --norm-reward --target-kl 0.002 --eval-episodes 4"
    process, run = torchrun(20_000, *flags.split()), in_tmp / "runs/CartPole-0"
    wait_for_rows(process, run / "log.csv", 8)
    process.terminate()  # torchrun passes it on
    process.communicate(timeout=60)
    resumed = torchrun(30_000, "--resume", run)
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert re.search(r"\npage: .*\nevaluation: .*\nweights: .*\n$", out)
    assert out.count("training CartPole for 5,120 steps") == 1
    rows = log_of(run)
    assert [int(row["steps"]) for row in rows] == [128 * (i + 1) for i in range(40)]
    steps = np.diff([0, *(int(row["gradient_steps"]) for row in rows)])
    assert steps.max() == 6 and steps.min() < 6  # target_kl ended some, on both
    alone = dataclasses.replace(thrust.load_checkpoint(run)[0], total_steps=5376)
    thrust.train(alone, resume=run)  # one rank goes on with what two have played
    assert [int(row["steps"]) for row in log_of(run)][-5:] == [5120, 5184, 5248, 5312, 5376]


def one_rank(rank, folder, queue):
    """Trains as one of two ranks of a process group that the caller began."""
    os.chdir(folder)
    torch.distributed.init_process_group("gloo", f"file:{folder}/g?rank={rank}&world_size=2")
    played, collect = [], thrust.PPO._collect

    def spy(learner):
        collect(learner)
        played.append([learner.rollout.obs[0].copy(), learner.rollout.action.copy()])

    thrust.PPO._collect = spy
    with contextlib.redirect_stdout(io.StringIO()):
        result = thrust.train(small(norm_obs=True, norm_reward=True, total_steps=768))
    assert torch.distributed.is_initialized()  # it is the caller's
    moments = [m.numpy() for m in result.policy.encoder.state_dict().values()]
    weights = weights_of(result.policy).numpy()
    queue.put((rank, weights, moments, played, result.run))
    queue.close()
    queue.join_thread()
    os._exit(0)  # leaving a group, or Python with one, hangs at times in some versions of torch


@DISTRIBUTED
def test_ranks_play_different_games_and_keep_equal_weights_and_moments(in_tmp):
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=one_rank, args=(r, in_tmp, queue)) for r in (0, 1)]
    for process in ranks:
        process.start()
    results = sorted((queue.get(timeout=60) for _ in ranks), key=lambda result: result[0])
    for process in ranks:
        process.join(20)
    (_, a, moments, games, run), (_, b, others, other_games, none) = results
    assert same(a, b) and all(map(same, moments, others)) and none is None
    for (obs, action), (other_obs, other_action) in zip(games, other_games):
        assert not np.array_equal(obs, other_obs) and not np.array_equal(action, other_action)
    rows = log_of(run)
    assert [int(row["steps"]) for row in rows] == [256, 512, 768]
    assert moments[0] == 8 * 16 * 3  # rows of each rank, in three updates
    obs = np.concatenate([played[0] for played in (*games, *other_games)])
    assert np.abs(moments[1] - obs.mean(0)).max() < 1  # roughly: these are first rows alone


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """What training with the defaults gives: (result, lines of output)."""
    config = thrust.Config(**thrust.CARTPOLE, runs=str(tmp_path_factory.mktemp("solved")))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        result = thrust.train(config)
    return result, output.getvalue().splitlines()


def test_the_default_run_solves_cartpole_and_says_what_it_does(solved):
    result, lines = solved
    assert result.returns.tolist() == [500.0] * 100
    assert all(math.isfinite(float(v)) for row in log_of(result.run) for v in row.values())
    names = sorted(path.name for path in result.run.iterdir())
    assert names == ["checkpoint.pt", "config.json", "log.csv", "page.html"]
    assert lines[0].startswith("training CartPole for 198,656 steps; everything is kept in")
    for passed in ("passed 195: mean return", "passed 475: mean return"):
        assert [line for line in lines if line.startswith(passed)]
    assert lines[-3] == f"page: {result.run / 'page.html'}"
    assert lines[-2] == "evaluation: mean return 500.0 ± 0.0 over 100 episodes"
    assert re.fullmatch("weights: [0-9a-f]{64}", lines[-1])


# == 9. Command line ===========================================================================


def test_every_knob_is_a_flag_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit) as done:
        thrust.main(["--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(thrust.Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert f"{field.metadata['help']} (default: {field.default}" in text


WRONG_FLAGS = {
    "--nonsense": "unrecognized arguments: --nonsense",
    "--num-envs many": "argument --num-envs: invalid int value: 'many'",
    "--num-envs 0": "num_envs must be int from 1 to 1000000; got 0",
    "--gamma nan": "gamma must be float from 0.0 to 1; got nan",
    "--seed": "argument --seed: expected one argument",
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


@POSIX
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_a_run_with_one_line_and_130_and_nothing_is_lost(workers, in_tmp):
    flags = "--total-steps", 10**7, "--checkpoint-seconds", "0.05", "--workers", workers
    process = start(SOURCE, *flags)
    wait_for_rows(process, in_tmp / "runs/CartPole-0/log.csv", 8)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == ""
    assert "stopped; to go on: python thrust.py --resume runs/CartPole-0" in out
    assert thrust.load_checkpoint("runs/CartPole-0")[1]["steps"] > 0
    assert not list(in_tmp.rglob("*.tmp"))


def test_help_and_a_run_work_on_a_narrow_console(in_tmp):
    for encoding in ("ascii", "cp1252"):
        for flags in (["--help"], [*SMALL_FLAGS, "--runs", encoding]):
            environment = {**os.environ, "PYTHONIOENCODING": encoding}
            process = start(SOURCE, *flags, env=environment, encoding=encoding)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0 and err == "" and out


# == 10. Page ==================================================================================


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    if not shutil.which("chromedriver") and not os.environ.get("THRUST_ALL_TESTS"):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    webdriver = oracle("selenium.webdriver")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.js = browser.execute_script
        yield browser


@pytest.fixture(scope="module")
def players():
    """Two random policies, and one that balances the pole."""
    env, rng = thrust.CartPole(1), np.random.default_rng(0)
    spaces = env.single_observation_space, env.single_action_space
    options = {"hidden": (), "norm_obs": True}, {}, {"hidden": ()}
    players = [thrust.ActorCritic(*spaces, **each) for each in options]
    players[0].encoder.mean[:] = torch.tensor([0, -0.5, 0.1, 1])
    players[0].encoder.var[:] = torch.tensor([1e-10, 1, 0.01, 9])  # 1e-10 counts as 1e-8
    for weight in [*players[0].actor.parameters(), *players[1].actor.parameters()]:
        weight.data[:] = torch.from_numpy(rng.normal(size=weight.shape))
    players[2].actor[0].weight.data[:] = torch.tensor([[0] * 4, [1, 1, 10, 3]])
    return players


def url_of(players, returns=(math.nan, 20, 500), total=6144, env="CartPole"):
    """The address of the page after updates of 2,048 steps, with these mean returns."""
    curve = [(2048 * i, mean) for i, mean in enumerate(returns, 1)]
    policies = [(3072 * i, player.state_dict()) for i, player in enumerate(players)]
    page = thrust.make_page(thrust.Config(env=env), curve, policies, total)
    return "data:text/html;charset=utf-8," + urllib.parse.quote(page)


def test_in_the_browser_large_single_steps_and_fifty_free_steps_are_cartpoles(players, browser):
    browser.get(url_of(players))
    script = "const [s, a] = arguments; return s.map((s, i) => step(s, P.FORCES[a[i]]))"
    rng, env = np.random.default_rng(0), thrust.CartPole(1000)
    env.X_LIMIT = env.ANGLE_LIMIT = np.inf  # plays on wherever the pole is
    for scale, steps, error in (1, 1, 1e-12), (30, 1, 1e-12), (0.02, 50, 1e-9):
        env.set_state({**env.state(), "state": scale * rng.normal(size=(1000, 4))})
        states = env.state()["state"].tolist()
        for actions in rng.integers(2, size=(steps, 1000)):
            env.step(actions)
            states = browser.js(script, states, actions.tolist())
        np.testing.assert_allclose(states, env.state()["state"], rtol=error, atol=error)
        lost = (np.abs(states) > env.single_observation_space.high / 2).any(1)
        assert browser.js("return arguments[0].map(fallen)", states) == lost.tolist()


def test_in_the_browser_every_policy_acts_as_it_does_here(players, browser):
    browser.get(url_of(players))
    states = np.random.default_rng(0).normal(size=(800, 4)).astype(np.float32)
    states *= np.repeat(np.float32([1e-4, 0.1, 1, 30]), 200)[:, None]
    script = "return run.policies.map((policy) => arguments[0].map((s) => act(policy, s)))"
    actions = [np.asarray(player.act(states, greedy=True)).tolist() for player in players]
    assert browser.js(script, states.tolist()) == actions
    browser.execute_async_script("setInterval(() => steps > 9 && arguments[0]())")  # it plays
    assert browser.js("begin(); for (let i = 0; i < 2000; i++) advance(); return steps") == 2000


def test_pages_are_small_and_silent_and_show_html_in_a_name_as_text(players, browser):
    name = "m:</script><!--<script>alert(1)</script><b>\"'\\`${P}" + "x" * 50
    script = """return [document.documentElement.scrollWidth, $("curve").points.length,
        performance.getEntriesByType("resource"), $("play").checked === !$("live").hidden]"""
    bar, now = "475 solves CartPole-v1", "Mean return of the last 100 episodes:"
    for page, points, shown in (
        (url_of(players), 2, {"Finished: 6,144 steps", f"{now} 500", "500", "6,144 steps"}),
        (url_of([], [math.nan]), 0, {"Trained for 2,048 of 6,144 steps", f"{now} none yet"}),
        (url_of([], [-487, -90], env=name), 2, {f"{name}, seed 0", f"{now} -90", "-500", "0"}),
    ):
        for width in (1280, 360):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(page)
            lines = set(browser.find_element("tag name", "body").text.split("\n"))
            assert shown | {browser.title} <= lines and browser.get_log("browser") == []
            assert (bar in lines) == ("CartPole, seed 0" in lines) and len(page) < 500_000
            assert browser.js(script) == [width, points, [], True]


def test_buttons_keys_slider_and_play_do_what_they_say(players, browser):
    waits = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": waits})
    browser.get(url_of(players))
    body, left, right, play, slider = browser.find_elements("css selector", "body,button,input")
    LEFT, RIGHT = "\ue012", "\ue014"  # keys, as selenium writes them
    script = """const was = state, now = (push) => step(was, P.FORCES[act(policy, was)] + push);
        advance(); return [-40, 0, 40].filter((push) => String(now(push)) === String(state))"""
    for at, key, push in zip((left, body, right, body), f" {LEFT} {RIGHT}", (-40, -40, 40, 40)):
        at.send_keys(key)
        assert [browser.js(script), browser.js(script)] == [[push], [0]]  # for one step
    for playing in (0, 1, 0, 1):
        n, steps, text = browser.js("return [steps, frame() ?? steps, $('status').textContent]")
        assert steps == n + playing and text == f"Step {steps}"
        play.send_keys(" ")
    slider.send_keys(LEFT)  # moves the slider, does not push, and starts over
    assert browser.js("return [policy.steps, steps, push]") == [3072, 0, 0]
    steps, *shown = browser.js("""while (!fallen(state)) advance();
        frame(); return [steps, $("status").textContent, $("age").textContent]""")
    assert shown == [f"Fell at step {steps}", "3,072"]
    assert browser.js("for (let i = 0; i < 50; i++) advance(); return steps") == 0  # anew
