"""What goes wrong around a run: kills, Ctrl-C, dead workers, full disks, several machines; and
its page in a browser. Apart from test_thrust.py, as these need signals, torchrun or Chromium.
From the folder of thrust.py: python -m pytest .ci/test_trouble.py"""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import multiprocessing as mp
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.random import default_rng

import test_thrust
import thrust
from test_thrust import (
    PROGRAMS,
    SOURCE,
    ZEROS,
    Faulty,
    Game,
    assert_same_run,
    log_of,
    oracle,
    same,
    small,
    start_pool,
    weights_of,
)

in_tmp, undisturbed = test_thrust.in_tmp, test_thrust.undisturbed  # fixtures
HERE = pathlib.Path(__file__)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="sends signals")
stuck = Faulty("hang", others="hang")
SMALL = ["--num-envs", "4", "--minibatch-size", "64", "--total-steps", "768"]


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Ctrl-C is not ignored, as it is in background jobs, whose children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*command, **options):
    """Starts a Python program that can import this file and thrust.py."""
    path = os.pathsep.join([str(SOURCE.parent), str(HERE.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, env=env, text=True, **{**pipes, **options})


def wait_for_rows(process, log, rows):
    """Waits until the log of a training has so many rows."""
    until = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") <= rows:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)


# == Workers ===================================================================================


class Busy(thrust.CartPole):
    """A step starts a process and raises; `close` takes a while, and is noted in a file."""

    def __init__(self, file, num_envs):
        super().__init__(num_envs)
        self.file, self.child = file, mp.Process(target=time.sleep, args=(60,))

    def step(self, actions):
        self.child.start()
        raise KeyError(7)

    def close(self):
        if self.child.pid:
            time.sleep(1.2)
            self.child.kill()
        with self.file.open("a") as file:
            file.write(f"{self.num_envs} ")


def test_ctrl_c_closes_the_pool():
    pool = start_pool(Faulty("hang"), 8, 2, timeout=1)
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        pool.step(ZEROS)
    assert not mp.active_children()


@LINUX
@pytest.mark.parametrize("call", ["reset", "step", "set_state"])
def test_a_worker_that_died_is_noticed_in_the_next_call_also_with_more_than_a_pipe_holds(call):
    with start_pool(thrust.CartPole, 16_384, 2) as pool:
        arguments = {"set_state": [pool.state()], "step": [np.zeros(16_384, int)]}
        pool.set_state(*arguments["set_state"])
        max(mp.active_children(), key=lambda worker: worker.name).kill()
        with pytest.raises(thrust.WorkerError, match=r"worker 1 .* died with exit code -9"):
            getattr(pool, call)(*arguments.get(call, []))


def test_environments_may_start_processes_and_are_closed_also_after_exceptions(tmp_path):
    closed = tmp_path / "closed"
    with start_pool(functools.partial(Busy, closed), 7, 2) as pool:
        assert closed.read_text() == "1 "  # the one for the spaces
        pool.reset(seed=0)
        with pytest.raises(thrust.WorkerError, match="KeyError: 7"):
            pool.step(ZEROS[:7])
        assert sorted(closed.read_text().split()) == ["1", "3", "4"]


def sleepers():
    """The processes of this test run that Littering's steps have begun."""
    return subprocess.run(["pgrep", "-f", f"sleep 3{os.getpid()}"], stdout=-1).stdout.split()


class Littering(thrust.CartPole):
    """Each step starts a process, which nobody ends; the second never returns."""

    def step(self, actions):
        subprocess.Popen(["sleep", f"3{os.getppid()}"])  # workers are forks of the learner
        while self._steps.any():
            pass
        return super().step(actions)


@LINUX
@pytest.mark.parametrize("hang", [False, True])
def test_nothing_is_left_of_what_environments_have_started(hang):
    pool = start_pool(Littering, 4, 2, timeout=1)
    with pytest.raises(thrust.WorkerError) if hang else pool:
        pool.step(ZEROS[:4])
        assert len(sleepers()) == 2
        if hang:
            pool.step(ZEROS[:4])
    assert not sleepers()


@LINUX
def test_workers_end_with_a_learner_that_is_killed_even_where_they_are_stuck(in_tmp):
    process = start(SOURCE, "--env", "test_trouble:stuck", "--workers", 2, *SMALL)
    assert "training" in process.stdout.readline()
    time.sleep(0.3)
    process.kill()
    process.communicate(timeout=20)  # reads to the end, which comes when all have ended


# == Runs ======================================================================================


@LINUX
def test_killed_again_and_again_a_run_is_bit_for_bit_the_run_that_was_not(undisturbed, in_tmp):
    config, result = undisturbed
    run, flags = in_tmp / "here/there/CartPole-0", "--checkpoint-seconds 0.03 --epochs 4"
    flags += " --num-envs 8 --num-steps 16 --minibatch-size 64 --total-steps 5120 --no-anneal"
    flags += " --hidden 32 16 --norm-obs --norm-reward --eval-episodes 4 --runs here/there"
    flags += " --learning-rate 0.001 --gamma 0.99"
    for workers in (2, 0):
        flags = f"--resume {run}" if run.exists() else flags
        rows = len(log_of(run)) if run.exists() else 0
        process = start(SOURCE, *flags.split(), "--workers", workers)
        wait_for_rows(process, run / "log.csv", rows + 6)
        process.kill()
        process.communicate()
        assert len(log_of(run)) < 40  # it was on its way
    config = dataclasses.replace(config, workers=3)
    assert_same_run(thrust.train(config, resume=run), result)
    with open(run / "log.csv", newline="") as file:  # the clock goes on too
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert seconds == sorted(seconds) and len(set(seconds)) == 40


@LINUX
def test_ctrl_c_ends_a_run_with_one_line_and_130_and_nothing_is_lost(in_tmp):
    process = start(
        SOURCE, "--total-steps", 10**7, "--checkpoint-seconds", 0.05, "--workers", 2
    )
    wait_for_rows(process, in_tmp / "runs/CartPole-0/log.csv", 8)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == ""
    assert "stopped; to go on: python thrust.py --resume runs/CartPole-0" in out
    assert thrust.load_checkpoint("runs/CartPole-0")[1]["steps"] > 0
    assert not list(in_tmp.rglob("*.tmp"))


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_is_whole(in_tmp, monkeypatch):
    fsync = mock.Mock(side_effect=[None] * 9 + [OSError(28, "No space left on device")])
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", fsync)
        thrust.train(small(checkpoint_seconds=0))
    assert not list(in_tmp.rglob("*.tmp"))
    assert 0 < thrust.load_checkpoint("runs/CartPole-0")[1]["steps"] < 768
    thrust.train(small(), resume="runs/CartPole-0")
    assert len(log_of("runs/CartPole-0")) == 6


def test_a_run_that_another_process_has_is_refused_and_can_be_resumed_later(in_tmp):
    process = start(SOURCE, "--total-steps", 10**7, "--checkpoint-seconds", 0.05)
    wait_for_rows(process, (run := in_tmp / "runs/CartPole-0") / "log.csv", 8)
    config, _ = thrust.load_checkpoint(run)
    with pytest.raises(ValueError, match=r"log.csv belongs to a process that is running"):
        thrust.train(config, resume=run)
    wait_for_rows(process, run / "log.csv", len(log_of(run)) + 8)  # undisturbed
    process.kill()
    process.communicate()
    steps = thrust.load_checkpoint(run)[1]["steps"]
    thrust.train(dataclasses.replace(config, total_steps=steps + 4096), resume=run)
    assert [int(row["steps"]) for row in log_of(run)] == [*range(2048, steps + 4097, 2048)]


@pytest.mark.parametrize("cut", [40, 3, 1, -3, -9])
def test_a_log_that_was_cut_within_a_row_goes_on_with_whole_rows(cut, in_tmp):
    run = thrust.train(small(total_steps=384)).run
    text = (run / "log.csv").read_text()
    # rows are missing that the checkpoint counts; or part of a row follows that it does not
    (run / "log.csv").write_text(text[:-cut] if cut > 0 else text + text[-40:cut])
    thrust.train(small(), resume=run)
    steps = [int(row["steps"]) for row in log_of(run)]
    assert steps == [128 * (i + 1) for i in range(6) if i != 2 or cut < 0]
    assert all(None not in row and None not in row.values() for row in log_of(run))


class Locked(thrust.CartPole):
    def step(self, actions):
        raise ValueError("the door is closed")


def test_what_an_environment_raises_is_a_traceback_with_kind_place_and_text(in_tmp):
    process = start(SOURCE, "--env", "test_trouble:Locked")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.endswith("ValueError: the door is closed\n")
    assert re.search(r'test_trouble.py", line \d+, in step\n', error)


class Changing(Game):
    width = 4

    def __init__(self, num_envs):
        super().__init__(num_envs, scale=(1.0,) * self.width)


def test_a_checkpoint_of_other_spaces_is_refused_and_left_as_it_is(in_tmp, monkeypatch):
    config = small(env="test_trouble:Changing")
    run = thrust.train(config).run
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(Changing, "width", 6)
    for call in (lambda: thrust.load(run), lambda: thrust.train(config, resume=run)):
        with pytest.raises(RuntimeError, match=r"size mismatch for actor.0.weight: .* 4.* 6"):
            call()
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_a_file_that_somebody_reads_is_replaced_a_moment_later(tmp_path):
    path, held = tmp_path / "page.html", [PermissionError, PermissionError, mock.DEFAULT]
    with mock.patch.object(os, "replace", wraps=os.replace, side_effect=held) as replace:
        thrust.replace_file(path, b"new")
    assert path.read_bytes() == b"new" and replace.call_count == 3
    refused = mock.patch.object(os, "replace", side_effect=PermissionError)  # as on Windows
    with refused, pytest.raises(PermissionError):
        thrust.replace_file(path, b"newer")
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"new"


def test_config_json_is_json(undisturbed):
    def refuse(text):
        raise ValueError(text)

    text = (undisturbed[1].run / "config.json").read_text()
    assert json.loads(text, parse_constant=refuse)["env"] == "CartPole"  # no NaN or Infinity


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such links")
def test_a_runs_folder_that_cannot_be_made_is_an_error_and_no_endless_loop(in_tmp):
    os.symlink(in_tmp / "nowhere" / "at all", in_tmp / "dangling")
    (in_tmp / "file").write_text("")
    for runs in ("dangling", "file"):
        with pytest.raises(OSError, match=rf"File exists: '{runs}'"):
            thrust.train(small(runs=runs))


def test_the_page_and_the_checkpoint_of_a_long_run_stay_small(in_tmp):
    sizes = {"num_envs": 2, "num_steps": 2, "minibatch_size": 4, "epochs": 1}
    thrust.train(small(**sizes, env="test_thrust:Game", hidden=(64, 64), total_steps=4 * 600))
    run = pathlib.Path("runs/test_thrust-Game-0")
    policy = thrust.load_checkpoint(run)[1]["learner"]["policy"]
    weights = sum(x.numel() * x.element_size() for x in policy.values())
    assert (run / "checkpoint.pt").stat().st_size < 4 * weights
    page = (run / "page.html").read_text(encoding="utf-8")
    curve = json.JSONDecoder().raw_decode(page.split("run = ")[1])[0]["curve"]
    assert 125 <= len(curve) <= 500 and curve[-1][0] == 2400


BAD = {  # what is said of a file that holds this
    "FileNotFoundError": None,
    "UnpicklingError": {"config": functools.partial(os.mkdir, "hacked")},
    "KeyError": {"other": 1},
    "ValueError: gamma must": {"config": '{"gamma": 7.0}'},
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_checkpoint_is_one_sentence(reason, flag, in_tmp, capsys):
    if BAD[reason]:
        torch.save(BAD[reason], "checkpoint.pt")
    with pytest.raises(SystemExit) as done:
        thrust.main([flag, "."])
    error = capsys.readouterr().err
    assert done.value.code == 2 and "Traceback" not in error
    assert f"cannot be loaded as a checkpoint: {reason}" in error


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_help_and_a_run_work_on_a_narrow_console_and_every_knob_is_told(encoding, in_tmp):
    with mock.patch("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding)) as console:
        thrust.main([*SMALL, "--eval-episodes", "2"])
        with pytest.raises(SystemExit, match="0"):
            thrust.main(["--help"])
    console.seek(0)
    text = " ".join(console.read().split())
    assert "evaluation: mean return " in text
    for field in dataclasses.fields(thrust.Config):
        told = f"{field.metadata['help']} (default: {field.default}"
        assert told.encode(encoding, "replace").decode(encoding) in text
        assert f"--{field.name.replace('_', '-')}" in text


# == Ranks =====================================================================================


def one_rank(rank, folder, queue):
    """Trains as one of two ranks of a process group that the caller began."""
    os.chdir(folder)
    torch.distributed.init_process_group("gloo", f"file:{folder}/g?rank={rank}&world_size=2")
    update, seen = thrust.PPO.update, []

    def update_spied(learner):
        row, r = update(learner), learner.rollout
        seen.append((row, r.obs.copy(), r.action.copy(), weights_of(learner.policy).numpy()))
        return row

    thrust.PPO.update = update_spied
    with contextlib.redirect_stdout(io.StringIO()):
        result = thrust.train(small(norm_obs=True, norm_reward=True, total_steps=768))
    assert torch.distributed.is_initialized()  # it is the caller's
    mean = thrust.mean_over_ranks(torch.tensor([rank, 4.0])).tolist()
    queue.put((rank, seen, mean, result.run))
    queue.close()
    queue.join_thread()
    os._exit(0)  # leaving a group, or Python with one, hangs at times in some versions of torch


def test_ranks_play_different_games_keep_equal_weights_and_log_for_all(in_tmp):
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=one_rank, args=(r, in_tmp, queue)) for r in (0, 1)]
    for process in ranks:
        process.start()
    results = sorted((queue.get(timeout=60) for _ in ranks), key=lambda result: result[0])
    for process in ranks:
        process.join(20)
    (_, first, mean, run), (_, second, _, none) = results
    assert none is None and mean == [0.5, 4.0]
    assert [int(row["steps"]) for row in log_of(run)] == [256, 512, 768]
    for (row, *arrays), (other, *others), logged in zip(first, second, log_of(run)):
        assert [*map(same, arrays, others)] == [False, False, True]
        assert int(logged["episodes"]) == row["episodes"] + other["episodes"]
        mean = (row["value_loss"] + other["value_loss"]) / 2
        assert float(logged["value_loss"]) == pytest.approx(mean)


@pytest.mark.skipif(torch.__version__ < "2.1", reason="older torch's own ranks fail or hang")
def test_two_ranks_under_torchrun_log_save_and_go_on_after_a_kill(in_tmp):
    def torchrun(port, *flags):
        launcher = "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port"
        return start(*launcher, port + os.getpid() % 10_000, SOURCE, *flags)

    flags = "--num-envs 4 --num-steps 16 --minibatch-size 32 --total-steps 5247 --norm-obs"
    flags += " --norm-reward --target-kl 0.002 --eval-episodes 4"
    process, run = torchrun(20_000, *flags.split()), in_tmp / "runs/CartPole-0"
    wait_for_rows(process, run / "log.csv", 8)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    how = "torchrun --nnodes 1 --nproc-per-node 2 thrust.py --resume runs/CartPole-0"
    assert f"stopped; to go on: {how}" in told
    resumed = torchrun(30_000, "--resume", run)
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert re.search(r"\npage: .*\nevaluation: .*\nweights: .*\n$", out)
    assert out.count("training CartPole for 5,120 steps") == 1
    assert "Finished: 5,120 steps" in (run / "page.html").read_text(encoding="utf-8")
    assert [int(row["steps"]) for row in log_of(run)] == [128 * (i + 1) for i in range(40)]
    alone = dataclasses.replace(thrust.load_checkpoint(run)[0], total_steps=5376)
    thrust.train(alone, resume=run)  # one rank goes on with what two have played
    assert [int(row["steps"]) for row in log_of(run)][-5:] == [5120, 5184, 5248, 5312, 5376]


@pytest.mark.skipif(torch.__version__ < "2.1", reason="older torch's own ranks fail or hang")
def test_what_readme_says_of_two_hosts():
    script, probe = HERE.with_name("two-hosts"), f"probe{os.getpid()}"
    if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", probe]).returncode:
        pytest.skip("needs iproute2, and root's right to make network namespaces")
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    done = subprocess.run(["bash", script, sys.executable], stdout=-1, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("all of it is true\n"), done.stdout


def spawn_everywhere():
    """What macOS and Windows do, with README's own environment, in workers."""
    program = next(p for p in PROGRAMS if "class Walk" in p)
    pathlib.Path("walk.py").write_text(program)
    sys.path.append(os.getcwd())
    with mock.patch.object(thrust.mp, "get_context", return_value=mp.get_context("spawn")):
        thrust.main(["--env", "walk:Walk", "--workers", "2", "--eval-episodes", "2", *SMALL])


def test_a_run_works_where_processes_are_spawned(in_tmp):
    process = mp.get_context("spawn").Process(target=spawn_everywhere)
    process.start()
    process.join(120)
    assert process.exitcode == 0 and (in_tmp / "runs/walk-Walk-0/page.html").exists()


# == The page ==================================================================================


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    if not shutil.which("chromedriver") and not os.environ.get("THRUST_ALL_TESTS"):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    webdriver = oracle("selenium.webdriver")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--window-size=360,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


def test_in_the_browser_the_policy_plays_cartpole_as_it_does_here(undisturbed, browser):
    policy, env = undisturbed[1].policy, thrust.CartPole(1000)  # it normalises
    browser.get((undisturbed[1].run / "page.html").as_uri())
    env.X_LIMIT = env.ANGLE_LIMIT = np.inf  # plays on wherever the pole is
    env.set_state({**env.state(), "state": default_rng(0).normal(size=(1000, 4))})
    states = env.state()["state"].tolist()
    script = """const [states, actions] = arguments, newest = run.policies.at(-1);
        const all = (s, i) => [...step(s, P.FORCES[actions[i]]), act(newest, s), fallen(s)];
        return states.map(all)"""
    for _ in range(20):
        state = env.state()["state"]
        actions = policy.act(np.float32(state), greedy=True)
        env.step(actions)
        *columns, chosen, fallen = zip(
            *browser.execute_script(script, states, actions.tolist())
        )
        states = np.transpose(columns).tolist()
        np.testing.assert_allclose(states, env.state()["state"], rtol=1e-9, atol=1e-9)
        assert list(chosen) == actions.tolist()
        lost = (np.abs(state) > env.single_observation_space.high / 2).any(1)
        assert list(fallen) == lost.tolist()
    browser.execute_async_script("setInterval(() => steps > 9 && arguments[0]())")  # it plays


def test_pages_are_silent_and_show_a_name_with_html_as_text(undisturbed, browser, tmp_path):
    name = "m:</script><!--<script>alert(1)</script><b>\"'\\`${P}" + "x" * 50
    config = thrust.Config(env=name)
    page = thrust.make_page(config, [(2048, math.nan), (4096, -487.0), (6144, -90.0)], [], 9999)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    now = "Mean return of the last 100 episodes:"
    for folder, shown in (
        (undisturbed[1].run, {"CartPole, seed 0", "Finished: 5,120 steps", "5,120 steps"}),
        (tmp_path, {f"{name}, seed 0", "Trained for 6,144 of 9,999 steps", f"{now} -90", "0"}),
    ):
        browser.get((folder / "page.html").as_uri())
        lines = set(browser.find_element("tag name", "body").text.split("\n"))
        assert shown | {browser.title} <= lines and browser.get_log("browser") == []
        script = """return [document.documentElement.scrollWidth <= innerWidth,
            performance.getEntriesByType("resource"), $("curve").points.length > 1]"""
        assert browser.execute_script(script) == [True, [], True]
