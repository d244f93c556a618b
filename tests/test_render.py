"""Pictures of environments, and episodes of trained policies as images and files."""

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.classic_control.cartpole import CartPole
from PIL import Image, ImageSequence
from toy_envs import ConstantChain

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.config import ConfigError
from purejaxppo.envs import available_environments, drawings
from purejaxppo.envs.drawings import CELL, CHANNELS, FLOOR, drawing_of
from purejaxppo.envs.registry import make_environment
from purejaxppo.envs.suites import is_installed
from purejaxppo.host import render as rendering
from purejaxppo.host import video

TINY = ppo.Config(
    total_timesteps=32, num_envs=4, num_steps=8, update_epochs=1, num_minibatches=1,
    hidden_sizes=(8,),
)  # fmt: skip


def picture(name: str, state: Any = None, **changes: Any) -> np.ndarray:
    """The drawing of a state of gymnax's environment, with changed fields."""
    env, params = gymnax.make(name)
    if state is None:
        state = env.reset(jax.random.key(0), params)[1]
    draw = drawing_of(env, params)
    assert draw is not None
    return draw(state.replace(**changes))


def where(image: np.ndarray, colour: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a colour."""
    rows, columns = np.nonzero((image == np.array(colour)).all(-1))
    assert rows.size, f"no pixel is {colour}"
    return rows, columns


def cells(image: np.ndarray, size: int = CELL) -> np.ndarray:
    """The colours of the centres of a grid's cells."""
    return image[size // 2 :: size, size // 2 :: size]


@pytest.mark.parametrize(("x", "theta"), [(0.0, 0.0), (-1.5, 0.2), (2.0, -0.2), (0.7, 1.4)])
def test_cartpole_has_its_cart_and_pole_where_the_state_says(x: float, theta: float):
    image = picture("CartPole-v1", x=x, theta=theta)
    scale = image.shape[1] / 5.4  # the track from -2.4 to 2.4, and 0.3 on both sides
    rows, columns = where(image, drawings.CART)
    middle = (columns.min() + columns.max() + 1) / 2
    assert abs(middle / scale - 2.7 - x) < 0.02
    axle_row = rows.max() + 1 - 0.15 * scale
    rows, columns = where(image, drawings.POLE)
    right, up = (columns + 0.5 - middle) / scale, (axle_row - rows - 0.5) / scale
    along = right * np.sin(theta) + up * np.cos(theta)
    aside = right * np.cos(theta) - up * np.sin(theta)
    assert abs(along.max() - 1.0) < 0.07  # the pole's length, and its round end
    assert np.abs(aside).max() < 0.07


@pytest.mark.parametrize("position", [-1.1, -0.5, 0.3])
@pytest.mark.parametrize("name", ["MountainCar-v0", "MountainCarContinuous-v0"])
def test_mountain_car_is_above_the_hill(name: str, position: float):
    image = picture(name, position=position)
    scale = image.shape[1] / 2.0  # from -1.3 to 0.7
    rows, columns = where(image, drawings.CART)
    assert abs((columns.mean() + 0.5) / scale - 1.3 - position) < 0.08
    height = (image.shape[0] - rows.mean()) / scale - (0.45 * np.sin(3 * position) + 0.55)
    assert 0 < height < 0.12
    goal = float(gymnax.make(name)[1].goal_position)
    assert abs(where(image, drawings.GOAL)[1].min() / scale - 1.3 - goal) < 0.03


@pytest.mark.parametrize(
    ("theta", "end"), [(0.0, (0, 1)), (np.pi, (0, -1)), (np.pi / 2, (-1, 0)), (-1.0, None)]
)
def test_pendulum_turns_counterclockwise(theta: float, end: Any):
    image = picture("Pendulum-v1", theta=jnp.float32(theta), last_u=jnp.float32(0))
    end = (-np.sin(theta), np.cos(theta)) if end is None else end
    half = image.shape[0] / 2

    def at(distance: float) -> list[int]:
        row, column = half * (1 - distance * end[1] / 1.3), half * (1 + distance * end[0] / 1.3)
        return image[int(row), int(column)].tolist()

    assert at(0.95) == at(0.5) == list(drawings.POLE)
    assert at(1.2) == at(-0.3) == list(drawings.PAPER)


def test_pendulum_shows_the_direction_of_the_torque():
    torques = [picture("Pendulum-v1", last_u=jnp.float32(u)) for u in (2.0, -2.0)]
    left, right = (where(image, drawings.ENEMY)[1].mean() for image in torques)
    assert left < torques[0].shape[1] / 2 < right


def test_acrobot_reaches_the_line_where_the_episode_ends():
    env, params = gymnax.make("Acrobot-v1")
    state = env.reset(jax.random.key(0), params)[1]
    rng, ended = np.random.default_rng(0), 0
    for first, second in rng.uniform(-np.pi, np.pi, (60, 2)):
        height = -np.cos(first) - np.cos(first + second)
        if abs(height - 1) < 0.15:
            continue
        now = state.replace(joint_angle1=first, joint_angle2=second)
        image = picture("Acrobot-v1", now)
        line = where(image, drawings.GOAL)[0].mean()
        above = where(image, drawings.POLE)[0].min() < line - 0.1 * image.shape[0] / 4.4
        assert above == bool(env.is_terminated(now, params)), (first, second)
        ended += above
    assert 3 < ended < 57


_slow = pytest.mark.slow


@pytest.mark.parametrize(
    "game",
    [
        "Breakout",
        "SpaceInvaders",
        *(pytest.param(game, marks=_slow) for game in ("Asterix", "Freeway", "Seaquest")),
    ],
)
def test_minatar_cells_have_the_colours_of_the_observation(game: str):
    env, params = gymnax.make(f"{game}-MinAtar")
    draw = drawing_of(env, params)
    assert draw is not None
    step = jax.jit(env.step_env)
    obs, state = env.reset(jax.random.key(1), params)
    seen = set()
    for key in jax.random.split(jax.random.key(2), 30):
        found = cells(draw(state))
        for row, column in np.ndindex(10, 10):
            flags = np.asarray(obs)[row, column]
            first = next((i for i, flag in enumerate(flags) if flag), None)
            colour = FLOOR if first is None else CHANNELS[first]
            assert tuple(found[row, column]) == colour, (row, column, flags)
            seen.add(first)
        obs, state, *_ = step(key, state, env.action_space(params).sample(key), params)
    assert len(seen) >= 4


def test_grids_mark_the_cells_of_the_observation():
    env, params = gymnax.make("Catch-bsuite")
    obs, state = env.reset(jax.random.key(3), params)
    marked = (cells(picture("Catch-bsuite", state)) != FLOOR).any(-1)
    np.testing.assert_array_equal(marked, np.asarray(obs) > 0)
    env, params = gymnax.make("DeepSea-bsuite")
    state = env.reset(jax.random.key(0), params)[1].replace(row=5, column=2)
    diver = (cells(picture("DeepSea-bsuite", state)) == drawings.ENEMY).all(-1)
    np.testing.assert_array_equal(diver, np.asarray(env.get_obs(state)) > 0)
    env, params = gymnax.make("FourRooms-misc", use_visual_obs=True)
    obs, state = env.reset(jax.random.key(0), params)
    found = cells(picture("FourRooms-misc", state))
    np.testing.assert_array_equal((found == drawings.WALL).all(-1), np.asarray(obs[..., 0]) > 0)
    places = [np.argwhere((found == x).all(-1)) for x in (drawings.CART, drawings.GOAL)]
    np.testing.assert_array_equal(np.concatenate(places), [state.pos, state.goal])


def test_frozen_lake_is_drawn_as_its_map():
    env, params = gymnax.make("FrozenLake-misc")
    state = env.reset(jax.random.key(0), params)[1].replace(position=6)
    found = cells(picture("FrozenLake-misc", state), 2 * CELL)
    named = {drawings.GREY: "S", drawings.INK: "H", drawings.GOAL: "G", drawings.ENEMY: "x"}
    rows = ["".join(named.get(tuple(c), "F") for c in row.tolist()) for row in found]
    assert rows == ["SFFF", "FHxH", "FFFH", "HFFG"]


def test_pong_is_drawn_as_it_is_observed():
    env, params = gymnax.make("Pong-misc")
    obs, state = env.reset(jax.random.key(0), params)
    found = picture("Pong-misc", state)[4::8, 4::8]
    np.testing.assert_array_equal((found != FLOOR).any(-1), np.asarray(obs).any(-1))


@pytest.mark.parametrize("name", ["Reacher-misc", "Swimmer-misc", "PointRobot-misc"])
def test_goals_are_drawn_where_they_are(name: str):
    goal = jnp.array([0.4, 0.9])
    field = "goal" if name == "PointRobot-misc" else "goal_xy"
    image = picture(name, **{field: goal})
    half, top = {"Reacher-misc": (3, 3), "Swimmer-misc": (2, 2), "PointRobot-misc": (1.5, 1.5)}[
        name
    ]
    rows, columns = where(image, drawings.GOAL)
    scale = image.shape[1] / (2 * half)
    found = (
        (columns.max() + columns.min() + 1) / 2 / scale - half,
        top - (rows.mean() + 0.5) / scale,
    )
    np.testing.assert_allclose(found, goal, atol=0.06)


def test_a_board_game_is_drawn_to_its_end():
    """Each move changes one of the nine cells; the last image is of the final position."""
    pytest.importorskip("pgx", reason="the suite pgx is not installed")
    config = ppo.Config(env_id="pgx/tic_tac_toe", num_envs=2, num_steps=4, num_minibatches=1)
    frames = ppo.render_policy(config, untrained(config), jax.random.key(0), 2)
    board = frames[:, 30:210, 30:210].reshape(-1, 3, 60, 3, 60, 3)
    cells = board.swapaxes(2, 3)[:, :, :, 4:-4, 4:-4]  # without the lines between them
    changed = (cells[1:] != cells[:-1]).any((3, 4, 5)).sum((1, 2))
    (end,) = np.flatnonzero(changed != 1)  # where the second game begins
    assert 6 <= end + 1 <= 10
    np.testing.assert_array_equal(frames[0], frames[end + 1])
    empty = cells[0, 1, 1].tobytes()
    for last in (cells[end], cells[-1]):
        kinds = [[cell.tobytes() for cell in row] for row in last]
        rows = [*kinds, *zip(*kinds, strict=True)]
        rows += [[kinds[i][i] for i in range(3)], [kinds[i][2 - i] for i in range(3)]]
        won = any(len(set(row)) == 1 and row[0] != empty for row in rows)
        full = all(empty not in row for row in kinds)
        assert won or full


def test_environments_without_an_obvious_picture_have_none():
    names = available_environments("gymnax/")
    none = {n for n in names if make_environment(ppo.Config(env_id=n)).render is None}
    assert none == {
        "MemoryChain-bsuite", "UmbrellaChain-bsuite", "DiscountingChain-bsuite",
        "SimpleBandit-bsuite", "BernoulliBandit-misc", "GaussianBandit-misc",
    }  # fmt: skip


class Timed(ConstantChain):
    """Episodes of 5 steps, drawn as the number of the step."""

    def render(self, state: Any, params: Any) -> np.ndarray:
        return np.full((2, 3, 3), 10 * int(state.time), np.uint8)


class Coded(CartPole):
    """CartPole whose picture is its state, byte by byte."""

    def render(self, state: Any, params: Any) -> np.ndarray:
        numbers = np.array([state.x, state.x_dot, state.theta, state.theta_dot], np.float32)
        return np.frombuffer(numbers.tobytes() + b"xx", np.uint8).reshape(1, 6, 3)


def states_of(frames: np.ndarray) -> np.ndarray:
    """The states `[T, 4]` that `Coded` drew."""
    return np.stack([np.frombuffer(frame.tobytes()[:16], np.float32) for frame in frames])


def untrained(config: ppo.Config, **given: Any) -> ppo.TrainState:
    return ppo.make_learner(config, **given).init(jax.random.key(0), ppo.HParams())


def test_one_image_per_step_of_each_episode(monkeypatch: pytest.MonkeyPatch):
    env = Timed()
    state = untrained(TINY, env=env)

    def times(episodes: int, **options: Any) -> list[int]:
        key = jax.random.key(1)
        frames = ppo.render_policy(TINY, state, key, episodes, env=env, **options)
        assert frames.shape[1:] == (2, 3, 3)
        assert frames.dtype == np.uint8
        return (frames[:, 0, 0, 0] // 10).tolist()

    assert times(2) == [0, 1, 2, 3, 4] * 2
    monkeypatch.setattr(rendering, "CHUNK", 2)
    assert times(2) == [0, 1, 2, 3, 4] * 2
    assert times(3, max_steps=3) == [0, 1, 2] * 3


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two seeds."""
    folder = tmp_path_factory.mktemp("render") / "cartpole"
    ppo.run(TINY, num_seeds=2, run_dir=folder, eval_episodes=2, progress=False)
    return folder


def test_episodes_are_those_of_the_seeds_policy(cartpole: Path):
    env, key = Coded(), rendering.rollout_key(3, 1)
    state = ppo.load(cartpole, seed=1).state
    frames = ppo.render_policy(TINY, state, key, 2, env=env, deterministic=True)
    states = states_of(frames)
    agent = ppo.make_agent(TINY, state)

    def follow(x: jax.Array) -> Any:
        action, _ = agent.act(key, x[None], (), deterministic=True)
        now = env.reset_env(key, env.default_params)[1].replace(
            x=x[0], x_dot=x[1], theta=x[2], theta_dot=x[3]
        )
        obs, _, _, ended, _ = env.step_env(key, now, action[0], env.default_params)
        return obs, ended

    found, ended = jax.jit(jax.vmap(follow))(states)
    last = np.flatnonzero(ended)
    assert len(last) == 2
    assert last[1] == len(states) - 1
    within = ~np.asarray(ended)
    np.testing.assert_allclose(found[within], states[1:][within[:-1]], atol=1e-5)
    assert np.abs(states[[0, last[0] + 1]]).max() <= 0.05  # where CartPole starts
    drawn = ppo.render(cartpole, seed=1, rollout_seed=3, episodes=2, deterministic=True)
    assert len(drawn) == len(states)
    for t in (0, 5, last[0], last[0] + 1, last[1]):
        x, _, theta, _ = states[t]
        np.testing.assert_array_equal(drawn[t], picture("CartPole-v1", x=x, theta=theta))


def test_memory_is_kept_over_the_steps_of_an_episode():
    """A policy with a memory acts as it does step by step in a loop of one's own."""
    config = ppo.Config(**{**vars(TINY), "memory": "gru", "memory_size": 4})
    env, params, key = Coded(), CartPole().default_params, jax.random.key(0)
    state = untrained(config, env=env)
    frames = ppo.render_policy(config, state, key, env=env, deterministic=True, max_steps=8)
    agent = ppo.make_agent(config, state, env=env)
    now, carry = env.reset(key, params)[1], agent.initial_carry(1)
    x = states_of(frames)[0]
    now = now.replace(x=x[0], x_dot=x[1], theta=x[2], theta_dot=x[3])
    act = jax.jit(lambda x, carry: agent.act(key, x[None], carry, deterministic=True))
    step = jax.jit(env.step_env)
    for expected in states_of(frames):
        x = np.array([now.x, now.x_dot, now.theta, now.theta_dot])
        np.testing.assert_allclose(x, expected, atol=1e-5)
        action, carry = act(x, carry)
        _, now, _, _, _ = step(key, now, action[0], params)


def test_the_gif_holds_the_images(cartpole: Path, tmp_path: Path, capsys: Any):
    file = tmp_path / "x.gif"
    options = "--episodes 2 --rollout-seed 3 --fps 20 --max-steps 15".split()
    assert main(["render", str(cartpole), str(file), *options]) == 0
    expected = ppo.render(cartpole, episodes=2, rollout_seed=3, max_steps=15)
    assert f"x.gif: {len(expected)} images" in capsys.readouterr().out
    shown = []
    for image in ImageSequence.Iterator(Image.open(file)):
        # Equal images in succession are one that is shown for longer.
        times = image.info["duration"] / 50
        assert times == round(times)
        shown.extend([np.asarray(image.convert("RGB"))] * round(times))
    np.testing.assert_array_equal(np.stack(shown), expected)
    page = tmp_path / "x.html"
    assert main(["render", str(cartpole), str(page), *options]) == 0
    text = page.read_text(encoding="utf-8")
    assert base64.b64encode(file.read_bytes()).decode() in text
    assert base64.b64encode((cartpole / "learning_curve.png").read_bytes()).decode() in text
    updates = ppo.load(cartpole).state.learner.updates
    assert f"2 episodes of seed 0 after {updates} updates, sampled actions." in text


def test_a_page_of_a_run_with_a_damaged_summary(cartpole: Path, tmp_path: Path, capsys: Any):
    run = tmp_path / "run"
    shutil.copytree(cartpole, run)
    summary = (run / "summary.json").read_text()
    (run / "summary.json").write_text(summary.replace("env_steps", "env_stops", 1))
    options = "--episodes 1 --max-steps 2".split()
    assert main(["render", str(run), str(tmp_path / "x.html"), *options]) == 0
    assert "has changed since it was written; the page is without" in capsys.readouterr().err
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "environment steps" not in text
    assert 'id="policy"' in text


def test_a_gif_of_many_colours_is_close(tmp_path: Path):
    frames = np.zeros((3, 40, 40, 3), np.uint8)
    frames[..., 0] = 6 * np.arange(40)[:, None]
    frames[..., 1] = 6 * np.arange(40)
    frames[1] = 255 - frames[1]
    assert video.write_video(tmp_path / "x.gif", frames, 10) == 3
    images = ImageSequence.Iterator(Image.open(tmp_path / "x.gif"))
    found = np.stack([np.asarray(image.convert("RGB")) for image in images])[[0, 1, 2]]
    assert np.abs(found.astype(int) - frames).mean() < 6


def test_the_mp4_holds_the_images(tmp_path: Path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = np.zeros((7, 33, 47, 3), np.uint8)
    for t, frame in enumerate(frames):
        frame[:, :24] = 30 * t
        frame[:, 24:] = 255 - 30 * t
    assert video.write_video(tmp_path / "x.mp4", frames, 25) == 7
    reader = ffmpeg.read_frames(str(tmp_path / "x.mp4"))
    about = next(reader)
    assert about["fps"] == 25
    assert about["size"] == (48, 34)
    found = np.stack([np.frombuffer(x, np.uint8).reshape(34, 48, 3) for x in reader])
    assert len(found) == 7
    for part in (np.s_[:, :33, 2:20], np.s_[:, :33, 28:45]):
        assert np.abs(found[part].astype(int) - frames[part]).mean() < 8


def test_errors_of_the_command(cartpole: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    def fails(words: str, file: str, *options: str) -> None:
        assert main(["render", str(cartpole), str(tmp_path / file), *options]) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out

    (tmp_path / "there.gif").touch()
    fails("already exists; choose another name", "there.gif")
    fails("must end in .gif, .mp4 or .html", "x.avi")
    fails("fps = 60: a GIF can have at most 50; write an .mp4", "x.gif", "--fps", "60")
    fails("fps = 0: must be at least 1", "x.gif", "--fps", "0")
    fails("episodes = 0: must be at least 1", "x.gif", "--episodes", "0")
    fails("max_steps = 0: must be at least 1", "x.gif", "--max-steps", "0")
    fails("seed = 7: the seeds are 0 to 1", "x.gif", "--seed", "7")
    fails("checkpoint = 'last': must be newest, best", "x.gif", "--checkpoint", "last")
    fails("is not a sweep; leave out --trial", "x.gif", "--trial", "best")
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    fails("pip install 'purejaxppo[video]'", "x.mp4")
    assert main(["render", str(cartpole)]) == 2
    assert "render needs FILE, as in `purejaxppo render RUN_DIR FILE`" in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))
    assert main(["render", str(cartpole), str(tmp_path / "no" / "x.gif"), "--max-steps=1"]) == 1
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_errors_of_the_functions(cartpole: Path):
    nothing: Any = None
    config = ppo.Config(**{**vars(TINY), "env_id": "MemoryChain-bsuite"})
    with pytest.raises(ConfigError, match="env MemoryChain-bsuite has no renderer; pass an"):
        ppo.render_policy(config, nothing, jax.random.key(0))
    with pytest.raises(ConfigError, match="seed = 2: the run has seeds 0 to 1"):
        ppo.render(cartpole, seed=2)
    for name in ("episodes", "max_steps"):
        given: Any = {name: 0}
        with pytest.raises(ConfigError, match=f"{name} = 0"):
            ppo.render(cartpole, **given)
    env = Timed()
    state = untrained(TINY, env=env)
    for image, words in (
        (np.zeros((2, 2, 3)), r"returns float64\[2, 2, 3\]; return an image \[H, W, 3\]"),
        (np.zeros((2, 2), np.uint8), r"returns uint8\[2, 2\]; return an image"),
    ):
        env.render = lambda state, params, image=image: image
        with pytest.raises(ConfigError, match=words):
            ppo.render_policy(TINY, state, jax.random.key(0), env=env)
    env.render = lambda state, params: np.zeros((1 + int(state.time), 2, 3), np.uint8)
    with pytest.raises(ConfigError, match="return images of one shape"):
        ppo.render_policy(TINY, state, jax.random.key(0), env=env)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "egl"), ({"DISPLAY": ":0"}, None), ({"MUJOCO_GL": "osmesa"}, "osmesa")],
)
def test_mujoco_renders_off_screen_without_a_display(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mujoco.rendering.classic.gl_context", raising=False)
    rendering.use_offscreen_gl()
    assert os.environ.get("MUJOCO_GL") == expected


def test_pillow_is_imported_only_for_drawing():
    code = (
        "import sys, purejaxppo; from purejaxppo.envs import drawings; purejaxppo.render; "
        "assert 'PIL' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SUITES = (
    "brax/inverted_pendulum", "craftax/Craftax-Classic-Symbolic-v1", "jumanji/Snake-v1",
    "jumanji/BinPack-v2", "jumanji/Connector-v3", "jumanji/FlatPack-v0", "jumanji/JobShop-v0",
    "jumanji/PacMan-v1", "jumanji/RubiksCube-v0", "jumanji/SearchAndRescue-v0",
    "jumanji/GraphColoring-v1", "navix/Navix-DoorKey-5x5-v0", "pgx/2048", "pgx/chess",
    "pgx/minatar-breakout", "playground/CartpoleBalance", "xminigrid/MiniGrid-DoorKey-5x5",
)  # fmt: skip


@_slow
@pytest.mark.parametrize("name", SUITES)
def test_suites_draw_states_that_differ(name: str):
    if not is_installed(name.partition("/")[0]):
        pytest.skip(f"the suite of {name} is not installed")
    config = ppo.Config(**{**vars(TINY), "env_id": name, "network": "auto"})
    frames = ppo.render_policy(config, untrained(config), jax.random.key(0), max_steps=8)
    assert len(np.unique(frames[0].reshape(-1, 3), axis=0)) > 2
    assert any((frame != frames[0]).any() for frame in frames[1:])
