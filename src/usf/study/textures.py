"""The built-in image set: procedural woven cloth with seven kinds of defect, in MVTec layout.

For machines without real images, and for tests. Every normal image differs (phase, shear, waviness, yarn shades, light,
grain), and most defects are faint or purely structural, so that neither the mean colour nor the brightness tells an
anomaly; a detector has to know the weave.

Integers only: draws come from the raw PCG64 stream, geometry is fixed-point, and there is no call into a platform's
libm. The pixels are therefore the same everywhere, and :data:`SHA256` holds their hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from usf import paths

__all__ = ["CLASS", "DEFECTS", "SHA256", "SIZE", "TextureError", "ensure", "generate", "sha256_of_folder"]

CLASS = "weave"
SIZE = 256
"""Height and width, pixels."""
SEED = 20251
COUNTS = {False: (60, 20, 8), True: (12, 4, 2)}
"""small -> (train, good test, test of each defect). The small set is the beginning of the large one."""

SHA256 = {
    False: "4a8ddd0fe9a7100364d4bf6ccd20a98f3dd122e500618c7927dabf8ab6061c0d",
    True: "780d4d16499e8f6a4e457e7c5920bfef9170383a91f67a25bb68dc38da493ba5",
}
"""small -> hash of all decoded pixels, see :func:`sha256_of_folder`."""

Pixels = NDArray[np.uint8]
Ints = NDArray[np.int32]
Mask = NDArray[np.bool_]

UNIT = 16
"""Fixed point: sixteenths of a pixel."""
PERIOD = 14 * UNIT
"""Distance between neighbouring yarns."""
WARP = np.array([92, 104, 138], dtype=np.int32)
WEFT = np.array([176, 166, 148], dtype=np.int32)
GROUND = np.array([38, 34, 34], dtype=np.int32)

ROWS, COLUMNS = (axis.astype(np.int32) for axis in np.mgrid[0:SIZE, 0:SIZE])


class TextureError(RuntimeError):
    """The built-in set is not what it should be, and making it anew did not help."""


class _Draws:
    """Random integers from the raw PCG64 stream, which numpy promises never to change (its Generator may)."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(list(key)))

    def array(self, low: int, high: int, *shape: int) -> Ints:
        """Integers in [low, high], both included."""
        raw = np.asarray(self._bits.random_raw(int(np.prod(shape))), dtype=np.uint64)
        return ((raw >> np.uint64(11)) % np.uint64(high - low + 1)).astype(np.int32).reshape(shape) + low

    def one(self, low: int, high: int) -> int:
        """One integer in [low, high]."""
        return low + (int(self._bits.random_raw()) >> 11) % (high - low + 1)

    def either(self, *choices: int) -> int:
        """One of the choices."""
        return choices[self.one(0, len(choices) - 1)]

    def field(self, cell: int, amplitude: int) -> Ints:
        """Smooth noise in [-amplitude, amplitude], (SIZE, SIZE): bilinear between draws ``cell`` pixels apart."""
        knots = SIZE // cell + 2
        grid = self.array(-amplitude, amplitude, knots, knots)
        row, column, y, x = ROWS // cell, COLUMNS // cell, ROWS % cell, COLUMNS % cell
        above = grid[row, column] * (cell - x) + grid[row, column + 1] * x
        below = grid[row + 1, column] * (cell - x) + grid[row + 1, column + 1] * x
        return np.asarray((above * (cell - y) + below * y) // (cell * cell))


@dataclasses.dataclass
class _Cloth:
    """One image in the making; a defect changes the fields before, or the pixels after :meth:`render`.

    Attributes:
        x, y: where each pixel lies on the undisturbed cloth, sixteenths of a pixel.
        reversed: where the diagonal of the twill runs the other way.
        gap: where the yarn across is missing.
    """

    draws: _Draws
    x: Ints
    y: Ints
    reversed: Mask
    gap: Mask

    @classmethod
    def normal(cls, draws: _Draws) -> _Cloth:
        """Cloth without a defect, laid a little askew."""
        x = COLUMNS * UNIT + draws.one(0, 4 * PERIOD) + ROWS * draws.one(-8, 8) // 16 + draws.field(64, 14)
        y = ROWS * UNIT + draws.one(0, 4 * PERIOD) + COLUMNS * draws.one(-8, 8) // 16 + draws.field(64, 14)
        # Far from zero, so that yarn numbers stay positive whatever a defect does.
        return cls(draws, x + 8 * PERIOD, y + 8 * PERIOD, np.zeros((SIZE, SIZE), bool), np.zeros((SIZE, SIZE), bool))

    def render(self) -> Ints:
        """Colours (SIZE, SIZE, 3), not yet clipped."""
        draws = self.draws
        warp, weft = self.x // PERIOD, self.y // PERIOD
        across, along = self.x % PERIOD - PERIOD // 2, self.y % PERIOD - PERIOD // 2
        diagonal = np.where(self.reversed, warp - weft, warp + weft) % 4
        warp_above = (diagonal < 2) | self.gap

        # Shade in 256ths: round yarns, darker at their flanks and where they dive under the next one.
        square = (PERIOD // 2) ** 2
        flank = np.where(warp_above, across, along) ** 2
        dive = np.where(warp_above, along, across) ** 2
        shade = 256 - 120 * flank // square - 36 * dive // square

        count = (SIZE * UNIT) // PERIOD + 24
        warp_tint = draws.array(-7, 7, count, 1) + draws.array(-3, 3, count, 3)
        weft_tint = draws.array(-7, 7, count, 1) + draws.array(-3, 3, count, 3)
        colour = np.where(
            warp_above[..., None],
            WARP + warp_tint[warp % count],
            WEFT + weft_tint[weft % count],
        )
        # A shift is a floor division by 256, also of negative numbers, and faster.
        colour = colour * shade[..., None] >> 8
        # Without the yarn across, the ground shows between the yarns along.
        hollow = self.gap & (diagonal >= 2)
        colour = np.where(hollow[..., None], (colour + GROUND) // 2, colour)

        light = 256 + draws.one(-14, 14) + draws.field(128, 12)
        grain = draws.field(2, 7) + draws.array(-5, 5, SIZE, SIZE)
        return np.asarray((colour * light[..., None] >> 8) + grain[..., None])


# --- defects ----------------------------------------------------------------------------------------------------------
# Each takes undisturbed cloth and returns colours and the mask of what it changed.


def _place(draws: _Draws, margin: int) -> tuple[int, int]:
    return draws.one(margin, SIZE - 1 - margin), draws.one(margin, SIZE - 1 - margin)


def _distance(row: int, column: int) -> Ints:
    """Squared distance in pixels to a point."""
    return np.asarray((ROWS - row) ** 2 + (COLUMNS - column) ** 2)


def _line(start: tuple[int, int], end: tuple[int, int], half_width: int) -> Mask:
    """Pixels closer than ``half_width`` sixteenths of a pixel to a segment; end points (row, column) in sixteenths."""
    # Products of squared lengths need 64 bits.
    rows, columns = (axis.astype(np.int64) * UNIT - origin for axis, origin in zip((ROWS, COLUMNS), start, strict=True))
    down, right = end[0] - start[0], end[1] - start[1]
    length = down * down + right * right
    if length == 0:
        return np.asarray(rows**2 + columns**2 <= half_width**2)
    position = rows * down + columns * right
    beside = (rows * right - columns * down) ** 2 <= half_width**2 * length
    near = (rows**2 + columns**2 <= half_width**2) | ((rows - down) ** 2 + (columns - right) ** 2 <= half_width**2)
    return np.asarray((beside & (position >= 0) & (position <= length)) | near)


def _curve(draws: _Draws, reach: int, half_width: int, pieces: int = 24) -> Mask:
    """A quadratic Bezier curve through the image, ``reach`` pixels across."""
    row, column = _place(draws, 40)
    knots = [((row + draws.one(-reach, reach)) * UNIT, (column + draws.one(-reach, reach)) * UNIT) for _ in range(3)]
    points = [
        tuple(
            ((pieces - t) ** 2 * a + 2 * t * (pieces - t) * b + t * t * c) // pieces**2
            for a, b, c in zip(*knots, strict=True)
        )
        for t in range(pieces + 1)
    ]
    mask = np.zeros((SIZE, SIZE), bool)
    for (r0, c0), (r1, c1) in itertools.pairwise(points):
        mask |= _line((r0, c0), (r1, c1), half_width)
    return mask


def _scratch(cloth: _Cloth) -> tuple[Ints, Mask]:
    """A thin straight line, lighter or darker than the cloth by an eighth to a third."""
    draws, colour = cloth.draws, cloth.render()
    row, column = _place(draws, 60)
    down, right = draws.one(-50, 50), draws.either(-1, 1) * draws.one(15, 50)
    ends = ((row - down) * UNIT, (column - right) * UNIT), ((row + down) * UNIT, (column + right) * UNIT)
    line = _line(*ends, draws.one(12, 22))
    strength = draws.either(-1, 1) * draws.one(30, 80)
    colour = np.where(line[..., None], colour + colour * strength // 256, colour)
    return colour, _line(*ends, 28)


def _hole(cloth: _Cloth) -> tuple[Ints, Mask]:
    """A ragged hole through which the ground shows."""
    draws, colour = cloth.draws, cloth.render()
    row, column = _place(draws, 30)
    radius = draws.one(4, 11)
    ragged = _distance(row, column) + draws.field(4, radius * radius // 3 + 4)
    hole = ragged <= radius * radius
    rim = (ragged <= (radius + 2) ** 2) & ~hole
    dark = GROUND + draws.array(-6, 6, SIZE, SIZE)[..., None]
    colour = np.where(hole[..., None], dark, np.where(rim[..., None], colour * 7 // 8, colour))
    return colour, hole | rim


def _stain(cloth: _Cloth) -> tuple[Ints, Mask]:
    """A soft-edged patch that takes a tenth to a quarter of some colour away."""
    draws, colour = cloth.draws, cloth.render()
    row, column = _place(draws, 40)
    radius = draws.one(12, 28)
    spread = _distance(row, column) + draws.field(16, radius * radius // 2)
    falloff = np.clip(256 - 256 * spread // (radius * radius), 0, 256)
    strength = draws.one(30, 70)
    take = np.array([strength, strength, strength], dtype=np.int32)
    take[draws.one(0, 2)] //= 2
    colour = colour - colour * (falloff[..., None] * take // 256) // 256
    return colour, falloff > 48


def _thread(cloth: _Cloth) -> tuple[Ints, Mask]:
    """A loose fibre of another colour on top, with its shadow."""
    draws, colour = cloth.draws, cloth.render()
    fibre = _curve(draws, draws.one(25, 60), draws.one(11, 20))
    shadow = np.roll(fibre, (1, 1), axis=(0, 1)) & ~fibre
    tint = np.array([(150, 60, 56), (206, 200, 190), (52, 56, 60), (120, 130, 84)], dtype=np.int32)[draws.one(0, 3)]
    shown = (3 * (tint + draws.field(4, 14)[..., None]) + colour) // 4
    colour = np.where(fibre[..., None], shown, np.where(shadow[..., None], colour * 3 // 4, colour))
    return colour, fibre | shadow


def _misweave(cloth: _Cloth) -> tuple[Ints, Mask]:
    """A patch whose diagonal runs the other way: same yarns, same colours, another structure."""
    draws = cloth.draws
    warp, weft = cloth.x // PERIOD, cloth.y // PERIOD
    row, column = _place(draws, 50)
    wide, high = draws.one(3, 6), draws.one(3, 6)
    inside = (abs(warp - warp[row, column]) * 2 <= wide) & (abs(weft - weft[row, column]) * 2 <= high)
    cloth.reversed = inside
    return cloth.render(), inside


def _missing_yarn(cloth: _Cloth) -> tuple[Ints, Mask]:
    """One yarn across is missing over a quarter to half of the width."""
    draws = cloth.draws
    row, column = _place(draws, 50)
    weft = cloth.y // PERIOD
    gap = (weft == weft[row, column]) & (abs(COLUMNS - column) <= draws.one(20, 60))
    cloth.gap = gap
    return cloth.render(), gap


def _bulge(cloth: _Cloth) -> tuple[Ints, Mask]:
    """Yarns pushed aside around a point by up to half their distance."""
    draws = cloth.draws
    row, column = _place(draws, 50)
    radius, push = draws.one(18, 34), draws.either(-1, 1) * draws.one(60, 110)
    near = np.clip(256 - 256 * _distance(row, column) // (radius * radius), 0, 256)
    # Displacement along the direction from the point: zero in the middle and at the edge.
    cloth.x = cloth.x - (COLUMNS - column) * near * push // (radius * 100)
    cloth.y = cloth.y - (ROWS - row) * near * push // (radius * 100)
    return cloth.render(), near > 24


DEFECTS: dict[str, Callable[[_Cloth], tuple[Ints, Mask]]] = {
    "bulge": _bulge,
    "hole": _hole,
    "missing_yarn": _missing_yarn,
    "misweave": _misweave,
    "scratch": _scratch,
    "stain": _stain,
    "thread": _thread,
}
"""Kind of defect -> what makes it."""


def generate(kind: str, index: int, seed: int = SEED) -> tuple[Pixels, Mask]:
    """Image ``index`` of a kind: ``"train"``, ``"good"`` (normal test images) or a key of :data:`DEFECTS`.

    Returns:
        colours (256, 256, 3), uint8, and the mask of the defect (256, 256), all false for normal images.

    Raises:
        ValueError: an unknown kind.

    >>> image, mask = generate("hole", 0)
    >>> image.shape, mask.any(), generate("train", 0)[1].any()
    ((256, 256, 3), np.True_, np.False_)
    """
    kinds = ["train", "good", *DEFECTS]
    if kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(kinds)}")
    # Keyed by the kind's name, so that adding a kind leaves the others as they are.
    cloth = _Cloth.normal(_Draws(seed, *kind.encode(), index))
    if kind in DEFECTS:
        colour, mask = DEFECTS[kind](cloth)
    else:
        colour, mask = cloth.render(), np.zeros((SIZE, SIZE), bool)
    return np.clip(colour, 0, 255).astype(np.uint8), mask


def _contents(small: bool) -> Iterator[tuple[str, str, int]]:
    """(folder, kind, index) of every image."""
    train, good, each = COUNTS[small]
    yield from (("train/good", "train", index) for index in range(train))
    yield from (("test/good", "good", index) for index in range(good))
    yield from ((f"test/{kind}", kind, index) for kind in DEFECTS for index in range(each))


def _write(folder: Path, small: bool) -> None:
    for part, kind, index in _contents(small):
        image, mask = generate(kind, index)
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / part / f"{index:03d}.png", compress_level=3)
        if kind in DEFECTS:
            masks = folder / "ground_truth" / kind
            masks.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"{index:03d}_mask.png")


def sha256_of_folder(folder: Path) -> str:
    """SHA-256 over names, shapes and decoded pixels of every PNG below ``folder``, in sorted order.

    Of pixels and not of files: two versions of a PNG encoder may write different bytes for the same image.
    """
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix()):
        with Image.open(path) as image:
            pixels = np.asarray(image)
        total.update(f"{path.relative_to(folder).as_posix()} {pixels.shape}\n".encode())
        total.update(np.ascontiguousarray(pixels).tobytes())
    return total.hexdigest()


def _intact(folder: Path, small: bool) -> bool:
    try:
        return folder.is_dir() and sha256_of_folder(folder) == SHA256[small]
    except (OSError, SyntaxError, ValueError):  # a file that cannot be decoded
        return False


def ensure(*, small: bool = False) -> Path:
    """The class folder of the built-in set in the cache, made if need be (seconds), verified on every call.

    A damaged copy is replaced, with a line that says so. Written beside its place and moved there when complete, so
    that an interrupted run leaves nothing half done, and two processes may do it at the same time.

    Args:
        small: a few images of every kind, for tests.

    Raises:
        TextureError: a freshly made set does not have the known hash.
    """
    home = paths.cache("textures", "small" if small else "full")
    folder = home / CLASS
    if _intact(folder, small):
        return folder
    if folder.exists():
        print(f"The built-in images in {folder} are damaged: making them anew.")
    home.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=home))
    try:
        fresh = partial / CLASS
        fresh.mkdir()
        _write(fresh, small)
        if not _intact(fresh, small):
            raise TextureError(
                f"the built-in images came out with SHA-256 {sha256_of_folder(fresh)}, expected {SHA256[small]}: "
                "the generator was changed without its hash, or the disk is full or failing"
            )
        if not _intact(folder, small):  # another process may have finished meanwhile
            if folder.exists():
                folder.rename(partial / "damaged")
            try:
                fresh.rename(folder)
            except OSError:
                if not _intact(folder, small):
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
