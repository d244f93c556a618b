"""Games of two players: both sides by one policy, and evaluations against an opponent."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.advantages import alternating, gae, td0
from purejaxppo.types import Rollout

pgx = pytest.importorskip("pgx", reason="the suite pgx is not installed")


def rollout(seed: int = 0, steps: int = 12, n: int = 5) -> Rollout:
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(3, steps, n)).astype(np.float32)
    flags = rng.random((2, steps, n)) < 0.2
    empty: Any = ()
    return Rollout(
        obs=(), start=empty, action=empty, log_prob=empty, value=jnp.asarray(numbers[0]),
        next_value=jnp.asarray(numbers[1]), reward=jnp.asarray(numbers[2]),
        terminated=jnp.asarray(flags[0]), truncated=jnp.asarray(flags[1]), mask=empty,
        carry=(), policy_outputs=(),
    )  # fmt: skip


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_advantages_change_their_sign_with_the_player(gae_lambda: float):
    """Against the recursion over single steps."""
    given, hparams = rollout(), ppo.HParams(gamma=0.9, gae_lambda=gae_lambda)
    found, target = alternating(gae)(given, hparams)
    r, v, after, terminated, truncated = (
        np.asarray(x) for x in (
            given.reward, given.value, given.next_value, given.terminated, given.truncated,
        )
    )  # fmt: skip
    for n in range(r.shape[1]):
        following = 0.0
        for t in reversed(range(len(r))):
            delta = r[t, n] - 0.9 * (1 - terminated[t, n]) * after[t, n] - v[t, n]
            over = terminated[t, n] or truncated[t, n]
            following = delta - 0.9 * gae_lambda * (1 - over) * following
            assert found[t, n] == pytest.approx(following, abs=1e-5)
            assert target[t, n] == pytest.approx(following + v[t, n], abs=1e-5)
    one_step, _ = alternating(td0)(given, hparams)
    expected = r - 0.9 * (1 - terminated) * after - v
    np.testing.assert_allclose(one_step, expected, rtol=1e-4, atol=1e-5)


CONFIG = ppo.Config(
    env_id="pgx/tic_tac_toe", num_envs=256, num_steps=32, total_timesteps=10_000_000,
    hidden_sizes=(128, 128), activation="relu", num_minibatches=8,
)  # fmt: skip
HPARAMS = ppo.HParams(learning_rate=1e-3, ent_coef=0.02, gamma=1.0, gae_lambda=1.0)


def winner(board: tuple[int, ...]) -> int:
    """1 or -1 if that side has three in a row, else 0."""
    lines = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]
    return next((board[a] for a, b, c in lines if board[a] and board[a] == board[b] == board[c]), 0)


def observation(board: tuple[int, ...], side: int) -> Any:
    """Pgx's observation of tic-tac-toe: own stones and those of the opponent."""
    cells = np.array(board).reshape(3, 3)
    planes = np.stack([cells == side, cells == -side], axis=-1).astype(np.float32)
    return {"observation": planes, "action_mask": np.array(board) == 0}


def games(policy: dict[Any, int], side: int) -> dict[str, int]:
    """Results of a deterministic policy against all sequences of the opponent's moves."""
    counts = {"won": 0, "drawn": 0, "lost": 0}

    def play(board: tuple[int, ...], mover: int) -> None:
        won = winner(board)
        if won or 0 not in board:
            counts["drawn" if not won else "won" if won == side else "lost"] += 1
            return
        free = [i for i, x in enumerate(board) if not x]
        for move in [policy[board]] if mover == side else free:
            play((*board[:move], mover, *board[move + 1 :]), -mover)

    play((0,) * 9, 1)
    return counts


def positions(side: int) -> list[tuple[int, ...]]:
    """All positions in which this side moves."""
    found: set[tuple[int, ...]] = set()

    def visit(board: tuple[int, ...], mover: int) -> None:
        if winner(board) or 0 not in board:
            return
        if mover == side:
            if board in found:
                return
            found.add(board)
        for move in [i for i, x in enumerate(board) if not x]:
            visit((*board[:move], mover, *board[move + 1 :]), -mover)

    visit((0,) * 9, 1)
    return sorted(found)


@pytest.mark.slow
def test_tic_tac_toe_is_learned_by_self_play():
    """Never loses to random moves in 1,000 games, and by enumeration to hardly any opponent."""
    result = ppo.run(CONFIG, HPARAMS, eval_episodes=1000, progress=False)
    assert (result.returns_deterministic >= 0).all()
    assert result.returns_deterministic.mean() > 0.8
    state = jax.tree.map(lambda x: x[0], result.states)
    agent = ppo.make_agent(CONFIG, state)
    for side in (1, -1):
        boards = positions(side)
        obs = jax.tree.map(lambda *x: np.stack(x), *[observation(x, side) for x in boards])
        moves, _ = agent.act(jax.random.key(0), obs, (), True)
        found = games(dict(zip(boards, map(int, moves), strict=True)), side)
        assert found["lost"] <= 0.02 * sum(found.values()), found


def test_the_evaluation_is_a_game_against_random_moves():
    """A policy that always takes the first free cell scores as in a simulation."""
    task = ppo.make_task(CONFIG)
    env: Any = task.parts(None).env.evaluation  # pyright: ignore
    n = 2000
    state, obs = env.reset(jax.random.split(jax.random.key(0), n))
    total, over = np.zeros(n), np.zeros(n, bool)
    step = jax.jit(env.step)
    for t in range(5):
        action = jnp.argmax(obs["action_mask"], axis=1)
        state, result = step(jax.random.split(jax.random.key(t), n), state, action)
        total += np.where(over, 0.0, result.reward)
        over |= np.asarray(result.terminated)
        obs = result.obs
    assert over.all()
    rng, expected = np.random.default_rng(0), []
    for game in range(4000):
        board, mover, side = [0] * 9, 1, 1 if game % 2 else -1
        while not winner(tuple(board)) and 0 in board:
            free = [i for i, x in enumerate(board) if not x]
            board[free[0] if mover == side else int(rng.choice(free))] = mover
            mover = -mover
        expected.append(winner(tuple(board)) * side)
    assert total.mean() == pytest.approx(np.mean(expected), abs=0.06)
    assert {-1.0, 0.0, 1.0} >= set(total.tolist())


def test_rewards_are_those_of_the_mover():
    """The last move of a won game earns 1, all others 0; a full board without three in a row 0."""
    task = ppo.make_task(CONFIG)
    parts: Any = task.parts(None)  # pyright: ignore
    state = jax.jit(task.learner(None).init)(jax.random.key(0), HPARAMS, ())
    _, found = jax.jit(parts.actor.collect)(state.learner, state.actors, HPARAMS, ())
    assert set(np.unique(found.reward)) == {0.0, 1.0}
    won = np.asarray(found.reward) > 0
    assert np.asarray(found.terminated)[won].all()
    planes = np.asarray(found.obs["observation"])
    last = planes[won]  # own stones before the winning move
    for own, action in zip(last[..., 0], np.asarray(found.action)[won], strict=True):
        board = own.ravel().astype(int)
        board[action] = 1
        assert winner(tuple(board)) == 1


FOURS = np.array([
    [7 * (row + i * down) + column + i * right for i in range(4)]
    for row in range(6) for column in range(7) for down, right in ((0, 1), (1, 0), (1, 1), (1, -1))
    if row + 3 * down < 6 and 0 <= column + 3 * right < 7
])  # fmt: skip
"""The cells of each line of four in connect four."""


def dropped(board: np.ndarray, column: int, side: int) -> np.ndarray:
    """The board `[42]` after a stone is dropped into a column."""
    cells = np.arange(column, 42, 7)
    new = board.copy()
    new[cells[board[cells] == 0].max()] = side
    return new


def searched(board: np.ndarray, side: int, depth: int) -> dict[int, int]:
    """Values of the moves within `depth` moves: 1 for a win, -1 for a loss, else 0."""
    found = {}
    for column in np.flatnonzero(board[:7] == 0) if depth else []:
        new = dropped(board, column, side)
        won = bool((new[FOURS] == side).all(axis=1).any())
        found[int(column)] = 1 if won else -max(searched(new, -side, depth - 1).values(), default=0)
    return found


def against_search(agent: ppo.Agent, count: int, depth: int) -> np.ndarray:
    """Results of games of connect four against a search, which begins in every other game."""
    rng, key = np.random.default_rng(0), jax.random.key(0)
    act = jax.jit(lambda obs: agent.act(key, obs, (), True)[0])
    boards, results = np.zeros((count, 42), int), np.zeros(count)
    own, over = np.where(np.arange(count) % 2, 1, -1), np.zeros(count, bool)
    for t in range(42):
        mover = 1 if t % 2 == 0 else -1
        planes = np.stack([boards == own[:, None], boards == -own[:, None]], axis=-1)
        obs = {"observation": planes.reshape(-1, 6, 7, 2).astype(np.float32),
               "action_mask": (boards[:, :7] == 0) | over[:, None]}  # fmt: skip
        moves = np.asarray(act(obs))
        for n in np.flatnonzero(~over):
            move = int(moves[n])
            if own[n] != mover:
                values = searched(boards[n], mover, depth)
                move = int(rng.choice([x for x in values if values[x] == max(values.values())]))
            boards[n] = dropped(boards[n], move, mover)
            if (boards[n][FOURS] == mover).all(axis=1).any():
                over[n], results[n] = True, mover * own[n]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("opponent", ["self", "pool"])
def test_connect_four_is_learned(opponent: Any):
    """Against a player who wins if one move suffices, and else moves at random."""
    config = dataclasses.replace(
        CONFIG, env_id="pgx/connect_four", total_timesteps=2_000_000, encoder="mlp",
        opponent=opponent,
    )  # fmt: skip
    hparams = dataclasses.replace(HPARAMS, gae_lambda=0.95)
    result = ppo.run(config, hparams, eval_episodes=1000, progress=False)
    assert result.returns_deterministic.mean() > 0.8
    agent = ppo.make_agent(config, jax.tree.map(lambda x: x[0], result.states))
    results = against_search(agent, 100, 1)
    assert (results > 0).mean() > 0.7


def test_the_search_wins_and_does_not_lose_at_once():
    board = np.zeros(42, int)
    for column in (0, 0, 0):
        board = dropped(board, column, 1)
    assert searched(board, 1, 1)[0] == 1
    assert {x for x, value in searched(board, -1, 2).items() if value == 0} == {0}


POOL = ppo.Config(
    env_id="pgx/tic_tac_toe", num_envs=64, num_steps=24, total_timesteps=64 * 24 * 6,
    hidden_sizes=(8,), num_minibatches=2, update_epochs=1, opponent="pool", opponent_pool=2,
    opponent_every=2,
)  # fmt: skip


def started(config: ppo.Config) -> tuple[Any, Any, Any]:
    """The task, its parts and its first state."""
    task = ppo.make_task(config)
    made: Any = task.parts(None)  # pyright: ignore
    return task, made, jax.jit(task.learner(None).init)(jax.random.key(0), HPARAMS, ())


def test_each_opponent_of_the_pool_plays_in_its_environments():
    """Opponents that prefer one cell, each another, against a simulation of the rules."""
    _, made, state = started(POOL)
    match = state.actors.env_state
    favourites = np.array([4, 8])
    bias = 50.0 * jax.nn.one_hot(favourites, 9)
    pool = match.pool | {"actor_head": match.pool["actor_head"] | {"bias": bias}}
    reset = jax.jit(made.env.reset)(jax.random.split(jax.random.key(5), POOL.num_envs))
    games = reset[0]._replace(pool=pool)
    obs, boards = reset[1], np.zeros((POOL.num_envs, 9), int)
    step, rng = jax.jit(made.env.step), np.random.default_rng(0)
    began = []
    for t in range(POOL.num_steps):
        planes = np.asarray(obs["observation"]).reshape(-1, 9, 2)
        boards = planes[..., 0].astype(int) - planes[..., 1].astype(int)
        action = np.array([rng.choice(np.flatnonzero(x)) for x in np.asarray(obs["action_mask"])])
        games, found = step(jax.random.split(jax.random.key(t), POOL.num_envs), games, action)
        after = np.asarray(found.obs["observation"]).reshape(-1, 9, 2)
        for n, board in enumerate(boards):
            board[action[n]] = 1
            won, free = winner(tuple(board)) == 1, np.flatnonzero(board == 0)
            if won or not len(free):
                assert (found.reward[n], bool(found.terminated[n])) == (float(won), True)
            elif found.terminated[n]:
                lost = [board.copy() for _ in free]
                for other, cell in zip(lost, free, strict=True):
                    other[cell] = -1
                outcomes = {winner(tuple(x)) for x in lost if winner(tuple(x)) or 0 not in x}
                assert float(found.reward[n]) in outcomes
            else:
                now = after[n, :, 0].astype(int) - after[n, :, 1].astype(int)
                (changed,) = np.flatnonzero(now != board)
                assert now[changed] == -1
                favourite = favourites[n // (POOL.num_envs // 2)]
                assert changed == favourite or board[favourite]
                assert found.reward[n] == 0
            if found.terminated[n]:
                began.append(after[n, :, 1].sum())
                assert after[n, :, 0].sum() == 0
        obs = found.obs
    assert len(began) > 200
    assert np.mean(began) == pytest.approx(0.5, abs=0.15)


def test_the_pool_holds_earlier_versions():
    """Before updates 0, 2 and 4 the policy enters slots 0, 1 and 0."""
    task, _, state = started(POOL)
    update, before = jax.jit(task.learner(None).update), []
    for _ in range(6):
        before.append(state.learner.params)
        state, _ = update(state, HPARAMS, ())
    for slot, when in ((0, 4), (1, 2)):
        held = jax.tree.map(lambda x, slot=slot: x[slot], state.actors.env_state.pool)
        jax.tree.map(np.testing.assert_array_equal, held, before[when])
    assert np.isfinite(ppo.evaluate(task, state, jax.random.key(1), 8)).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "reinforce"}, "rewards of an episode, but in pgx/tic_tac_toe they belong"),
        ({"memory": "gru"}, "the memory would see both players' views"),
        ({"frame_stack": 2}, "cannot change pgx/tic_tac_toe, a game of two players"),
        ({"env_id": "pgx/kuhn_poker"}, "has hidden information"),
        ({"env_id": "CartPole-v1", "opponent": "pool"}, "CartPole-v1 has no second player"),
        ({"opponent": "pool", "num_envs": 6}, "must be a multiple of opponent_pool = 4"),
        ({"opponent": "pool", "num_envs": 8, "normalize_obs": True}, "do not store the statistics"),
        ({"opponent_pool": 2}, "has no effect with opponent = self"),
    ],
)
def test_settings_that_do_not_fit_a_game(changes: dict[str, Any], words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        ppo.make_task(ppo.Config(**{"env_id": "pgx/tic_tac_toe"} | changes))
