"""Colours and overlays: the only module that rescales values, and only for the eye.

Numbers are never read from anything made here. Signed maps are drawn with a diverging
map (Moreland's cool-warm: both arms have the same lightness, zero is a neutral grey,
and it survives red-green blindness), others with inferno, whose lightness rises evenly;
neither invents edges, as jet does. A map without contrast is drawn flat and said to be
flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.ndimage import distance_transform_edt

from consilience.types import Array, ConsilienceError

RGB = tuple[int, int, int]

PERCENTILE = 99.5
"""Limits ignore the outermost half per cent, so that one hot pixel does not turn the
rest dark.
"""

FLAT_RANGE = 1e-5
"""A map whose spread is below this share of its largest value is flat: what is left is
rounding of float32.
"""

DIVERGING, SEQUENTIAL = "coolwarm", "inferno"
SHADES = 511  # odd, so that zero has a shade of its own
NEUTRAL: RGB = (221, 221, 221)
"""The colour of zero in a signed map, of a flat map, and of what is not a number."""

ONLY_A: RGB = (0, 114, 178)
ONLY_B: RGB = (230, 159, 0)
SHARED: RGB = (255, 255, 255)
"""Two of Okabe and Ito's colours and white: three lightnesses, apart for every kind of
colour vision.
"""

CONTOUR: RGB = (255, 255, 255)
NONE = np.empty(0, dtype=np.int64)
_LUMA = np.array([0.299, 0.587, 0.114])


# ---- from values to colours


@dataclass(frozen=True)
class Scale:
    """The limits a map is drawn between; symmetric round zero where it is signed.

    Flat where nothing lies between.
    """

    low: float
    high: float
    signed: bool
    flat: bool = False

    @property
    def words(self) -> tuple[str, str]:
        """Both limits as they are written under a colour bar."""
        return scale_number(self.low), scale_number(self.high)

    def share(self, values: Array) -> Array:
        """Values as shares of the scale in [0, 1] (signed: zero at one half); NaN stays
        NaN.
        """
        if self.flat:
            return np.where(np.isfinite(values), 0.5, np.nan)
        return np.clip(
            (values.astype(np.float64) - self.low) / (self.high - self.low), 0.0, 1.0
        )

    def strength(self, values: Array) -> Array:
        """How loud a value is, in [0, 1]: its distance from zero in a signed map, from
        the lower limit in another.
        """
        if self.flat:
            return np.zeros(values.shape)
        share = self.share(values)
        return np.nan_to_num(np.abs(2 * share - 1) if self.signed else share)


def limits(values: Array, signed: bool | None = None) -> Scale:
    """Robust limits of a map (any shape): the 99.5th percentile of |values| both ways
    round zero where it is ``signed`` (None: where it has negative values beyond
    rounding), else the .5th and 99.5th percentile. Not finite is left out.
    """
    known = values[np.isfinite(values)].astype(np.float64)
    if known.size == 0:
        return Scale(0.0, 0.0, bool(signed), flat=True)
    loud = float(np.percentile(np.abs(known), PERCENTILE)) or float(
        np.abs(known).max()
    )
    if signed is None:
        signed = bool(known.min() < -FLAT_RANGE * loud)
    if signed:
        return Scale(-loud, loud, True, flat=bool(np.ptp(known) <= FLAT_RANGE * loud))
    low, high = (
        float(edge) for edge in np.percentile(known, [100 - PERCENTILE, PERCENTILE])
    )
    if high - low <= FLAT_RANGE * loud:
        low, high = float(known.min()), float(known.max())
    return Scale(low, high, False, flat=high - low <= FLAT_RANGE * loud)


@cache
def shades_of(signed: bool) -> Array:
    """The colours of a scale from low to high, (511, 3) uint8."""
    import matplotlib

    table = matplotlib.colormaps[DIVERGING if signed else SEQUENTIAL].resampled(
        SHADES
    )
    return np.round(table(np.arange(SHADES))[:, :3] * 255).astype(np.uint8)


def colour_stops(signed: bool, count: int = 9) -> tuple[str, ...]:
    """``count`` colours of a scale from its low to its high end as #rrggbb, for a
    legend.
    """
    picked = shades_of(signed)[np.linspace(0, SHADES - 1, count).round().astype(int)]
    return tuple(
        hex_of(tuple(int(channel) for channel in colour)) for colour in picked
    )


def hex_of(colour: Sequence[int]) -> str:
    """A colour as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def map_colours(
    values: Array, signed: bool | None = None, scale: Scale | None = None
) -> Array:
    """A map (h, w) as colours (h, w, 3) uint8.

    Zero of a signed map, a flat map and what is not finite are `NEUTRAL`.
    """
    scale = scale or limits(values, signed)
    if scale.flat:
        return np.broadcast_to(np.array(NEUTRAL, np.uint8), (*values.shape, 3)).copy()
    share = scale.share(values)
    known = np.isfinite(share)
    index = np.round(np.where(known, share, 0) * (SHADES - 1)).astype(int)
    painted: Array = shades_of(scale.signed)[index]
    painted[~known] = NEUTRAL
    return painted


# ---- on the image


def overlay(
    image: Array, values: Array, alpha: float = 0.75, scale: Scale | None = None
) -> Array:
    """A map (h, w) over its image (h, w, 3) uint8, the more opaque (up to ``alpha``)
    the louder the value.

    Where the map says nothing the image is left as it is; a flat map leaves all of it.
    """
    _same_frame(image, values)
    scale = scale or limits(values)
    opacity = alpha * scale.strength(values)
    return _blend(image, map_colours(values, scale=scale), opacity[..., None])


def superpixels(
    image: Array,
    segments: Array,
    weights: Array,
    sure: Array = NONE,
    unsure: Array = NONE,
    alpha: float = 0.65,
) -> Array:
    """Signed ``weights`` (S,) of superpixels ``segments`` (h, w) int 0..S-1 over the
    image, with the borders drawn.

    Those in ``sure`` (indices) have a thick border, white on black; those in ``unsure``
    are hatched.
    """
    _same_frame(image, segments)
    if segments.min() < 0 or segments.max() >= len(weights):
        raise ConsilienceError(
            f"segments run from {segments.min()} to {segments.max()}; there are "
            f"{len(weights)} weights"
        )
    painted = overlay(
        image, weights[segments], alpha, limits(weights[segments], signed=True)
    )
    drawn = superpixel_marks(segments, sure, unsure)
    painted = _blend(painted, np.array(CONTOUR), 0.55 * (drawn == BORDER)[..., None])
    painted[drawn == BRIGHT] = CONTOUR
    painted[drawn == DARK] = (0, 0, 0)
    return painted


BORDER, BRIGHT, DARK = 1, 2, 3
"""What `superpixel_marks` marks: a border, and pixels that are white or black."""


def superpixel_marks(
    segments: Array, sure: Array = NONE, unsure: Array = NONE
) -> Array:
    """What is drawn on superpixels besides their colours (h, w) uint8: `BORDER` between
    them, hatching and thick borders `BRIGHT`, the lining of those `DARK`, elsewhere 0.
    """
    drawn = np.zeros(segments.shape, np.uint8)
    drawn[_boundaries(segments, mode="inner", background=-1)] = BORDER
    drawn[np.isin(segments, unsure) & _hatch(segments.shape)] = BRIGHT
    width = max(2, round(min(segments.shape) / 110))
    for number in sure:  # just inside, so that it shows on any colour
        depth = distance_transform_edt(np.pad(segments == number, 1))[1:-1, 1:-1]
        drawn[(depth > 0) & (depth <= width + 1)] = DARK
        drawn[(depth > 0) & (depth <= width)] = BRIGHT
    return drawn


def _hatch(shape: tuple[int, ...]) -> Array:
    """Thin diagonals, a ninth of the pixels of a frame of usual size: what is under
    them stays to be seen.
    """
    step = max(4, round(min(shape) / 25))
    y, x = np.indices(shape)
    hatch: Array = (x + y) % step == 0
    return hatch


def _boundaries(of: Array, mode: str, background: int) -> Array:
    from skimage.segmentation import find_boundaries

    found: Array = find_boundaries(of, mode=mode, background=background)
    return found


def mask(image: Array, on: Array) -> Array:
    """What a mask (h, w) bool keeps of the image: inside untouched, outside grey and
    dim, a contour just outside.
    """
    _same_frame(image, on)
    shown = np.where(on[..., None], image, _muted(image))
    shown[_boundaries(on, mode="outer", background=0) & ~on] = CONTOUR
    return shown.astype(np.uint8)


def both(image: Array, a: Array, b: Array, alpha: float = 0.62) -> Array:
    """Two masks (h, w) bool over the image: `ONLY_A`, `ONLY_B` and `SHARED` where both
    are, the rest grey and dim.
    """
    _same_frame(image, a)
    _same_frame(image, b)
    shown = _muted(image)
    grey = np.repeat(_grey(image)[..., None], 3, axis=2)
    for part, colour in ((a & ~b, ONLY_A), (b & ~a, ONLY_B), (a & b, SHARED)):
        tinted = _blend(grey, np.array(colour), alpha)
        shown[part] = tinted[part]
    return shown


def _same_frame(image: Array, values: Array) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ConsilienceError(
            f"an image to draw on is (h, w, 3) uint8; got {image.dtype} {image.shape}"
        )
    if image.shape[:2] != values.shape:
        raise ConsilienceError(
            f"the image's frame is {image.shape[:2]}; the map or mask is {values.shape}"
        )


def _blend(below: Array, above: Array, opacity: Array | float) -> Array:
    mixed = below * (1.0 - opacity) + above * opacity
    return np.round(mixed).astype(np.uint8)


def _grey(image: Array) -> Array:
    grey: Array = np.round(image @ _LUMA)
    return grey


def _muted(image: Array) -> Array:
    """The image without its colours and at a third of its light: there, but not what is
    looked at.
    """
    return np.repeat(np.round(0.38 * _grey(image))[..., None], 3, axis=2).astype(
        np.uint8
    )


def scale_number(value: float) -> str:
    """A limit of a scale, two digits."""
    return f"{value:.2g}".replace("-", "−").replace("e−0", "e−").replace("e+0", "e")
