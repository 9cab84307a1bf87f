"""Slow, literal formulas for masks, intervals and agreement, and explanations made by
hand.
"""

import itertools
import math
import random
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
from lime.lime_image import ImageExplanation
from scipy import ndimage

from consilience.images import Placement
from consilience.types import ClassTarget, Explanation, Sample

# ---- explanations by hand


def explanation(
    values,
    explainer="gradcam",
    name="dog",
    shade=None,
    model="net@1a2b",
    index=3,
    score="logit",
    extras=None,
    view="squash",
):
    """An explanation of a plain image; the image's colour follows from its name, so
    that images differ as names do.
    """
    values = np.asarray(values, dtype=np.float32)
    size = values.shape
    shade = sum(name.encode()) % 256 if shade is None else shade
    sample = Sample(name, np.full((*size, 3), shade, dtype=np.uint8))
    geometry = (
        Placement.squash(size, size)
        if view == "squash"
        else Placement(size, (2 * size[0], 2 * size[1]), (0, 0), size)
    )
    target = ClassTarget(index, f"class {index}", score)
    return Explanation(
        sample,
        model,
        explainer,
        target,
        geometry,
        values,
        extras or {},
        {"view": view},
    )


def superpixel_explanation(segments, weights, refit=None, selected=None, **more):
    """As LIME leaves it: values paint the weights."""
    weights = np.asarray(weights, dtype=float)
    extras = {"segments": np.asarray(segments), "weights": weights}
    if refit is not None:
        extras["refit"] = np.asarray(refit, dtype=float)
    if selected is not None:
        extras["selected"] = np.asarray(selected)
    return explanation(
        weights[extras["segments"]],
        explainer=more.pop("explainer", "lime"),
        extras=extras,
        **more,
    )


def smooth(rng, size=32, sigma=4.0, centred=False):
    """A smooth random map; ``centred`` adds what all maps of a method may share."""
    field = ndimage.gaussian_filter(rng.normal(size=(size, size)), sigma, mode="wrap")
    field = field / field.std()
    if centred:
        y, x = np.mgrid[:size, :size] - (size - 1) / 2
        field = field + 4 * np.exp(-(x**2 + y**2) / (2 * (size / 5) ** 2))
    return field


# ---- masks


def literal_top(values, fraction):
    """Sort all pixels by falling value, equal ones as they stand, and take the first
    ones.
    """
    flat = [
        (-float(value), place)
        for place, value in enumerate(np.asarray(values, dtype=np.float32).ravel())
    ]
    exact = Fraction(str(fraction)) * len(flat)
    count = math.floor(exact + Fraction(1, 2))
    on = np.zeros(len(flat), dtype=bool)
    for _, place in sorted(flat)[:count]:
        on[place] = True
    return on.reshape(np.shape(values))


def lime_mask(segments, pairs, k):
    """The mask of lime itself; ``pairs`` are (superpixel, weight) in the order in which
    they were selected.
    """
    found = ImageExplanation(np.zeros((*segments.shape, 3)), segments)
    found.local_exp[0] = sorted(
        pairs, key=lambda pair: np.abs(pair[1]), reverse=True
    )  # as lime_base ends
    return found.get_image_and_mask(
        0, positive_only=True, num_features=k, hide_rest=False, min_weight=0.0
    )[1].astype(bool)


# ---- chance


def enumerated_iou(pixels, a, b):
    """Mean IoU over all masks of ``b`` pixels against one of ``a``, as a fraction."""
    first = set(range(a))
    total, count = Fraction(0), 0
    for second in itertools.combinations(range(pixels), b):
        total += Fraction(len(first & set(second)), len(first | set(second)))
        count += 1
    return total / count


def decimal_iou(pixels, a, b):
    """E[X / (a + b - X)] with X hypergeometric, in 60 digits from the ratios of the
    binomial coefficients.
    """
    with localcontext() as context:
        context.prec = 60
        weight, mass, total = Decimal(1), Decimal(0), Decimal(0)
        for x in range(max(0, a + b - pixels), min(a, b) + 1):
            mass += weight
            total += weight * x / (a + b - x)
            weight = weight * (a - x) * (b - x) / ((x + 1) * (pixels - a - b + x + 1))
        return float(total / mass)


def literal_iou(a, b):
    pairs = list(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    return sum(x and y for x, y in pairs) / sum(x or y for x, y in pairs)


def literal_shift_test(a, b):
    """p and positions: every shift of the mirrored mask rolled, every correlation by its
    formula.
    """
    height, width = a.shape
    shares, positions = [], []
    for fixed, moved in ((a, b), (b, a)):
        mirrored = np.block(
            [[moved, moved[:, ::-1]], [moved[::-1], moved[::-1, ::-1]]]
        )
        correlations = []
        for dy in range(2 * height):
            for dx in range(2 * width):
                window = np.roll(mirrored, (dy, dx), (0, 1))[:height, :width]
                x, y = fixed - fixed.mean(), window - window.mean()
                scale = np.sqrt((x**2).sum() * (y**2).sum())
                correlations.append((x * y).sum() / scale if scale > 0 else 0.0)
        shares.append(
            np.mean([one >= correlations[0] - 1e-9 for one in correlations])
        )
        positions.append(1 + 1 / np.mean(np.square(correlations)))
    share, number = max(shares), min(positions)
    return (1 + number * share) / (1 + number), number


def literal_ranks(values):
    flat = np.asarray(values).ravel().tolist()
    return [
        sum(other < one for other in flat)
        + (sum(other == one for other in flat) + 1) / 2
        for one in flat
    ]


def literal_spearman(a, b):
    x, y = literal_ranks(a), literal_ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return top / math.sqrt(
        sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y)
    )


def literal_excess(a, b):
    """(iou - E) / (1 - E), with E in 60 digits."""
    expected = decimal_iou(a.size, int(a.sum()), int(b.sum()))
    return (literal_iou(a, b) - expected) / (1 - expected)


def literal_permutation_p(masks_a, masks_b):
    """Mean excess of every permutation of the images, the identity among them."""
    count = len(masks_a)
    excess = [[literal_excess(a, b) for b in masks_b] for a in masks_a]
    observed = sum(excess[i][i] for i in range(count)) / count
    null = [
        sum(excess[i][pi[i]] for i in range(count)) / count
        for pi in itertools.permutations(range(count))
    ]
    return sum(one >= observed - 1e-12 for one in null) / len(null)


# ---- statistics


def literal_flip_p(x):
    """Two-sided share of all sign patterns whose mean is as far from 0."""
    observed = abs(sum(x))
    sums = [
        abs(sum(s * v for s, v in zip(signs, x, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(x))
    ]
    return sum(one >= observed - 1e-12 for one in sums) / len(sums)


def literal_bootstrap_t(x, level, resamples, seed):
    """Bounds of the bootstrap-t, resample by resample; infinite where one resample in
    forty has no spread.
    """
    rng, n = random.Random(seed), len(x)
    mean = sum(x) / n

    def spread(values):
        centre = sum(values) / n
        return math.sqrt(sum((one - centre) ** 2 for one in values) / (n - 1) / n)

    found = []
    for _ in range(resamples):
        again = [x[rng.randrange(n)] for _ in range(n)]
        gap, own = sum(again) / n - mean, spread(again)
        if own < 1e-12:
            found.append(0.0 if abs(gap) < 1e-12 else math.copysign(math.inf, gap))
        else:
            found.append(gap / own)
    found.sort()
    low = found[math.ceil((1 - level) / 2 * resamples) - 1]
    high = found[math.ceil((1 + level) / 2 * resamples) - 1]
    return mean - high * spread(x), mean - low * spread(x), found


def literal_holm(p):
    """Step down from the smallest p, each times the number of hypotheses not yet
    passed.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for step, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, p[place] * (len(p) - step)))
        adjusted[place] = largest
    return adjusted
