"""Pictures of the states of gymnax's environments and of Pgx's games, drawn without a display."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from purejaxppo.types import PyTree

Colour = tuple[int, int, int]
Point = tuple[float, float]
Drawing = Callable[[Any, Any, Any], np.ndarray]
"""`(env, params, state) -> image [H, W, 3]`."""

WIDTH = 320
"""Pixels of the pictures in world coordinates."""
FINER = 3
"""Shapes are drawn this many times as large and then averaged, for smooth edges."""
CELL = 24
"""Pixels of a cell of a grid."""
PAPER, INK, GREY = (250, 250, 250), (40, 44, 52), (150, 154, 162)
CART, POLE, GOAL = (52, 101, 164), (204, 119, 34), (46, 139, 87)
FLOOR, WALL, AGENT, ENEMY = (24, 26, 32), (110, 114, 124), (80, 200, 255), (255, 90, 90)
CHANNELS: tuple[Colour, ...] = (
    AGENT, ENEMY, (96, 98, 112), (245, 190, 65), (240, 240, 240), (255, 130, 200),
    (170, 120, 255), (60, 130, 220), (90, 210, 130), (190, 230, 90),
)  # fmt: skip
"""Colours of MinAtar's channels; the first channel that is set in a cell colours it."""


class _Canvas:
    """A picture in world coordinates, in which y points up."""

    def __init__(self, left: float, right: float, bottom: float, top: float):
        from PIL import Image, ImageDraw

        self.scale = FINER * WIDTH / (right - left)
        self.left, self.top = left, top
        height = 2 * round(WIDTH * (top - bottom) / (right - left) / 2)
        self.picture = Image.new("RGB", (FINER * WIDTH, FINER * height), PAPER)
        self.draw = ImageDraw.Draw(self.picture)

    def pixel(self, point: Point) -> Point:
        return (point[0] - self.left) * self.scale, (self.top - point[1]) * self.scale

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.draw.polygon([self.pixel(point) for point in points], fill=colour)

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        (x, y), r = self.pixel(centre), radius * self.scale
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """A line with round ends, `width` wide in world coordinates."""
        pixels = [self.pixel(point) for point in points]
        self.draw.line(pixels, fill=colour, width=round(width * self.scale), joint="curve")
        for end in (points[0], points[-1]):
            self.disc(end, width / 2, colour)

    def image(self) -> np.ndarray:
        return np.asarray(self.picture.reduce(FINER))


def drawing_of(env: Any, params: Any) -> Callable[[PyTree], np.ndarray] | None:
    """`state -> image` for an environment of gymnax itself, None for any other and for those
    without an obvious picture."""
    cls = type(env)
    if not cls.__module__.startswith("gymnax.environments."):
        return None
    found = _DRAWINGS.get(cls.__name__)
    return None if found is None else partial(found, env, params)


def cartpole(env: Any, params: Any, state: Any) -> np.ndarray:
    x, theta = float(state.x), float(state.theta)
    half, length = float(params.x_threshold) + 0.3, 2 * float(params.length)
    canvas = _Canvas(-half, half, -0.6, length + 0.4)
    canvas.line([(-half, -0.15), (half, -0.15)], 0.02, INK)
    canvas.polygon(_box(x, 0.0, 0.5, 0.3), CART)
    canvas.line([(x, 0.0), (x + length * np.sin(theta), length * np.cos(theta))], 0.09, POLE)
    canvas.disc((x, 0.0), 0.04, INK)
    return canvas.image()


def _box(x: float, y: float, width: float, height: float, angle: float = 0.0) -> list[Point]:
    """The corners of a rectangle around a point, turned counterclockwise."""
    cos, sin = np.cos(angle), np.sin(angle)
    corners = [(sx * width / 2, sy * height / 2) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    return [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in corners]


def mountain_car(env: Any, params: Any, state: Any) -> np.ndarray:
    low, high, x = float(params.min_position), float(params.max_position), float(state.position)
    left, right = low - 0.1, high + 0.1
    canvas = _Canvas(left, right, 0.0, 1.3)
    hill = [(p, _hill(p)) for p in np.linspace(left, right, 100)]
    canvas.polygon([(left, 0.0), *hill, (right, 0.0)], (226, 222, 212))
    canvas.line(hill, 0.012, INK)
    goal = float(params.goal_position)
    canvas.line([(goal, _hill(goal)), (goal, _hill(goal) + 0.24)], 0.012, INK)
    flag = [(goal, _hill(goal) + y) for y in (0.24, 0.14)]
    canvas.polygon([*flag, (goal + 0.1, _hill(goal) + 0.19)], GOAL)
    slope = np.arctan(0.45 * 3 * np.cos(3 * x))
    canvas.polygon(_box(*_above_hill(x, slope, 0.0, 0.075), 0.15, 0.06, slope), CART)
    for side in (-0.045, 0.045):
        canvas.disc(_above_hill(x, slope, side, 0.03), 0.028, INK)
    return canvas.image()


def _hill(x: float) -> float:
    return 0.45 * np.sin(3 * x) + 0.55


def _above_hill(x: float, slope: float, along: float, above: float) -> Point:
    cos, sin = np.cos(slope), np.sin(slope)
    return x + along * cos - above * sin, _hill(x) + along * sin + above * cos


def pendulum(env: Any, params: Any, state: Any) -> np.ndarray:
    theta, length = float(state.theta), float(params.l)
    half = 1.3 * length
    canvas = _Canvas(-half, half, -half, half)
    canvas.line([(0.0, 0.0), (-length * np.sin(theta), length * np.cos(theta))], 0.18, POLE)
    canvas.disc((0.0, 0.0), 0.06, INK)
    part = float(np.clip(state.last_u / params.max_torque, -1, 1))
    if abs(part) > 0.02:  # the torque, as an arc in its direction
        angles = np.pi / 2 + np.linspace(0, 0.8 * np.pi * part, 24)
        arc = [(0.35 * length * np.cos(a), 0.35 * length * np.sin(a)) for a in angles]
        canvas.line(arc, 0.03, ENEMY)
        canvas.disc(arc[-1], 0.05, ENEMY)
    return canvas.image()


def acrobot(env: Any, params: Any, state: Any) -> np.ndarray:
    first = float(state.joint_angle1)
    second = first + float(state.joint_angle2)
    one, two = float(params.link_length_1), float(params.link_length_2)
    half = one + two + 0.2
    canvas = _Canvas(-half, half, -half, half)
    canvas.line([(-half, 1.0), (half, 1.0)], 0.02, GOAL)
    elbow = (one * np.sin(first), -one * np.cos(first))
    end = (elbow[0] + two * np.sin(second), elbow[1] - two * np.cos(second))
    for link, colour in (([(0.0, 0.0), elbow], CART), ([elbow, end], POLE)):
        canvas.line(link, 0.16, colour)
    for joint in ((0.0, 0.0), elbow):
        canvas.disc(joint, 0.06, INK)
    return canvas.image()


def reacher(env: Any, params: Any, state: Any) -> np.ndarray:
    angles = np.asarray(state.angles)
    half = 1.5 * len(angles)
    canvas = _Canvas(-half, half, -half, half)
    canvas.disc(_point(state.goal_xy), 0.15, GOAL)
    ends = np.cumsum(np.stack([np.cos(angles), np.sin(angles)], axis=1), axis=0)
    joints = [(0.0, 0.0), *map(_point, ends)]
    canvas.line(joints, 0.14, CART)
    for joint in joints:
        canvas.disc(joint, 0.09, INK)
    return canvas.image()


def _point(position: Any) -> Point:
    x, y = np.asarray(position, float).tolist()
    return x, y


def swimmer(env: Any, params: Any, state: Any) -> np.ndarray:
    canvas = _Canvas(-2.0, 2.0, -2.0, 2.0)
    canvas.disc(_point(state.goal_xy), 0.12, GOAL)
    for urchin in np.asarray(state.urchin_xys):
        canvas.disc(_point(urchin), 0.12, INK)
    canvas.disc(_point(state.xy), 0.09, CART)
    return canvas.image()


def point_robot(env: Any, params: Any, state: Any) -> np.ndarray:
    radius = float(params.circle_radius)
    canvas = _Canvas(-1.5 * radius, 1.5 * radius, -1.0 * radius, 1.5 * radius)
    angles = np.linspace(0, np.pi, 60)
    canvas.line([(radius * np.cos(a), radius * np.sin(a)) for a in angles], 0.012 * radius, GREY)
    canvas.disc(_point(state.goal), float(params.goal_radius), GOAL)
    canvas.disc(_point(state.pos), 0.05 * radius, CART)
    return canvas.image()


def observed_grid(env: Any, params: Any, state: Any) -> np.ndarray:
    """Cells of an observation `[H, W, C]`, coloured by channel."""
    return channels(np.asarray(_observe(env, state, params)))


_observe = jax.jit(lambda env, state, params: env.get_obs(state, params), static_argnums=0)


def channels(obs: np.ndarray) -> np.ndarray:
    """The picture of a grid `[H, W, C]` of flags: a cell has the colour of its first flag."""
    set_ = np.asarray(obs) > 0
    colours = np.array([FLOOR, *CHANNELS], np.uint8)
    return grid(colours[np.where(set_.any(-1), 1 + set_.argmax(-1), 0)])


def grid(colours: np.ndarray, cell: int = CELL) -> np.ndarray:
    """Cells of the given colours `[H, W, 3]`, with lines between them."""
    image = colours.astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    for lines in (image[::cell], image[:, ::cell]):
        lines[:] = lines * 0.7
    return image


def _map(open_: Any, marks: dict[tuple[int, int], Colour], cell: int = CELL) -> np.ndarray:
    """A map of walls with coloured cells, of which later ones cover earlier ones."""
    colours = np.where(np.asarray(open_, bool)[..., None], np.uint8(235), np.array(WALL, np.uint8))
    for place, colour in marks.items():
        colours[place] = colour
    return grid(colours, cell)


def _place(position: Any) -> tuple[int, int]:
    row, column = np.asarray(position).tolist()
    return row, column


def maze(env: Any, params: Any, state: Any) -> np.ndarray:
    """The mazes with a position and a goal, each row and column."""
    return _map(env.env_map, {_place(state.goal): GOAL, _place(state.pos): CART})


def deep_sea(env: Any, params: Any, state: Any) -> np.ndarray:
    size = env.size
    row, column = np.indices((size, size))
    colours = np.where((column <= row)[..., None], np.array((40, 70, 120)), np.array(FLOOR))
    colours[-1, -1] = (245, 190, 65)  # the treasure
    if state.row < size:
        colours[int(state.row), int(state.column)] = ENEMY
    return grid(colours)


def frozen_lake(env: Any, params: Any, state: Any) -> np.ndarray:
    from gymnax.environments.misc import frozen_lake as lake

    tiles = np.asarray(env.desc)
    colours = np.full((*tiles.shape, 3), (200, 226, 240), np.uint8)
    colours[tiles == lake.HOLE] = INK
    colours[tiles == lake.GOAL] = GOAL
    colours[tiles == lake.START] = GREY
    colours[np.unravel_index(int(state.position), tiles.shape)] = ENEMY
    return grid(colours, 2 * CELL)


def catch(env: Any, params: Any, state: Any) -> np.ndarray:
    colours = np.full((env.rows, env.columns, 3), FLOOR, np.uint8)
    colours[int(state.paddle_y), int(state.paddle_x)] = AGENT
    colours[int(state.ball_y), int(state.ball_x)] = ENEMY
    return grid(colours)


def pong(env: Any, params: Any, state: Any) -> np.ndarray:
    colours = np.array([FLOOR, (240, 240, 240), ENEMY, (96, 98, 112)])
    obs = np.asarray(_observe(env, state, params)) > 0
    index = np.where(obs.any(-1), 1 + obs.argmax(-1), 0)
    return colours[index].astype(np.uint8).repeat(8, 0).repeat(8, 1)


_DRAWINGS: dict[str, Drawing] = {
    "CartPole": cartpole, "MountainCar": mountain_car, "ContinuousMountainCar": mountain_car,
    "Pendulum": pendulum, "Acrobot": acrobot, "Reacher": reacher, "Swimmer": swimmer,
    "PointRobot": point_robot, "Pong": pong, "FrozenLake": frozen_lake, "DeepSea": deep_sea,
    "FourRooms": maze, "MetaMaze": maze, "Catch": catch,
    **dict.fromkeys(
        ("MinAsterix", "MinBreakout", "MinFreeway", "MinSeaquest", "MinSpaceInvaders"),
        observed_grid,
    ),
}  # fmt: skip
"""By the name of gymnax's class."""
