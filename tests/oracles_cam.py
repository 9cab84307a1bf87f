"""Class activation maps by their papers' formulas, in loops over numpy float64: slow,
and as the formulas read.

Activations and gradients are (C, h, w); a ``score`` is a function of what is passed,
one image or one layer at a time.
"""

import numpy as np


def weighted_sum(weights, activations):
    total = np.zeros(activations.shape[1:])
    for k, weight in enumerate(weights):
        for cell in np.ndindex(*total.shape):
            total[cell] += weight * activations[(k, *cell)]
    return total


# ---- from gradients


def gradcam(activations, gradients):
    """Selvaraju et al. 2017, equations 1 and 2, no ReLU."""
    return weighted_sum([g.sum() / g.size for g in gradients], activations)


def gradcam_plus_plus_weights(second_terms, activations):
    """Chattopadhay et al.

    2018, equations 10 and 19, with derivatives (g, g^2, g^3) of exp(S) less the factor
    exp(S).
    """
    first, second, third = second_terms
    weights = []
    for k in range(len(activations)):
        area = sum(
            activations[(k, *cell)] for cell in np.ndindex(*activations.shape[1:])
        )
        weight = 0.0
        for cell in np.ndindex(*activations.shape[1:]):
            at = (k, *cell)
            if second[at] == 0:
                continue
            alpha = second[at] / (2 * second[at] + area * third[at])
            weight += alpha * max(first[at], 0.0)
        weights.append(weight)
    return weights


def gradcam_plus_plus(activations, gradients):
    return weighted_sum(
        gradcam_plus_plus_weights(
            (gradients, gradients**2, gradients**3), activations
        ),
        activations,
    )


def smooth_gradcam_plus_plus(activations, gradients_of_copies):
    """Omeiza et al. 2019, equation 12: each power averaged over noisy copies."""
    powers = [
        sum(g**power for g in gradients_of_copies) / len(gradients_of_copies)
        for power in (1, 2, 3)
    ]
    return weighted_sum(gradcam_plus_plus_weights(powers, activations), activations)


def xgradcam(activations, gradients):
    """Fu et al. 2020, equation 8: the gradient averaged with activations as weights."""
    weights = []
    for channel, gradient in zip(activations, gradients, strict=True):
        area = channel.sum()
        weights.append(
            0.0
            if area == 0
            else sum(
                channel[c] / area * gradient[c] for c in np.ndindex(*channel.shape)
            )
        )
    return weighted_sum(weights, activations)


def hirescam(activations, gradients):
    total = np.zeros(activations.shape[1:])
    for at in np.ndindex(*activations.shape):
        total[at[1:]] += gradients[at] * activations[at]
    return total


def gradcam_elementwise(activations, gradients):
    total = np.zeros(activations.shape[1:])
    for at in np.ndindex(*activations.shape):
        total[at[1:]] += max(gradients[at] * activations[at], 0.0)
    return total


def layercam(activations, gradients):
    """Jiang et al. 2021, equations 5 to 7, no ReLU of the sum."""
    total = np.zeros(activations.shape[1:])
    for at in np.ndindex(*activations.shape):
        total[at[1:]] += max(gradients[at], 0.0) * activations[at]
    return total


def eigen(activations, centre=False):
    """The first principal component by power iteration on the channels' (C, C)
    products; sum over cells not negative.
    """
    cells = activations.reshape(len(activations), -1).T
    if centre:
        cells = cells - cells.mean(axis=0)
    products = np.zeros((cells.shape[1], cells.shape[1]))
    for cell in cells:
        products += np.outer(cell, cell)
    axis = np.random.default_rng(0).standard_normal(len(products))
    for _ in range(20_000):
        axis = products @ axis
        axis /= np.linalg.norm(axis)
    along = cells @ axis
    up = (along**3).sum() if centre else along.sum()
    return (along if up >= 0 else -along).reshape(activations.shape[1:])


# ---- by probing


def enlarged(values, size, align_corners=False):
    """Bilinear, half-pixel centres unless ``align_corners``, edges repeated; in loops."""
    out = np.zeros(size)
    for y, x in np.ndindex(*size):
        places = []
        for at, old, new in (
            (y, values.shape[0], size[0]),
            (x, values.shape[1], size[1]),
        ):
            exact = (
                at * (old - 1) / (new - 1)
                if align_corners
                else (at + 0.5) * old / new - 0.5
            )
            exact = min(max(exact, 0.0), old - 1.0)
            low = min(int(exact), old - 1)
            places.append((low, min(low + 1, old - 1), exact - low))
        (top, bottom, down), (left, right, across) = places
        upper = values[top, left] * (1 - across) + values[top, right] * across
        lower = values[bottom, left] * (1 - across) + values[bottom, right] * across
        out[y, x] = upper * (1 - down) + lower * down
    return out


def unit(values):
    """Score-CAM's s: to [0, 1]; what is flat is 0."""
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


def mask(channel, size, align_corners=False):
    """Score-CAM's H: enlarged, then scaled.

    A flat channel has none, whatever rounding makes of it when it is enlarged.
    """
    flat = channel.max() == channel.min()
    return np.zeros(size) if flat else unit(enlarged(channel, size, align_corners))


def softmax(values):
    values = np.array(values)
    parts = np.exp(values - values.max())
    return parts / parts.sum()


def scorecam(activations, image, score, align_corners=False):
    """Wang et al.

    2020, algorithm 1, for the normalised image (3, h, w) and a baseline of zeros; no
    ReLU.
    """
    baseline = score(np.zeros_like(image))
    found = [
        score(image * mask(channel, image.shape[1:], align_corners)) - baseline
        for channel in activations
    ]
    return weighted_sum(softmax(found), activations)


def iscam(activations, image, score, samples):
    """Naidu et al. 2020: the score averaged over steps to the mask."""
    found = []
    for channel in activations:
        whole = mask(channel, image.shape[1:])
        found.append(
            sum(
                score(image * whole * step / samples)
                for step in range(1, samples + 1)
            )
            / samples
        )
    return weighted_sum(softmax(found), activations)


def sscam_map(activations, image, score, fields):
    """Wang et al. 2020 (SS-CAM), first type: noise of so many channel ranges on the
    enlarged channel, then scaled.
    """
    found = []
    for channel in activations:
        big = enlarged(channel, image.shape[1:])
        spread = 0 if channel.max() == channel.min() else big.max() - big.min()
        masks = [
            unit(big + spread * field) if spread else np.zeros_like(big)
            for field in fields
        ]
        found.append(sum(score(image * each) for each in masks) / len(fields))
    return weighted_sum(softmax(found), activations)


def sscam_image(activations, image, score, fields):
    """SS-CAM, second type: noise on the masked image."""
    found = []
    for channel in activations:
        shown = image * mask(channel, image.shape[1:])
        found.append(sum(score(shown + field) for field in fields) / len(fields))
    return weighted_sum(softmax(found), activations)


def ablationcam(activations, score):
    """Desai & Ramaswamy 2020: what the score of a layer loses without each channel, in
    parts of its size; no ReLU.
    """
    whole = score(activations)
    weights = []
    for k in range(len(activations)):
        without = activations.copy()
        without[k] = 0
        weights.append((whole - score(without)) / abs(whole))
    return weighted_sum(weights, activations)


def reciprocam(activations, score, gaussian=False):
    """Byun & Lee 2022: the score of a layer with a cell (or the kernel round it) left."""
    _, height, width = activations.shape
    out = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        left = np.zeros((height, width))
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                inside = 0 <= y + down < height and 0 <= x + across < width
                if gaussian and inside:
                    left[y + down, x + across] = 2.0 ** -(2 + abs(down) + abs(across))
        if not gaussian:
            left[y, x] = 1
        out[y, x] = score(activations * left)
    return out


# ---- FullGrad


def fullgrad(terms, size, rescale):
    """Srinivas & Fleuret 2019, section 4: psi of every channel's term, one after the
    other.
    """
    total = np.zeros(size)
    for term in terms:
        sizes = np.abs(term)
        for channel in sizes:
            low, high = {
                "layer": (sizes.min(), sizes.max()),
                "channel": (channel.min(), channel.max()),
                "none": (0, 1),
            }[rescale]
            if high > low:
                total += enlarged((channel - low) / (high - low), size)
    return total
