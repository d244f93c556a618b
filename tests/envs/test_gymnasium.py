"""Environments of Gymnasium, which are stepped in Python between compiled parts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.envs.registration import register, registry
from kept import keep_programs

import purejaxppo as ppo
from purejaxppo.checks import RunWarning
from purejaxppo.cli import main
from purejaxppo.host.hostcalls import answers

NAME = "PythonWalk-v0"
LIMIT, STEPS, N = 7, 16, 3


class PythonWalk(gymnasium.Env[np.ndarray, Any]):
    """Moves by the action; terminates at 3, and the reward is the position."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-20.0, 20.0, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, breaks_after: int = 10**9, render_mode: str | None = None):
        self.left = breaks_after
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.position = float(self.np_random.uniform(-1, 0))
        self.time = 0
        return self.observed(), {}

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the arm fell off")
        self.position += int(action) - 1
        self.time += 1
        return self.observed(), self.position, self.position >= 2, False, {}

    def observed(self) -> np.ndarray:
        return np.array([self.position, self.time], np.float64)

    def render(self) -> Any:
        """An image that holds the bytes of the position and the time."""
        numbers = np.array([self.position, self.time, 0.0], np.float64)
        return numbers.view(np.uint8).reshape(2, 4, 3)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    keep_programs(monkeypatch.setattr)
    register(NAME, entry_point=PythonWalk, max_episode_steps=LIMIT)
    yield
    registry.pop(NAME)


def config(**changes: Any) -> ppo.Config:
    given: dict[str, Any] = {
        "env_id": f"gymnasium/{NAME}", "num_envs": N, "num_steps": STEPS, "num_minibatches": 1,
        "update_epochs": 1, "hidden_sizes": (8,), "memory_size": 8,
        "total_timesteps": 6 * N * STEPS,
    }  # fmt: skip
    return ppo.Config(**given | changes)


def collected(task: ppo.Task, updates: int = 1) -> Any:
    """The state before the last of some updates, and its rollout."""
    learner, call = task.learner(None), task.update_call
    parts: Any = task.parts
    assert call is not None
    state = jax.jit(learner.init)(jax.random.key(1), ppo.HParams(), ())
    for n in range(updates):
        question = call.ask(state, ppo.HParams(), ())
        told = jax.tree.map(
            lambda x: x[0], answers(call, jax.tree.map(lambda x: x[None], question))
        )
        data = call.tell((), question, told)
        _, rollout = parts(None).actor.collect(state.learner, state.actors, ppo.HParams(), data)
        if n < updates - 1:
            state, _ = jax.jit(learner.update)(state, ppo.HParams(), data)
    return state, rollout, parts(None)


@pytest.mark.parametrize("memory", ["none", pytest.param("gru", marks=pytest.mark.slow)])
def test_a_rollout_is_what_happened_in_python(memory: str):
    """Replayed by hand in fresh environments, over two rollouts; values and log-probabilities are
    those of the network on the same observations."""
    task = ppo.make_task(config(memory=memory))
    state, rollout, parts = collected(task, 2)
    ids = np.asarray(state.actors.env_state)
    _, before, _ = collected(task)
    envs = [gymnasium.make(NAME) for _ in range(N)]
    obs = [env.reset(seed=int(ids[0]) % 2**31 + n)[0] for n, env in enumerate(envs)]
    actions = np.concatenate([before.action, rollout.action])
    found = [
        np.concatenate([getattr(before, name), getattr(rollout, name)])
        for name in ("obs", "reward", "terminated", "truncated", "start")
    ]
    start, finals = np.ones(N, bool), np.zeros((2 * STEPS, N, 2))
    for t in range(2 * STEPS):
        np.testing.assert_allclose(found[0][t], obs, rtol=1e-6)
        np.testing.assert_array_equal(found[4][t], start)
        for n, env in enumerate(envs):
            obs[n], reward, terminated, truncated, _ = env.step(actions[t, n])
            finals[t, n] = obs[n]
            assert found[1][t, n] == pytest.approx(reward)
            assert (found[2][t, n], found[3][t, n]) == (terminated, truncated)
            start[n] = terminated or truncated
            if start[n]:
                obs[n] = env.reset()[0]
    assert found[2].any()
    assert found[3].any()
    if memory == "none":
        network, params = parts.network, state.learner.params
        _, outputs, value = network.apply(params, (), rollout.obs, rollout.start)
        np.testing.assert_allclose(rollout.value, value, rtol=1e-5)
        expected = parts.policy.distribution(outputs).log_prob(rollout.action)
        np.testing.assert_allclose(rollout.log_prob, expected, rtol=1e-5)
        last = network.apply(params, (), finals[STEPS:].astype(np.float32), rollout.start)[2]
        cut = np.asarray(rollout.truncated)
        np.testing.assert_allclose(rollout.next_value[cut], np.asarray(last)[cut], rtol=1e-4)


class TupleWalk(PythonWalk):
    """`PythonWalk` with its observation in two parts."""

    observation_space = gymnasium.spaces.Tuple([gymnasium.spaces.Box(-20.0, 20.0, (1,))] * 2)

    def observed(self) -> Any:
        return tuple(np.float32([x]) for x in super().observed())


def test_a_tuple_of_observations_is_read_as_one_array():
    """Both environments lead to the same rollouts, including the values of last observations."""
    registry.pop(NAME)
    register(NAME, entry_point=TupleWalk, max_episode_steps=LIMIT)
    _, rollout, _ = collected(ppo.make_task(config()))
    registry.pop(NAME)
    register(NAME, entry_point=PythonWalk, max_episode_steps=LIMIT)
    _, expected, _ = collected(ppo.make_task(config()))
    assert np.asarray(expected.truncated).any()
    joined = np.concatenate([rollout.obs["0"], rollout.obs["1"]], axis=-1)
    np.testing.assert_allclose(joined, expected.obs, rtol=1e-6)
    for name in ("action", "reward", "terminated", "truncated", "value", "next_value"):
        found, wanted = getattr(rollout, name), getattr(expected, name)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=name)


def test_a_run_is_evaluated_and_resumed_with_new_episodes(tmp_path: Path, capsys: Any):
    run = tmp_path / "run"
    result = ppo.run(config(), run_dir=run, num_seeds=2, eval_episodes=5, progress=False)
    assert result.returns.shape == (2, 5)
    assert np.isfinite(result.returns).all()
    with pytest.warns(RunWarning, match="is not saved, so their episodes start again"):
        longer = ppo.resume(run, total_timesteps=8 * N * STEPS, progress=False)
    assert longer.metrics["policy_loss"].shape == (2, 8)
    assert main(["eval", str(run), "--episodes", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 3


def test_evaluation_counts_whole_episodes():
    """Returns of 40 episodes in 32 environments equal those of a loop over single ones."""
    task = ppo.make_task(config())
    call = task.evaluation_call
    assert call is not None
    state = jax.jit(task.learner(None).init)(jax.random.key(1), ppo.HParams(), ())
    question = call.ask(state, jax.random.key(2), 40, np.bool_(True), ())
    found = np.sort(call.answer(question))
    seed = int(jax.random.randint(jax.random.key(2), (), 0, 2**31 - 1))
    agent, key = ppo.make_agent(task, state), jax.random.key(0)  # not read for the mode
    expected = []
    for n in range(32):
        env = gymnasium.make(NAME)
        obs, _ = env.reset(seed=seed + n)
        for _ in range(2 if n < 8 else 1):
            total, over = 0.0, False
            while not over:
                action, _ = agent.act(key, obs[None].astype(np.float32), (), True)
                obs, reward, terminated, truncated, _ = env.step(int(action[0]))
                total, over = total + float(reward), terminated or truncated
            expected.append(total)
            obs, _ = env.reset()
    np.testing.assert_allclose(found, np.sort(expected), rtol=1e-5)


def test_images_are_of_the_policys_episodes(tmp_path: Path):
    """From the first state of an episode, a simulation of the rules with the policy's actions."""
    run = tmp_path / "run"
    ppo.run(config(), eval_episodes=2, progress=False, run_dir=run)
    frames = ppo.render(run, episodes=3, deterministic=True)
    shown = frames.reshape(len(frames), -1).view(np.float64)[:, :2]
    starts = np.flatnonzero(shown[:, 1] == 0)
    assert len(starts) == 3
    assert len(set(shown[starts, 0])) == 3
    agent = ppo.make_agent(config(), ppo.load(run).state)
    for first, end in zip(starts, [*starts[1:], len(shown)], strict=True):
        position, time = shown[first]
        for row in shown[first:end]:
            np.testing.assert_array_equal(row, [position, time])
            obs = np.array([[position, time]], np.float32)
            action, _ = agent.act(jax.random.key(0), obs, (), True)
            position, time = position + int(action[0]) - 1, time + 1
        assert position >= 2 or time == LIMIT


@pytest.mark.parametrize(
    ("render", "words"),
    [
        (lambda self: None, "has no render mode rgb_array"),
        (lambda self: 1 / 0, "cannot be drawn: division"),
    ],
)
def test_what_cannot_be_drawn(render: Any, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PythonWalk, "render", render)
    task = ppo.make_task(config())
    state = jax.jit(task.learner(None).init)(jax.random.key(1), ppo.HParams(), ())
    with pytest.raises(ppo.ConfigError, match=words):
        ppo.render_policy(task, state, jax.random.key(0))


def test_an_error_of_the_environment_keeps_the_state(tmp_path: Path, capsys: Any):
    capsys.readouterr()
    words = f"train gymnasium/{NAME} --env-params.breaks-after 40 --num-envs 3 --num-steps 16"
    more = "--num-minibatches 1 --total-timesteps 480 --hidden-sizes 8 --eval-episodes 2"
    run = tmp_path / "run"
    assert main([*words.split(), *more.split(), "--run-dir", str(run)]) == 1
    error = capsys.readouterr().err
    assert f"gymnasium/{NAME}: step failed: RuntimeError: the arm fell off" in error
    assert f"purejaxppo resume {run}" in error
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frame_stack": 2}, "frame_stack: have no effect"),
        ({"objective": "reinforce", "num_steps": 8}, "collects whole episodes of a compiled"),
        ({"env_id": "gymnasium/CartPol-v1"}, "did you mean gymnasium/CartPole-v1"),
        ({"env_params": {"no_such": 1}}, r"cannot be made: .*no_such"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        ppo.make_task(config(**changes))


def test_pure_functions_are_refused():
    task = ppo.make_task(config())
    with pytest.raises(ppo.ConfigError, match="is stepped in Python between compiled parts"):
        ppo.make_train(task)
    with pytest.raises(ppo.ConfigError, match="is stepped in Python between compiled parts"):
        ppo.make_learner(task)
    state = jax.jit(task.learner(None).init)(jax.random.key(1), ppo.HParams(), ())
    with pytest.raises(ppo.ConfigError, match="evaluation cannot be compiled"):
        ppo.evaluate(task, state, jax.random.key(0))
    with pytest.raises(ppo.ConfigError, match="is stepped in Python, on one device"):
        ppo.run(config(num_envs=4), devices=2)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"normalize_obs": True, "memory": "gru"}])
def test_cartpole_is_learned(changes: dict[str, Any]):
    learned = ppo.Config(
        env_id="gymnasium/CartPole-v1", num_envs=8, total_timesteps=100_000, **changes
    )
    hparams = ppo.HParams(learning_rate=1e-3)
    result = ppo.run(learned, hparams, num_seeds=3, eval_episodes=16, progress=False)
    assert np.nanmean(result.returns) > 300
