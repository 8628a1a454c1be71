"""A small ray caster: balls, boxes and round cones with painted surfaces, in a room with a lamp and shadows.

The world is in metres, z up, with the floor at z = 0.  A pixel is computed with nothing but + − × ÷ √ in float32,
element by element (Python's numbers do not widen a float32), so that it does not change with the machine's vector unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from epiutils.cameras import Camera

ROOM = (2.7, 5.3, 2.9)  # half width, half length and height of the walls around the 4 × 9 m of the cameras
_CORNERS = np.stack(np.meshgrid((-1, 1), (-1, 1), (-1, 1)), axis=-1).reshape(-1, 3)


@dataclass(frozen=True, eq=False)
class Solid:
    """A solid in its own coordinates q = axes (X − centre), and how its surface is coloured.

    kind: "ball", |q| ≤ 1; "box", |q| ≤ size; "cone", the hull of a ball of radius size[0] at the origin and one of
    radius size[1] at (0, 0, size[2]).  axes: (3, 3) with orthogonal rows.  paint: a function of (q, size, colours,
    setting), points last, that returns RGB, (3, N).  colours: one to three of RGB in [0, 1].  part: what it is part of.
    """

    kind: str
    centre: np.ndarray
    axes: np.ndarray
    size: tuple[float, float, float]
    paint: Callable
    colours: tuple
    setting: tuple[float, float] = (0.0, 0.0)
    part: str = ""

    def __post_init__(self):
        """Keep the balls whose convex hull contains the solid: `ends` (N, 3) in the world and `radii` (N,)."""
        scale = (self.axes * self.axes).sum(1)
        corners, radii = _CORNERS * self.size, np.zeros(8)
        if self.kind == "cone":
            corners, radii = np.array([(0, 0, 0), (0, 0, self.size[2])]), self.size[:2] / np.sqrt(scale.min())
        object.__setattr__(self, "ends", self.centre + (corners / scale) @ self.axes)
        object.__setattr__(self, "radii", radii)

    @classmethod
    def cone(cls, a, b, ra, rb, forward, paint, *colours, part="", setting=(0, 0), flat=1.0) -> Solid:
        """A round cone from a (radius ra) to b (rb), local x towards `forward` and squeezed there by `flat`."""
        length = np.sqrt((b - a) @ (b - a))
        z = (b - a) / length
        x = forward - z * (forward @ z)
        x = x / np.sqrt(x @ x)
        y = z[[1, 2, 0]] * x[[2, 0, 1]] - z[[2, 0, 1]] * x[[1, 2, 0]]  # z × x
        return cls("cone", a, np.stack([x / flat, y, z]), (ra, rb, length), paint, colours, setting, part)

    @classmethod
    def ball(cls, centre, frame, radii, paint, *colours, part="", setting=(0, 0)) -> Solid:
        """An ellipsoid with its half axes along the columns of `frame`."""
        return cls("ball", centre, frame.T / np.asarray(radii)[:, None], (1, 1, 1), paint, colours, setting, part)

    @classmethod
    def box(cls, centre, frame, half, paint, *colours) -> Solid:
        """A box with its half sides `half` along the columns of `frame`."""
        return cls("box", np.asarray(centre, float), frame.T, tuple(half), paint, colours)


# the first solid on a ray


def _windows(solids: Sequence[Solid], camera: Camera) -> np.ndarray:
    """Pixel ranges (N, 4) as u0, u1, v0, v1 that contain the solids' pictures; empty where there is none.

    A ball (x, y, z, r) before the camera spans x/z between (x z ± r √(x² + z² − r²)) / (z² − r²); the span of a
    convex hull is the union of the spans.  A solid that reaches the camera's plane gets the whole picture.
    """
    starts = np.cumsum([0] + [len(solid.radii) for solid in solids[:-1]])
    X = np.concatenate([solid.ends for solid in solids]) @ camera.R.T + camera.t
    z, r = X[:, 2], np.concatenate([solid.radii for solid in solids])
    square = np.maximum(z * z - r * r, 1e-9)
    span = []
    for x in (X[:, 0], X[:, 1]):
        root = r * np.sqrt(x * x + square)
        low, high = (x * z - root) / square, (x * z + root) / square
        span.append((np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)))
    low, high = np.array(span).transpose(1, 2, 0)  # (N, 2) each
    K, size = camera.K[:2, :2], np.array(camera.size)
    middle, half = (low + high) / 2 @ K.T + camera.K[:2, 2], (high - low) / 2 @ np.abs(K).T
    first = np.clip(np.floor(np.clip(middle - half, -1e6, 1e6)), 0, size)
    last = np.clip(np.ceil(np.clip(middle + half, -1e6, 1e6)) + 1, 0, size)
    across = np.minimum.reduceat(z - r, starts) < 0.05
    first[across], last[across] = 0, size
    last[np.maximum.reduceat(z + r, starts) < 0.05] = 0
    return np.stack([first, last], axis=-1).reshape(-1, 4).astype(int)


def _cast(solids: Sequence[Solid], camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """The first solid that each pixel's ray meets: a z-buffer of exact ray–solid intersections.

    Returns depth (H, W) float32, metres along the optical axis, inf where there is nothing, and index (H, W) int16
    of the solid, −1 where there is none.  Raises ValueError for a camera with lens distortion.
    """
    if camera.distortion.any():
        raise ValueError(f"{camera.name}: rays are cast without lens distortion; use camera.without_distortion()")
    width, height = camera.size
    depth, index = np.full((height, width), np.inf, np.float32), np.full((height, width), -1, np.int16)
    if not solids:
        return depth, index
    axes, centres, sizes = (np.array([getattr(solid, name) for solid in solids]) for name in ("axes", "centre", "size"))
    ahead, windows = centres @ camera.R[2] + camera.t[2], _windows(solids, camera)
    wide, tall = windows[:, 1] - windows[:, 0], windows[:, 3] - windows[:, 2]
    area = np.maximum(wide, 0) * np.maximum(tall, 0)
    M = axes @ (camera.R.T @ np.linalg.inv(camera.K))  # (S, 3, 3): depth · M (u, v, 1) is the ray, in solid coordinates
    corner = np.column_stack([windows[:, [0, 2]], np.ones(len(solids))])
    d = (M * corner[:, None]).sum(-1)  # the ray of the window's corner, and its point as deep as the solid's centre
    o = (axes * (camera.C - centres)[:, None]).sum(-1) + ahead[:, None] * d
    table = np.column_stack([wide, ahead, sizes, M[:, :, 0], M[:, :, 1], d, o]).astype(np.float32)
    kinds = np.array([solid.kind for solid in solids])
    for kind, hit in _HITS.items():
        of = np.flatnonzero((kinds == kind) & (area > 0))
        for chunk in np.split(of, np.flatnonzero(np.diff(np.cumsum(area[of]) // 30000)) + 1):
            first = np.cumsum(area[chunk]) - area[chunk]
            rows = np.repeat(table[chunk].T, area[chunk], axis=1)  # (17, P), P pixels of the chunk's windows
            i = np.arange(rows.shape[1], dtype=np.float32) - np.repeat(first.astype(np.float32), area[chunk])
            v = np.floor((i + 0.5) / rows[0])
            across = rows[5:8] * (i - v * rows[0]) + rows[8:11] * v
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                t = rows[1] + hit(rows[14:17] + rows[1] * across, rows[11:14] + across, rows[2:5])
            t[~(t > 0.05)] = np.inf
            for k, start in zip(chunk, first, strict=True):
                u0, u1, v0, v1 = windows[k]
                found, window = t[start : start + area[k]].reshape(tall[k], wide[k]), depth[v0:v1, u0:u1]
                closer = found < window
                np.copyto(window, found, where=closer)
                np.copyto(index[v0:v1, u0:u1], np.int16(k), where=closer)
    return depth, index


def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _first_root(a, b, c):
    """The smaller root of a t² + 2 b t + c, nan where there is none."""
    return (-b - np.sqrt(b * b - a * c)) / a


def _hit_ball(o, d, size):
    """Where the ray o + t d first meets the solid: t (P,), nan where it misses; o, d and size are (3, P)."""
    return _first_root(_dot(d, d), _dot(o, d), _dot(o, o) - 1)


def _hit_cone(o, d, size):
    """A round cone: its two balls, and the cone x² + y² = (A + B z)² that touches both, between the circles of touch."""
    ra, rb, length = size
    s = (ra - rb) / length
    cosine = np.sqrt(1 - s * s)
    A, B = ra / cosine, -s / cosine
    q, flat = A + B * o[2], o[0] * o[0] + o[1] * o[1]
    across, level = d[0] * d[0] + d[1] * d[1], o[0] * d[0] + o[1] * d[1]
    side = _first_root(across - B * B * d[2] * d[2], level - B * q * d[2], flat - q * q)
    z = o[2] + side * d[2]
    side = np.where((z > s * ra) & (z < length + s * rb), side, np.nan)
    a, b, c, far = across + d[2] * d[2], level + o[2] * d[2], flat + o[2] * o[2], o[2] - length
    ends = np.fmin(_first_root(a, b, c - ra * ra), _first_root(a, level + far * d[2], flat + far * far - rb * rb))
    return np.fmin(side, ends)


def _hit_box(o, d, size):
    """A box: the ray is inside while it is between all three pairs of planes."""
    inverse = 1 / d
    middle, half = -o * inverse, size * np.abs(inverse)
    low, high = middle - half, middle + half
    enter, leave = np.fmax(np.fmax(low[0], low[1]), low[2]), np.fmin(np.fmin(high[0], high[1]), high[2])
    return np.where(enter < leave, enter, np.nan)


_HITS = {"ball": _hit_ball, "cone": _hit_cone, "box": _hit_box}


def _normal(kind: str, q: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The direction of a surface's normal at the solid's own coordinates q, both (3, N)."""
    if kind == "ball":
        return q
    if kind == "cone":  # away from the ball of the hull that touches here
        s = (size[0] - size[1]) / size[2]
        z = (q[2] - size[0] * s) / (1 - s * s)
        return np.stack([q[0], q[1], q[2] - np.minimum(np.maximum(z, 0), size[2])])
    return np.sign(q) * ((np.abs(q) - size).argmax(0) == [[0], [1], [2]])


# paints: RGB (3, N) at points q (3, N) of a solid, from its size and setting, (3, N) and (2, N), and (3, 3, N) colours


def plain(q, size, colours, setting):
    """One colour."""
    return colours[0]


def _picture(q, size, colours, setting):
    """A picture on a wall: a frame, a field, and a disc in it."""
    a, b = np.abs(np.where(size[0] > size[1], q[0], q[1])), q[2]
    wide = np.maximum(size[0], size[1])
    rgb = np.where((a * a + b * b) < (0.5 * np.minimum(wide, size[2])) ** 2, colours[2], colours[1])
    return np.where((wide - a < 0.04) | (size[2] - np.abs(b) < 0.04), colours[0], rgb)


def _paint(solids: Sequence[Solid], index: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals and colours, (3, N) each, at points X (3, N) on the surfaces of solids number `index` (N,)."""
    fields = zip(*((s.centre, s.axes, s.size, s.setting, (s.colours * 3)[:3]) for s in solids), strict=True)
    table = np.concatenate([np.array(field, np.float32).reshape(len(solids), -1) for field in fields], axis=1)
    table, rgb, normal = table.T.copy(), np.empty_like(X), np.empty_like(X)  # (26, S)
    kinds = [(solid.kind, solid.paint) for solid in solids]
    groups = {group: number for number, group in enumerate(dict.fromkeys(kinds))}
    group = np.array([groups[kind] for kind in kinds], np.int8)[index]
    for (kind, paint), number in groups.items():
        of = np.flatnonzero(group == number)
        if len(of):
            rows = table.take(index.take(of), axis=1)  # (26, n)
            centre, A, size, setting = rows[:3], rows[3:12].reshape(3, 3, -1), rows[12:15], rows[15:17]
            q = A * (X.take(of, axis=1) - centre)
            q = q[:, 0] + q[:, 1] + q[:, 2]
            rgb[:, of] = paint(q, size, rows[17:].reshape(3, 3, -1), setting)
            g = _dot(A, _normal(kind, q, size))
            normal[:, of] = g / np.sqrt(_dot(g, g))
    return normal, rgb


# the room


@dataclass(frozen=True, eq=False)
class Room:
    """Light and walls: the direction `light` to the lamp, its RGB, the ambient RGB, colours, patterns and pictures."""

    light: np.ndarray
    lamp: np.ndarray
    ambient: np.ndarray
    wall: np.ndarray
    floor: np.ndarray
    patterns: tuple[int, int]  # of the floor (boards, tiles, carpet) and of the walls (panels, stripes, plain)
    shades: np.ndarray  # (64,) brightness of the boards, tiles and stripes
    pictures: tuple[Solid, ...]

    @classmethod
    def drawn(cls, seed: int = 0) -> Room:
        """A room drawn from a seed: lamp, walls, floor, and pictures on the walls."""
        rng = np.random.default_rng((seed, 4))
        azimuth, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.85)
        light = np.round([np.cos(azimuth) * slope, np.sin(azimuth) * slope, 1.0], 9)
        walls = ((0.92, 0.90, 0.85), (0.78, 0.85, 0.89), (0.85, 0.89, 0.78), (0.93, 0.83, 0.74), (0.74, 0.76, 0.83))
        floors = ((0.76, 0.58, 0.41), (0.60, 0.46, 0.36), (0.68, 0.68, 0.67), (0.54, 0.59, 0.65), (0.82, 0.75, 0.63))
        warmth, pictures = rng.uniform(-0.04, 0.04), []
        for wall in range(4):
            for side in (-1, 1):
                along, up, half, tall = rng.uniform((0.65, 1.2, 0.15, 0.15), (1.5, 1.9, 0.5, 0.4)) * (side, 1, 1, 1)
                colours, long = rng.uniform(0.25, 0.75, (3, 1)) + rng.uniform(-0.2, 0.2, (3, 3)), wall % 2
                at = np.array((0.0, along * 2.6, up) if long else (along, 0.0, up))
                at[1 - long] = ROOM[1 - long] * (1 if wall > 1 else -1)
                frame = (0.02, half, tall) if long else (half, 0.02, tall)
                pictures.append(Solid.box(np.round(at, 9), np.eye(3), frame, _picture, *colours))
        return cls(
            light=light / np.sqrt(light @ light),
            lamp=rng.uniform(0.42, 0.6) * np.array((1 + warmth, 1.0, 1 - warmth)),
            ambient=rng.uniform(0.58, 0.7) * np.array((1 - warmth / 2, 1.0, 1 + warmth / 2)),
            wall=np.clip(np.array(walls[rng.integers(5)]) + rng.uniform(-0.06, 0.06, 3), 0, 1),
            floor=np.clip(np.array(floors[rng.integers(5)]) + rng.uniform(-0.06, 0.06, 3), 0, 1),
            patterns=tuple(int(v) for v in rng.integers(0, 3, 2)),
            shades=rng.uniform(0.88, 1.06, 64).astype(np.float32),
            pictures=tuple(pictures),
        )

    def shadow_map(self, solids: Sequence[Solid], middle: np.ndarray) -> tuple[Camera, np.ndarray]:
        """The lamp as a camera 20 m away that sees 4.6 m around a point, and the depth buffer (208, 208) that it sees."""
        forward = -self.light
        right = np.cross(forward, (0.0, 1.0, 0.0))
        right = right / np.sqrt(right @ right)
        R, f, c, t = (
            np.stack([right, np.cross(forward, right), forward]),
            20 * 208 / 4.6,
            103.5,
            middle + 20 * self.light,
        )
        lamp = Camera(K=((f, 0, c), (0, f, c), (0, 0, 1)), R=R, t=-R @ t, size=(208, 208))
        return lamp, _cast(solids, lamp)[0]


def _walls(look: Room, C: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where rays (3, N) from C leave the room: points (3, N), normals (3, N) and colours (3, N)."""
    half = np.array((ROOM[0], ROOM[1], ROOM[2] / 2))
    middle, half = (v.astype(np.float32)[:, None] for v in ((0, 0, half[2]) - C, half))
    with np.errstate(divide="ignore", invalid="ignore"):
        exits = (middle + np.copysign(half, d)) / d
    depth = np.clip(np.fmin(np.fmin(exits[0], exits[1]), exits[2]), 0.05, 50)
    floor = (exits[2] <= depth) & (d[2] < 0)
    ends = (exits[1] <= depth) & ~floor  # the short walls, that face ±y
    X = C.astype(np.float32)[:, None] + depth * d
    normal = np.stack([-np.sign(d[0]) * ~(floor | ends), -np.sign(d[1]) * ends, floor.astype(np.float32)])
    shade, (tiling, paper) = np.empty_like(depth), look.patterns
    on = np.flatnonzero(floor)
    a, b, shift, m, n = ((6.5, 0.7, 0.37, 7, 1), (2.2, 2.2, 0, 5, 12), (40, 40, 0, 13, 29))[tiling]
    column = np.floor(X[0][on] * a)
    cell = column * m + np.floor(X[1][on] * b + column * shift) * n
    shade[on] = look.shades[cell.astype(np.int32) & 63]
    on = np.flatnonzero(~floor)
    along, up = np.where(ends, X[0], X[1])[on], X[2][on]
    stripe = look.shades[np.floor(along * (1.1, 4.0, 0.3)[paper]).astype(np.int32) & 63]
    bright = (0.95 + 0.05 * stripe) * (0.93 + 0.05 * up)
    shade[on] = np.where(up < (0.11 if paper else 0.85), bright * 0.82, bright)  # a skirting board, or panels
    colours = (v.astype(np.float32)[:, None] for v in (look.floor, look.wall))
    return X, normal, np.where(floor, *colours) * shade


def _dark(lamp: Camera, shadow: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Which points X (3, N) the lamp does not see: 255 in the shade, 0 in the light."""
    P, pixels = lamp.P.astype(np.float32), len(shadow)
    u, v, z = (_dot(P[k], X) + P[k, 3] for k in range(3))
    z_inverse = 1 / z
    u, v = ((np.minimum(np.maximum(w * z_inverse, 0), pixels - 1) + 0.5).astype(np.int32) for w in (u, v))
    return (shadow.ravel().take(v * pixels + u) < z - 0.03).astype(np.uint8) * 255


def _gloss(normal: np.ndarray, d: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Blinn's highlight, cos²⁴ of the angle between the normal and the bisector of light and view."""
    bisector = light[:, None] - d * (1 / np.sqrt(_dot(d, d)))
    cosine = np.maximum(_dot(bisector, normal), 0)
    shine = cosine * cosine / _dot(bisector, bisector)
    shine = shine * shine * shine
    shine = shine * shine
    return 0.14 * shine * shine


def render(
    solids: Sequence[Solid], camera: Camera, look: Room | None = None, shadow: tuple[Camera, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture of solids in a room: ambient light, Lambert's law, Blinn's gloss, and soft shadows.

    shadow: what `Room.shadow_map` returns, made here around the solids where it is not given.
    Returns image (H, W, 3) uint8 RGB, and depth and index as `_cast` gives them (the room is not in them).
    """
    look = look or Room.drawn()
    shadow = shadow or look.shadow_map(solids, np.mean([s.centre for s in solids] or [np.zeros(3)], axis=0))
    depth, index = _cast(solids, camera)
    height, width = depth.shape
    a, b, c = (camera.R.T @ np.linalg.inv(camera.K)).astype(np.float32).T[..., None, None]  # (3, 1, 1) each
    u, v = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    d = (a * u + (b * v + c)).reshape(3, -1)  # (3, H·W)
    hit, behind = np.flatnonzero(index >= 0), np.flatnonzero(index < 0)
    d_hit = d.take(hit, axis=1)
    X = camera.C.astype(np.float32)[:, None] + depth.ravel().take(hit) * d_hit
    surfaces = [(behind, *_walls(look, camera.C, d.take(behind, axis=1)))]
    surfaces += [(hit, X, *_paint(solids, index.ravel().take(hit), X))] if len(hit) else []
    dark = np.empty(height * width, np.uint8)
    for where, X, normal, _ in surfaces:  # from 2.5 cm outside, so that a surface does not shade itself
        dark[where] = _dark(*shadow, X + 0.025 * normal)
    dark = cv2.blur(dark.reshape(height, width), (5, 5)).ravel()
    light, image = look.light.astype(np.float32), np.empty((height * width, 3), np.uint8)
    for where, _, normal, rgb in surfaces:
        facing = np.maximum(_dot(normal, light), 0) * (1 - dark.take(where) * np.float32(1 / 255))
        sky = 0.86 + 0.14 * normal[2] + 0.05 * normal[0]
        gloss = _gloss(normal, d_hit, light) * facing if where is hit else 0
        for k in range(3):
            level = rgb[k] * (np.float32(look.ambient[k]) * sky + np.float32(look.lamp[k]) * facing) + gloss
            image[where, k] = np.minimum(level, 1) * 255 + 0.5
    image = image.reshape(height, width, 3)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    edge = cv2.morphologyEx(index.astype(np.int16), cv2.MORPH_GRADIENT, cross) > 0  # where solids meet
    return cv2.copyTo(cv2.GaussianBlur(image, (3, 3), 0), edge.astype(np.uint8), image), depth, index
