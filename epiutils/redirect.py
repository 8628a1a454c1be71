"""The epipolar redirection operator: every source pixel's value goes to the band around its epipolar line.

    out[x'] = Σ values[x]  over the source pixels x with dist(x', F x) ≤ threshold

`redirect` computes it in three ways: the original's nested loops (the specification), a dense mask, and
`Pencil`, which is exact too and needs O(N log N) for an F and O(N) for a heatmap of N pixels.

The idea of `Pencil`.  All epipolar lines pass through the epipole e', so a line is one angle θ, modulo π.
A reference pixel at distance r from e' is within t of exactly the lines whose angle is within asin(t / r)
of its own.  Sort the source pixels by θ once: each reference pixel then owns one contiguous range of that
order, and the sum over a range is the difference of two running sums.

The angle stays sharp wherever e' lies.  In coordinates centred on the reference picture, let d be the
direction of e', n ⟂ d, D its distance and l = (a, b, c) a line.  With e' in or near the picture,
θ = atan2((a, b)·d, (a, b)·n).  Far away the lines are nearly parallel and (a, b)·d vanishes, but
−c = D (a, b)·d, the line's offset from the centre, does not: θ = atan2(−c, (a, b)·n) is the same angle
stretched by D, and exact for D = ∞.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from array_api_compat import array_namespace
from torch import Tensor

# A band is closed: a distance that equals the threshold, but for this relative rounding, belongs to it.
_TIE = 1e-10

# A source pixel is at the epipole when its line's normal is nothing but rounding, relative to the norm of F.
_AT_EPIPOLE = 1e-12


def redirect(
    values: Tensor, F: Tensor, threshold: float, method: str = "pencil", out_shape: tuple[int, int] | None = None
) -> Tensor:
    """Sum, for every reference pixel, of the source pixels whose epipolar line passes within the threshold.

    out[x'] = Σ_x values[x] · [dist(x', F x) ≤ threshold].  A source pixel at the epipole has no line and
    gives nothing.

    values: (B, J, H, W), (J, H, W) or (H, W), floating and finite.  F: (3, 3), or (B, 3, 3) with values
    (B, J, H, W), in heatmap pixels, any scale: x_refᵀ F x_src = 0.  threshold: px of the reference view.
    out_shape: (H', W') of the reference view, by default that of the source.  method: "pencil", "dense"
    (an N' × N mask) or "loop" (nested Python loops).
    Returns (..., H', W') of the dtype and on the device of `values`, differentiable in `values` except by
    "loop".  Raises ValueError for an F that is no fundamental matrix, for shapes that do not fit and for a
    threshold that is not positive.
    """
    methods = {"pencil": _redirect_pencil, "dense": _redirect_dense, "loop": _redirect_loop}
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim not in (2, 3, 4):
        raise ValueError(f"values must be a floating tensor (B, J, H, W), (J, H, W) or (H, W), got {_describe(values)}")
    F = _tensor(F).to(values.device)
    if F.ndim == 3 and (values.ndim != 4 or len(F) != len(values)):
        raise ValueError(f"F of shape {tuple(F.shape)} needs values ({len(F)}, J, H, W), got {tuple(values.shape)}")
    shape = tuple(values.shape[-2:])
    return methods[method](values, F, threshold, _check_shape(out_shape or shape))


@dataclass(frozen=True, eq=False)
class Pencil:
    """The set-up of one F, or a batch of them, that many heatmaps share: who lies in whose band.

    order: (B, N) source pixels sorted by the angle of their epipolar lines.  lo, hi: (B, N') the range of
    that order in each reference pixel's band; where `wraps`, it is lo … N and 0 … hi.  valid: (B, N) false
    for a source pixel at the epipole.  B = 1 for a single F.  Make one with `Pencil.from_fundamental`.
    """

    shape: tuple[int, int]
    out_shape: tuple[int, int]
    batched: bool
    order: Tensor
    lo: Tensor
    hi: Tensor
    wraps: Tensor | None  # None where no range wraps
    valid: Tensor | None  # None where no source pixel is at the epipole
    _cache: dict = field(default_factory=dict, repr=False)

    @classmethod
    def from_fundamental(
        cls, F: Tensor, shape: tuple[int, int], threshold: float, out_shape: tuple[int, int] | None = None
    ) -> Pencil:
        """Sort the source pixels by epipolar line and find the range of every reference pixel: O(N log N).

        F: (3, 3), or (B, 3, 3), on the device where the heatmaps are.  shape: (H, W) of the source heatmap;
        out_shape: of the reference, by default the same.  threshold: reference px.
        """
        shape, out_shape = _check_shape(shape), _check_shape(out_shape or shape)
        F, t = _tensor(F), _check_threshold(threshold) * (1 + _TIE) / _half_size(out_shape)
        Fn, e = _normalized_fundamental(F, shape, out_shape)
        Fn, e = Fn.reshape(-1, 3, 3), e.reshape(-1, 3)
        if F.device.type == "cpu":  # numpy, one F at a time, is several times quicker here than a batch in torch
            parts = [_ranges(Fn[b : b + 1], e[b : b + 1], shape, out_shape, t) for b in range(len(Fn))]
            found = [torch.from_numpy(np.concatenate(rows)) for rows in zip(*parts, strict=True)]
        else:
            found = _ranges(Fn, e, shape, out_shape, t)
        order, lo, hi, wraps, valid = found
        return cls(
            shape=shape,
            out_shape=out_shape,
            batched=F.ndim == 3,
            order=order,
            lo=lo,
            hi=hi,
            wraps=wraps if wraps.any() else None,
            valid=None if valid.all() else valid,
        )

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each reference pixel's band, as `redirect`: values (..., H, W) → (..., H', W'), in O(N)."""
        v = self._flatten(values)
        return self._unflatten(_BandSum.apply(v, self) if v.requires_grad else self._range_sum(v), values)

    def max(self, values: Tensor, sharpness: float = math.inf) -> Tensor:
        """Maximum over each reference pixel's band, or its soft version log Σ exp(β v) / β with β = sharpness.

        The soft maximum exceeds the maximum by at most log(count) / β and tends to it; `count` gives the
        pixels in each band, and subtracting log(count) / β makes it a soft mean for small β.  Computed in the
        log domain from O(N log N) partial maxima, so nothing overflows or is lost.
        values: (..., H, W).  Returns (..., H', W'); a band without source pixels has −inf.
        """
        if not sharpness > 0:
            raise ValueError(f"sharpness must be positive (inf: the maximum itself), got {sharpness}")
        v = self._flatten(values)
        if self.valid is not None:
            v = v.masked_fill(~self.valid[:, None], torch.finfo(v.dtype).min / 4)
        v = _take(v, self.order)
        lo, hi = self.lo, self.hi
        if self.wraps is not None:  # go round twice, so that every range is contiguous
            v = torch.cat([v, v], -1)
            hi = hi + self.order.shape[-1] * self.wraps
        hi = torch.maximum(hi, lo + 1)  # an empty range reads something, replaced below
        lo, hi = lo.clamp_max(v.shape[-1] - 1), hi.clamp_max(v.shape[-1])
        if math.isinf(sharpness):
            out = _RangeMax.apply(v, lo, hi)
        else:  # in float64: the gradient is an exponential of differences of sharpness · v
            out = (_range_logsumexp(v.double() * sharpness, lo, hi) / sharpness).to(v.dtype)
        return self._unflatten(out.masked_fill(self.count.flatten(-2)[:, None] == 0, -math.inf), values)

    @property
    def count(self) -> Tensor:
        """Number of source pixels in each reference pixel's band, (B, H', W'), (1, H', W') for a single F."""
        if "count" not in self._cache:
            ones = torch.ones(len(self.order), 1, self.order.shape[-1], dtype=torch.float64, device=self.order.device)
            self._cache["count"] = self._range_sum(ones)[:, 0].round().long().unflatten(-1, self.out_shape)
        return self._cache["count"]

    def _flatten(self, values: Tensor) -> Tensor:
        """(..., H, W) → (B, M, N): the batch of F leads; with a single F, all maps share it."""
        if tuple(values.shape[-2:]) != self.shape or not values.is_floating_point():
            raise ValueError(
                f"values must be floating (..., {self.shape[0]}, {self.shape[1]}), got {_describe(values)}"
            )
        if not self.batched:
            return values.reshape(1, -1, self.order.shape[-1])
        if values.ndim != 4 or len(values) != len(self.order):
            raise ValueError(
                f"{len(self.order)} fundamental matrices need values (B, J, H, W), got {_describe(values)}"
            )
        return values.flatten(-2)

    def _unflatten(self, out: Tensor, values: Tensor) -> Tensor:
        return out.reshape(*values.shape[:-2], *self.out_shape)

    def _range_sum(self, v: Tensor) -> Tensor:
        """(B, M, N) → (B, M, N'): Σ of v[order] over [lo, hi)."""
        if self.valid is not None:
            v = v * self.valid[:, None]
        running = _running_sum(_take(v, self.order))
        out = _take(running, self.hi).sub_(_take(running, self.lo))
        if self.wraps is not None:
            if ("wraps", v.dtype) not in self._cache:
                self._cache["wraps", v.dtype] = self.wraps[:, None].to(v.dtype)
            out.addcmul_(self._cache["wraps", v.dtype], running[..., -1:])
        return out

    def _range_sum_adjoint(self, g: Tensor) -> Tensor:
        """(B, M, N') → (B, M, N): each source pixel's sum over the reference pixels whose range holds it.

        Ranges open at lo and close at hi; sorted by place, a running sum of +g and −g counts the open ones.
        No scatter, so the result does not depend on the order of threads.
        """
        if "events" not in self._cache:
            places, events = torch.cat([self.lo, self.hi], -1).sort(dim=-1)  # (B, 2N')
            rank = self.order.argsort(-1)  # (B, N) place of each source pixel
            self._cache["events"] = events, torch.searchsorted(places, rank, right=True)
        events, passed = self._cache["events"]
        out = _take(_running_sum(_take(torch.cat([g, -g], -1), events)), passed)
        if self.wraps is not None:
            out += (g * self.wraps[:, None]).sum(-1, keepdim=True)
        return out if self.valid is None else out * self.valid[:, None]


def _ranges(Fn, e, shape: tuple[int, int], out_shape: tuple[int, int], t: float) -> tuple:
    """The order of the source pixels and each reference pixel's range of it, in normalised coordinates.

    Fn: (B, 3, 3) and e: (B, 3), numpy or torch.  t: the threshold.  Returns order (B, N), lo, hi, wraps (B, N')
    and valid (B, N) of `Pencil`, of the same kind.
    """
    xp = array_namespace(Fn)
    reach = xp.hypot(e[:, :1], e[:, 1:2])  # (B, 1), D = reach / e[2], possibly ∞
    near = reach <= e[:, 2:]
    at_centre = reach == 0
    d = xp.concat([xp.where(at_centre, 1.0, e[:, :1]), e[:, 1:2]], axis=-1) / xp.where(at_centre, 1.0, reach)
    n = xp.stack([-d[:, 1], d[:, 0]], axis=-1)
    far = xp.where(near, 1.0, reach)  # a safe divisor
    k = xp.where(near, 1.0, e[:, 2:] / far)  # 1 / stretch of the angle: 0 for D = ∞
    D_k = xp.where(near, reach / xp.where(near, e[:, 2:], 1.0), 1.0)  # D k

    # Source: each line's (a, b)·n, (a, b)·d and c, its angle, and the order of the angles.
    turn = xp.zeros_like(Fn)
    turn[:, 0, :2], turn[:, 1, :2], turn[:, 2, 2] = n, d, 1.0
    lines = turn @ Fn @ _like(_normalized_pixels(shape), Fn)  # (B, 3, N)
    along_n, along_d, c = lines[:, 0], lines[:, 1], lines[:, 2]
    valid = along_n * along_n + along_d * along_d > _AT_EPIPOLE**2
    angles = _angle(xp, xp.where(near, along_d, -c), along_n)
    order = xp.argsort(angles, axis=-1, stable=False)
    angles = xp.take_along_axis(angles, order, axis=-1)

    # Reference: coordinates about e', those along d shrunk by k, and the two sides of each pixel's wedge.
    turn[:, 1] = xp.concat([k * d, -D_k], axis=-1)
    about = turn[:, :2] @ _like(_normalized_pixels(out_shape), Fn)  # (B, 2, N')
    eta, zeta = about[:, 0], about[:, 1]
    r = xp.hypot(eta * k, zeta)
    everywhere = r <= t * k  # within the threshold of e' itself: all lines
    r = xp.where(everywhere, 1.0, r)
    sin = xp.where(everywhere, 0.0, t * k / r)  # of the wedge's half-angle
    cos = xp.sqrt((1 - sin) * (1 + sin))
    x, dx, y, dy = -zeta * cos, eta * k * sin, eta * cos, t * zeta / r
    sides = _angle(xp, xp.concat([y + dy, y - dy], axis=-1), xp.concat([x + dx, x - dx], axis=-1))  # (B, 2N')
    found = _search(angles, sides)  # (B, 2N')
    middle = eta.shape[-1]
    wraps = (sides[:, middle:] < sides[:, :middle]) & ~everywhere
    lo = xp.where(everywhere, 0, found[:, :middle])
    hi = xp.where(everywhere, angles.shape[-1], found[:, middle:])
    return order, lo, hi, wraps, valid


def _angle(xp, y, x):
    """A stand-in for atan2(y, x) modulo π that sorts alike and is quicker: −x / (|x| + |y|) on the side y ≥ 0."""
    with np.errstate(invalid="ignore"):  # a source pixel at the epipole has no angle: nan, last in the order
        return xp.where(y < 0, x, -x) / (xp.abs(x) + xp.abs(y))


def _search(angles, sides):
    """Places (B, K) of `sides` in the sorted rows of `angles` (B, N)."""
    if isinstance(angles, Tensor):
        return torch.searchsorted(angles, sides)
    return np.stack([np.searchsorted(row, of_row) for row, of_row in zip(angles, sides, strict=True)])


def _like(array: np.ndarray, other):
    """The array itself, or a tensor of it where the other is a tensor."""
    return torch.as_tensor(array, device=other.device) if isinstance(other, Tensor) else array


class _BandSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v: Tensor, pencil: Pencil) -> Tensor:
        ctx.pencil = pencil
        return pencil._range_sum(v)

    @staticmethod
    def backward(ctx, g: Tensor):
        return _BandSumAdjoint.apply(g, ctx.pencil), None


class _BandSumAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g: Tensor, pencil: Pencil) -> Tensor:
        ctx.pencil = pencil
        return pencil._range_sum_adjoint(g)

    @staticmethod
    def backward(ctx, v: Tensor):
        return _BandSum.apply(v, ctx.pencil), None


def _take(v: Tensor, index: Tensor) -> Tensor:
    """v (B, M, N) read at index (B, K) → (B, M, K)."""
    if len(index) == 1:
        return v[0].index_select(-1, index[0])[None]
    if v.device.type == "cpu":  # there index_select is several times faster than gather
        return torch.stack([maps.index_select(-1, i) for maps, i in zip(v, index, strict=True)])
    return v.gather(-1, index[:, None].expand(-1, v.shape[1], -1))


def _running_sum(v: Tensor) -> Tensor:
    """(B, M, N) → (B, M, N + 1): s[k] = v[0] + … + v[k − 1]; torch adds float32 up in double on the CPU."""
    running = v.new_empty(*v.shape[:-1], v.shape[-1] + 1)
    running[..., 0] = 0
    torch.cumsum(v, -1, out=running[..., 1:])
    return running


class _RangeMax(torch.autograd.Function):
    """Maximum of v (B, M, N) over [lo, hi): two overlapping blocks of 2^p values cover any range.

    The gradient goes to one value of each range, also where several are equal.
    """

    @staticmethod
    def forward(ctx, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        ctx.save_for_backward(v, lo, hi)
        size = v.shape[-1]
        table = v[..., None, :].repeat(1, 1, size.bit_length(), 1)  # (B, M, levels, N), row p: blocks of 2^p
        for p in range(1, table.shape[-2]):
            above, step = table[..., p - 1, :], 2 ** (p - 1)
            torch.maximum(above[..., :-step], above[..., step:], out=table[..., p, :-step])
        left, right = _block_ends(size, lo, hi)
        return torch.maximum(_take(table.flatten(-2), left), _take(table.flatten(-2), right))

    @staticmethod
    def backward(ctx, g: Tensor):
        v, lo, hi = ctx.saved_tensors
        size = v.shape[-1]
        place = torch.arange(size, device=v.device).expand(v.shape)
        table = place[..., None, :].repeat(1, 1, size.bit_length(), 1)  # where each block has its maximum
        for p in range(1, table.shape[-2]):
            step = 2 ** (p - 1)
            right = v[..., step:] > v[..., :-step]
            v = torch.where(right, v[..., step:], v[..., :-step])
            place = torch.where(right, place[..., step:], place[..., :-step])
            table[..., p, : place.shape[-1]] = place
        v = ctx.saved_tensors[0]
        left, right = (_take(table.flatten(-2), ends) for ends in _block_ends(size, lo, hi))
        place = torch.where(v.gather(-1, right) > v.gather(-1, left), right, left)
        return torch.zeros_like(v).scatter_add_(-1, place, g), None, None


def _block_ends(size: int, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Where, in a table of rows of blocks, the first and the last block of 2^p values in [lo, hi) stand."""
    powers = 2 ** torch.arange(size.bit_length(), device=lo.device)
    level = torch.bucketize(hi - lo, powers, right=True) - 1
    return level * size + lo, level * size + hi - powers[level]


def _range_logsumexp(v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """log Σ exp(v) over [lo, hi): a suffix of one block and a prefix of the next, at the level where they part.

    At level p the order is cut into blocks of 2^p, and the table holds, counted from the seam of each pair
    of blocks, log-sum-exps running outwards.  A range's ends first fall into one pair at the highest bit in
    which they differ (a "disjoint sparse table").
    """
    levels = max(1, (v.shape[-1] - 1).bit_length())
    size = 2**levels
    v = torch.nn.functional.pad(v, (0, size - v.shape[-1]), value=torch.finfo(v.dtype).min / 4)
    table = [v]  # a range of one value
    for p in range(levels):
        left, right = v.unflatten(-1, (-1, 2, 2**p)).unbind(-2)  # (B, M, pairs, 2^p)
        left = left.flip(-1).logcumsumexp(-1).flip(-1)
        table.append(torch.stack([left, right.logcumsumexp(-1)], -2).flatten(-3))
    last = hi - 1
    powers = 2 ** torch.arange(levels, device=v.device)
    level = torch.bucketize(lo ^ last, powers, right=True)
    flat = torch.cat(table, -1)
    both = torch.logaddexp(_take(flat, level * size + lo), _take(flat, level * size + last))
    return torch.where((level == 0)[:, None], _take(v, lo), both)


def _redirect_pencil(values, F, threshold, out_shape):
    return Pencil.from_fundamental(F, tuple(values.shape[-2:]), threshold, out_shape).sum(values)


def _redirect_dense(values: Tensor, F: Tensor, threshold: float, out_shape: tuple[int, int]) -> Tensor:
    """The (reference × source) mask, applied as a matrix."""
    shape = tuple(values.shape[-2:])
    Fn = torch.as_tensor(_normalized_fundamental(F, shape, out_shape)[0])
    lines = Fn @ _like(_normalized_pixels(shape), Fn)  # (..., 3, N)
    normal = torch.linalg.vector_norm(lines[..., :2, :], dim=-2)  # (..., N)
    distance = (_like(_normalized_pixels(out_shape), Fn).mT @ lines).abs()  # (..., N', N), times the normal
    t = _check_threshold(threshold) * (1 + _TIE) / _half_size(out_shape)
    mask = (distance <= t * normal[..., None, :]) & (normal > _AT_EPIPOLE)[..., None, :]
    mask = mask.to(values.dtype)
    if values.ndim == 2:
        return (mask @ values.flatten()).unflatten(-1, out_shape)
    return (values.flatten(-2) @ mask.mT).unflatten(-1, out_shape)  # (..., J, N) (..., N, N')


def _redirect_loop(values: Tensor, F: Tensor, threshold: float, out_shape: tuple[int, int]) -> Tensor:
    """The original's nested loops in plain Python: for each map and source pixel, visit every reference pixel."""
    (height, width), (out_height, out_width) = values.shape[-2:], out_shape
    Fn, _ = _normalized_fundamental(F.cpu(), (height, width), out_shape)
    to_src, to_ref = (np.linalg.inv(_pixels_from(s)) for s in ((height, width), out_shape))
    F = (to_ref.mT @ Fn @ to_src).reshape(-1, 3, 3).tolist()
    maps = values.reshape(-1, height, width).tolist()
    limit = _check_threshold(threshold) * (1 + _TIE)
    out = [[[0.0] * out_width for _ in range(out_height)] for _ in maps]
    for m in range(len(maps)):
        f = F[m * len(F) // len(maps)]
        largest = sum(abs(row[0]) * width + abs(row[1]) * height + abs(row[2]) for row in f[:2])  # any normal can be
        for y, x in itertools.product(range(height), range(width)):
            a, b, c = (row[0] * x + row[1] * y + row[2] for row in f)
            normal = math.hypot(a, b)
            if normal <= _AT_EPIPOLE * largest:
                continue
            for y_ref in range(out_height):
                for x_ref in range(out_width):
                    if abs(a * x_ref + b * y_ref + c) <= limit * normal:
                        out[m][y_ref][x_ref] += maps[m][y][x]
    return torch.tensor(out, dtype=values.dtype, device=values.device).reshape(*values.shape[:-2], *out_shape)


def _normalized_fundamental(F: Tensor, shape: tuple[int, int], out_shape: tuple[int, int]) -> tuple:
    """F between coordinates that have the picture's centre as origin and its half-size as unit, of rank 2 exactly.

    F_n = T_ref⁻ᵀ F T_src⁻¹, scaled to a largest singular value of 1; the smallest, which must be rounding of F's
    own dtype, is set to zero.  Returns F_n (..., 3, 3) and the epipole e' of the reference view (..., 3) with
    e'₃ ≥ 0, in float64; numpy for an F on the CPU, torch otherwise.  Raises ValueError for nan, zeros, ranks 1 and 3.
    """
    if F.shape[-2:] != (3, 3) or F.ndim not in (2, 3) or 0 in F.shape:
        raise ValueError(f"F must be (3, 3) or (B, 3, 3), got {tuple(F.shape)}")
    eps = torch.finfo(F.dtype if F.is_floating_point() else torch.float64).eps
    rounding = max(math.sqrt(eps), 1e-6)  # a float64 may have been float32 before
    F = F.detach().double()
    F = F.numpy() if F.device.type == "cpu" else F
    xp = array_namespace(F)
    if not xp.isfinite(F).all():
        raise ValueError(f"F holds nan or inf: {F.tolist()}")
    U, S, Vh = xp.linalg.svd(_like(_pixels_from(out_shape), F).mT @ F @ _like(_pixels_from(shape), F))
    if (S[..., 0] == 0).any():
        raise ValueError("F is all zeros")
    if (S[..., 1] <= rounding * S[..., 0]).any():
        raise ValueError(f"F has rank 1, a fundamental matrix has rank 2; singular values {S.tolist()}")
    if (S[..., 2] > rounding * S[..., 0]).any():
        raise ValueError(f"F has rank 3, a fundamental matrix has rank 2; singular values {S.tolist()}")
    e = U[..., 2]
    Fn = (U[..., :2] * (S[..., None, :2] / S[..., None, :1])) @ Vh[..., :2, :]
    return Fn, xp.where(e[..., 2:] < 0, -e, e)


def _tensor(F) -> Tensor:
    """F as a tensor; a numpy array is copied, for it may be read-only."""
    return F if isinstance(F, Tensor) else torch.tensor(np.asarray(F))


def _half_size(shape: tuple[int, int]) -> float:
    return max(shape) / 2


@lru_cache(maxsize=32)
def _pixels_from(shape: tuple[int, int]) -> np.ndarray:
    """The affine T⁻¹ (3, 3) from normalised coordinates (centre as origin, half-size as unit) to pixels."""
    (height, width), h = shape, _half_size(shape)
    return np.array([[h, 0, (width - 1) / 2], [0, h, (height - 1) / 2], [0, 0, 1]])


@lru_cache(maxsize=32)
def _normalized_pixels(shape: tuple[int, int]) -> np.ndarray:
    """Homogeneous normalised coordinates of all pixels, row by row: (3, N)."""
    (height, width), h = shape, _half_size(shape)
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    return np.stack([(x - (width - 1) / 2) / h, (y - (height - 1) / 2) / h, np.ones(len(x))])


def _check_shape(shape) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1 or any(int(v) != v for v in shape):
        raise ValueError(f"a heatmap's shape is (H, W), two positive integers, got {tuple(shape)}")
    return int(shape[0]), int(shape[1])


def _check_threshold(threshold: float) -> float:
    threshold = float(threshold)
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be a positive number of pixels, got {threshold}")
    return threshold


def _describe(values) -> str:
    return f"{tuple(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
