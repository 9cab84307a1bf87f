"""Slow, literal formulas of metrics: one image, one pixel and one pass at a time, in
float64.
"""

import itertools
import math

import numpy as np

from consilience.types import ClassTarget, Explanation


class Shown:
    """A model of two outputs, plane dot products with the image, as a function of one
    image: what the formulas call f.
    """

    def __init__(self, planes, reads="probability", index=0):
        self.planes, self.reads, self.index = (
            np.asarray(planes, dtype=np.float64),
            reads,
            index,
        )

    def __call__(self, image):
        outputs = [
            float((np.asarray(image, dtype=np.float64) * plane).sum())
            for plane in self.planes
        ]
        if self.reads == "logit":
            return outputs[self.index]
        top = max(outputs)
        return math.exp(outputs[self.index] - top) / sum(
            math.exp(one - top) for one in outputs
        )


def explanation(values, sample=None, target=None, by="given", provenance=None):
    """A map as an explanation; the metrics here read nothing else of it."""
    goal = target or ClassTarget(0, "first", "logit")
    return Explanation(
        sample,
        "model",
        by,
        goal,
        None,
        np.asarray(values, dtype=np.float32),
        {},
        provenance or {},
    )


def order_of(values, seed):
    """Places from the largest value to the least; equal ones as they come in the
    shuffled list of all places.
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    shuffled = (
        np.random.default_rng([seed, len(flat)]).permutation(len(flat)).tolist()
    )
    turn = {place: when for when, place in enumerate(shuffled)}
    return sorted(range(len(flat)), key=lambda place: (-flat[place], turn[place]))


def replaced(image, other, places):
    """``image`` (3, h, w) with the pixels at flat ``places`` taken from ``other``, all
    channels of each.
    """
    edited = np.array(image, dtype=np.float64)
    width = image.shape[2]
    for place in places:
        for channel in range(3):
            edited[channel, place // width, place % width] = other[
                channel, place // width, place % width
            ]
    return edited


def trapezoids(at, heights):
    total = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(at, heights, strict=True)):
        total += (x1 - x0) * (y0 + y1) / 2
    return total


def points(count, steps):
    """How many pixels are edited after each of ``steps`` equal steps."""
    return [round(number * count / steps) for number in range(steps + 1)]


def insertion(f, image, fill, values, stops, seed=0):
    order, count = order_of(values, seed), np.size(values)
    heights = [f(replaced(fill, image, order[:stop])) for stop in stops]
    return trapezoids([stop / count for stop in stops], heights), heights


def deletion(f, image, fill, values, stops, seed=0):
    order, count = order_of(values, seed), np.size(values)
    heights = [f(replaced(image, fill, order[:stop])) for stop in stops]
    return trapezoids([stop / count for stop in stops], heights), heights


def aopc(f, image, fill, values, side, regions, seed=0, lerf=False):
    """Mean of f(x_0) - f(x_k), patch after patch."""
    height, width = values.shape
    patches = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            rows, columns = (
                range(top, min(top + side, height)),
                range(left, min(left + side, width)),
            )
            patches.append(
                [row * width + column for row in rows for column in columns]
            )
    sums = np.array(
        [sum(values.ravel()[place] for place in patch) for patch in patches]
    )
    order = order_of(-sums if lerf else sums, seed)
    x, losses = np.array(image, dtype=np.float64), [0.0]
    for patch in order[:regions]:
        x = replaced(x, fill, patches[patch])
        losses.append(f(image) - f(x))
    return sum(losses) / len(losses)


def irof(f, image, fill, values, segments, seed=0):
    count = int(segments.max()) + 1
    means = np.array([values[segments == label].mean() for label in range(count)])
    x, heights = np.array(image, dtype=np.float64), [1.0]
    for label in order_of(means, seed):
        x = replaced(x, fill, np.flatnonzero(segments.ravel() == label))
        heights.append(f(x) / f(image))
    return 1 - trapezoids([number / count for number in range(count + 1)], heights)


def imputed(image, gone):
    """Every missing pixel the weighted mean of its neighbours inside the image: a dense
    system, an equation a pixel.
    """
    height, width = gone.shape
    unknown = [(y, x) for y in range(height) for x in range(width) if gone[y, x]]
    matrix, right = (
        np.zeros((len(unknown), len(unknown))),
        np.zeros((len(unknown), len(image))),
    )
    for row, (y, x) in enumerate(unknown):
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            if (dy, dx) == (0, 0) or not (
                0 <= y + dy < height and 0 <= x + dx < width
            ):
                continue
            weight = 1 / 12 if dy and dx else 1 / 6
            matrix[row, row] += weight
            if gone[y + dy, x + dx]:
                matrix[row, unknown.index((y + dy, x + dx))] -= weight
            else:
                right[row] += weight * image[:, y + dy, x + dx]
    whole = np.array(image, dtype=np.float64)
    for (y, x), colour in zip(
        unknown, np.linalg.solve(matrix, right) if unknown else [], strict=True
    ):
        whole[:, y, x] = colour
    return whole


def road(f, image, values, shares, noise=0.01, seed=0, order="combined"):
    """Mean score by order of removal; the noise is the library's own draw, whose
    distribution has a test of its own.
    """
    ranked, means = order_of(values, seed), {}
    for which, places in (("morf", ranked), ("lerf", ranked[::-1])):
        found = []
        for share in shares:
            count = round(share * len(places))
            gone = np.zeros(values.size, dtype=bool)
            gone[places[:count]] = True
            gone = gone.reshape(values.shape)
            drawn = np.random.default_rng([seed, count]).standard_normal(image.shape)
            found.append(f(imputed(image, gone) + noise * drawn * gone))
        means[which] = sum(found) / len(found)
    return (
        (means["lerf"] - means["morf"]) / 2 if order == "combined" else means[order]
    )


def masked(image, fill, values):
    """The image times the map's positive part, scaled from least to largest."""
    positive = [[max(0.0, value) for value in row] for row in values]
    low, high = min(map(min, positive)), max(map(max, positive))
    out = np.empty_like(np.asarray(image, dtype=np.float64))
    for y, row in enumerate(positive):
        for x, value in enumerate(row):
            keep = (value - low) / (high - low) if high > low else 1.0
            out[:, y, x] = keep * image[:, y, x] + (1 - keep) * fill[:, y, x]
    return out


def correlation(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(
        sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    )


def set_correlation(f, image, fill, values, sets):
    """Correlation of the map's sums over sets of flat places with what the score loses
    by each.
    """
    sums = [sum(values.ravel()[place] for place in some) for some in sets]
    losses = [f(image) - f(replaced(image, fill, some)) for some in sets]
    return correlation(sums, losses)


def estimate(f, image, fill, values, stops, seed=0):
    order = order_of(values, seed)
    groups = [order[start:stop] for start, stop in itertools.pairwise(stops)]
    means = [
        sum(values.ravel()[place] for place in group) / len(group) for group in groups
    ]
    losses = [f(image) - f(replaced(image, fill, group)) for group in groups]
    return correlation(means, losses)


def infidelity(f, image, fill, values, corners, side, gradient=False, scaled=True):
    forecasts, losses = [], []
    width = values.shape[1]
    for top, left in corners:
        places = [
            y * width + x
            for y in range(top, top + side)
            for x in range(left, left + side)
        ]
        changed = replaced(image, fill, places)
        inner = 0.0
        for place in places:
            y, x = divmod(place, width)
            change = (image[:, y, x] - changed[:, y, x]).sum() if gradient else 1.0
            inner += change * values[y, x]
        forecasts.append(inner)
        losses.append(f(image) - f(changed))
    factor = (
        np.dot(forecasts, losses) / np.dot(forecasts, forecasts) if scaled else 1.0
    )
    return sum(
        (factor * a - b) ** 2 for a, b in zip(forecasts, losses, strict=True)
    ) / len(losses)


def monotonicity(f, image, fill, values, stops, seed=0):
    """Share of steps without a fall while pixels come back, the least relevant first."""
    order = order_of(-values, seed)
    heights = [f(replaced(fill, image, order[:stop])) for stop in stops]
    rises = [after >= before - 1e-6 for before, after in itertools.pairwise(heights)]
    return sum(rises) / len(rises)


def comprehensiveness(f, image, fill, values, shares, seed=0):
    order = order_of(values, seed)
    return sum(
        f(image) - f(replaced(image, fill, order[: round(s * len(order))]))
        for s in shares
    ) / len(shares)


def sufficiency(f, image, fill, values, shares, seed=0):
    order = order_of(values, seed)
    return sum(
        f(image) - f(replaced(fill, image, order[: round(s * len(order))]))
        for s in shares
    ) / len(shares)


def gini(values):
    """Half the mean absolute difference of all pairs, over the mean: the definition
    that needs no sorting.
    """
    flat = [abs(value) for value in np.ravel(values).tolist()]
    pairs = sum(abs(a - b) for a in flat for b in flat)
    return pairs / (2 * len(flat) * sum(flat))


def entropy(values):
    total = sum(abs(value) for value in np.ravel(values).tolist())
    shares = [abs(value) / total for value in np.ravel(values).tolist()]
    return -sum(share * math.log(share) for share in shares if share > 0)


def rise_blur(image, neutral, side=11, sigma=5.0):
    """Blur by a square kernel, the Gaussian's mass outside of it mirrored back in;
    outside the image the neutral colour.
    """
    profile = np.zeros(side)
    for offset in range(-round(4 * sigma), round(4 * sigma) + 1):
        at = side // 2 + offset
        while not 0 <= at < side:
            at = -1 - at if at < 0 else 2 * side - 1 - at
        profile[at] += math.exp(-(offset**2) / (2 * sigma**2))
    kernel = np.outer(profile, profile) / profile.sum() ** 2
    half, (_, height, width) = side // 2, image.shape
    out = np.zeros_like(np.asarray(image, dtype=np.float64))
    for y, x in itertools.product(range(height), range(width)):
        for dy, dx in itertools.product(range(-half, half + 1), repeat=2):
            inside = 0 <= y + dy < height and 0 <= x + dx < width
            colour = image[:, y + dy, x + dx] if inside else np.asarray(neutral)
            out[:, y, x] += kernel[dy + half, dx + half] * colour
    return out
