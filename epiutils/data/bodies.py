"""Joints of the body as detectors number them, the bones between them, and which detector's order it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from epiutils.data import views
from epiutils.space import Body

_FEET = "lbigtoe lsmalltoe lheel rbigtoe rsmalltoe rheel"
_SIDES = "nose leye reye lear rear lsho rsho lelb relb lwri rwri lhip rhip lkne rkne lank rank"
_ORDERS = {
    "BODY_25B": f"{_SIDES} neck head {_FEET}",
    "BODY_25": "nose neck rsho relb rwri lsho lelb lwri midhip rhip rkne rank lhip lkne lank reye leye rear lear "
    + _FEET,
    "COCO": "nose neck rsho relb rwri lsho lelb lwri rhip rkne rank lhip lkne lank reye leye rear lear",
    "HALPE_26": f"{_SIDES} head neck midhip lbigtoe rbigtoe lsmalltoe rsmalltoe lheel rheel",
    "COCO_17": _SIDES,
    "COCO_133": f"{_SIDES} {_FEET} face0:68 lhand0:21 rhand0:21",
    "BODY_135": f"{_SIDES} neck head {_FEET} lhand1:21 rhand1:21 face0:70",
}
_LIMBS = """nose-leye leye-lear nose-reye reye-rear nose-neck neck-head lsho-rsho neck-lsho neck-rsho lsho-lelb lelb-lwri
rsho-relb relb-rwri neck-midhip midhip-lhip midhip-rhip lhip-rhip lsho-lhip rsho-rhip lhip-lkne lkne-lank rhip-rkne
rkne-rank lank-lheel rank-rheel lank-lbigtoe lbigtoe-lsmalltoe rank-rbigtoe rbigtoe-rsmalltoe lwri-lhand0 rwri-rhand0"""
_WITHOUT_NECK = "nose-lsho nose-rsho"


class Names(tuple):
    """Names of joints in order; asked for the number of one that is not there, it lists them."""

    def index(self, name: str, *span: int) -> int:
        if name not in self:
            raise ValueError(f"no joint {name!r}; there are: {', '.join(self)}")
        return super().index(name, *span)


def _names(order: str) -> Names:
    """The order's names, lhand1:21 being lhand1 to lhand20."""
    names = []
    for word in order.split():
        stem, _, end = word.partition(":")
        kind = stem.rstrip("0123456789")
        names += [f"{kind}{i}" for i in range(int(stem[len(kind) :]), int(end))] if end else [word]
    return Names(names)


def _pairs(names: Names) -> tuple[tuple[int, int], ...]:
    """Pairs of joint numbers: every limb of which the order has both ends, and the fingers."""
    limbs = _LIMBS + ("" if "neck" in names else f" {_WITHOUT_NECK}")
    limbs = [tuple(limb.split("-")) for limb in limbs.split()]
    for side in "lr":
        root = f"{side}hand0" if f"{side}hand0" in names else f"{side}wri"
        for finger in range(1, 21, 4):
            limbs += pairwise([root, *(f"{side}hand{finger + i}" for i in range(4))])
    return tuple(tuple(map(names.index, ends)) for ends in limbs if set(ends) <= set(names))


JOINTS = {model: _names(order) for model, order in _ORDERS.items()}  # l and r are the person's own left and right
BODY_BONES = {model: _pairs(names) for model, names in JOINTS.items()}  # for drawing
DETECTED = tuple(JOINTS)  # the orders in which detectors write files
# That of a dataset, in which networks may have been trained
JOINTS["HUMAN36M_17"], BODY_BONES["HUMAN36M_17"] = Names(views.JOINTS), views.BONES


def guess_model(people: np.ndarray, among: Iterable[str] = JOINTS) -> str:
    """The body model of people (N, J, 2 or more), nan where undetected, by the number of keypoints and how they lie.

    25 are BODY_25B's or BODY_25's: in its own order a body's bones are short; read in the other's, wrists are joined to
    hips and eyes to shoulders.  17 are COCO_17's or HUMAN36M_17's: the first five are nose, eyes and ears there, and here
    hips, a knee and an ankle.  among: the models that it may be.
    Raises ValueError for other numbers of keypoints; where the longer mean bone is not 1.25 times the shorter, or fewer
    than 30 bones are seen in either; and where the median of how far the first five lie apart, over the extent of the
    person, is between 0.23 and 0.35, or nobody is seen.  (It was at most 0.17 and at least 0.41 over four cameras of
    embedded people.)
    """
    among = list(among)
    fitting = [model for model in among if len(JOINTS[model]) == people.shape[1]]
    if not fitting:
        known = ", ".join(f"{model} {len(JOINTS[model])}" for model in among)
        raise ValueError(f"{people.shape[1]} keypoints a person, which no model has: {known}")
    if len(fitting) == 1:
        return fitting[0]
    return (_by_face if people.shape[1] == 17 else _by_bones)(people[..., :2], fitting)


def _by_bones(xy: np.ndarray, models: Sequence[str]) -> str:
    length = {}
    for model in models:
        a, b = np.array(BODY_BONES[model]).T
        bones = np.linalg.norm(xy[:, a] - xy[:, b], axis=-1)  # (N, bones)
        bones = bones[np.isfinite(bones)]
        length[model] = float(bones.mean()) if len(bones) >= 30 else np.nan
    short, long = sorted(length, key=length.get)
    if not length[long] >= 1.25 * length[short]:
        raise ValueError(f"cannot tell {' from '.join(models)} (mean bone, px: {length}): pass model=")
    return short


def _by_face(xy: np.ndarray, models: Sequence[str]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all nan
        first, whole = (np.nanmax(p, 1) - np.nanmin(p, 1) for p in (xy[:, :5], xy))
        share = float(np.nanmedian(np.hypot(*first.T) / whole.max(-1)))
    if not (share < 0.23 or share > 0.35):
        raise ValueError(f"cannot tell {' from '.join(models)} (the first five joints span {share:.2f} of the person)")
    return "COCO_17" if share < 0.23 else "HUMAN36M_17"


# Parent, child, length as a share of stature, and its deviation as a share of the length (after Drillis & Contini 1966;
# what detectors take for shoulders and hips lies further in, and differs more)
_TREE = (
    ("lsho", "rsho", 0.21, 0.15),
    ("lsho", "lhip", 0.288, 0.1),
    ("lhip", "rhip", 0.13, 0.2),
    *(bone for s in "lr" for bone in ((f"{s}sho", f"{s}elb", 0.172, 0.08), (f"{s}elb", f"{s}wri", 0.146, 0.08))),
    *(bone for s in "lr" for bone in ((f"{s}hip", f"{s}kne", 0.245, 0.08), (f"{s}kne", f"{s}ank", 0.246, 0.08))),
)


def grown(model: str) -> Body:
    """The tree of bones of a grown person as a detector sees it, for `space.along_bones`: trunk, arms and legs.

    Of nobody in particular: stature 1.70 ± 0.14 m.  Joints that are in no bone, such as eyes and toes, stand alone.
    """
    place = {name: number for number, name in enumerate(JOINTS[model])}
    mean, deviation = np.array([bone[2:] for bone in _TREE]).T
    bones = tuple((place[parent], place[child]) for parent, child, *_ in _TREE)
    whole = mean.sum()
    return Body(bones, mean / whole, deviation * mean / whole, (1.70 * whole, 0.14 * whole))
