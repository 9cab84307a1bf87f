"""A small vision transformer in torch, and the same one written out in numpy with its
attention in loops.

The numpy twin takes attention from outside, so that scores can be differentiated with
respect to it by finite differences. The methods' formulas stand below, as their papers
have them, in loops. float64 throughout.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

# ---- the network


class Attention(nn.Module):
    """Two heads; ``how`` is fused, plain (softmax of products) or functional
    (``functional.softmax``).
    """

    def __init__(self, width, how):
        super().__init__()
        self.how, self.heads = how, 2
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        count, tokens, width = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(count, tokens, 3, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        if self.how == "fused":
            mixed = functional.scaled_dot_product_attention(q, k, v)
        else:
            scores = q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)
            mixed = (
                functional.softmax(scores, dim=-1)
                if self.how == "functional"
                else scores.softmax(dim=-1)
            ) @ v
        return self.proj(mixed.transpose(1, 2).reshape(count, tokens, width))


class Torchs(nn.Module):
    """``nn.MultiheadAttention`` as torchvision calls it."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, width, how):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Torchs(width) if how == "module" else Attention(width, how)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Pool(nn.Module):
    """One head of attention from a learned query to all tokens."""

    def __init__(self, width):
        super().__init__()
        self.query, self.kv = (
            nn.Parameter(torch.randn(1, 1, width)),
            nn.Linear(width, 2 * width),
        )

    def forward(self, x):
        k, v = self.kv(x).chunk(2, dim=-1)
        query = self.query.expand(len(x), -1, -1)[:, None]
        return functional.scaled_dot_product_attention(query, k[:, None], v[:, None])[
            :, 0, 0
        ]


class TinyViT(nn.Module):
    """Images of 8 x 12, patches of 4: a grid of 2 x 3 tokens after ``prefix`` others;
    four classes.

    ``pool``: token (the first), both (mean of the first two), avg (the patches), map
    (attention). Weights are large, so that attention is far from uniform and gradients
    differ from place to place.
    """

    def __init__(self, prefix=1, pool="token", how="fused", depth=2, width=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.prefix, self.pool = prefix, pool
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.extra = nn.Parameter(torch.randn(1, prefix, width))
        self.places = nn.Parameter(torch.randn(1, prefix + 6, width))
        self.blocks = nn.Sequential(*[Block(width, how) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)
        self.attn_pool = Pool(width) if pool == "map" else None
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(
                    parameter, std=0.7 if "qkv" in name or "in_proj" in name else 0.5
                )
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        x = (
            torch.cat([self.extra.expand(len(x), -1, -1), tokens], dim=1)
            + self.places
        )
        x = self.norm(self.blocks(x))
        if self.attn_pool is not None:
            return self.head(self.attn_pool(x))
        read = {
            "token": x[:, 0],
            "both": x[:, :2].mean(dim=1),
            "avg": x[:, self.prefix :].mean(dim=1),
        }
        return self.head(read[self.pool])


# ---- its twin


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x, weights, name):
    rows = []
    for row in x:
        centred = row - row.mean()
        rows.append(centred / math.sqrt((centred**2).mean() + 1e-5))
    return np.array(rows) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x):
    return np.vectorize(
        lambda value: value * (1 + math.erf(value / math.sqrt(2))) / 2
    )(x)


def softmax_row(scores):
    parts = [math.exp(score - max(scores)) for score in scores]
    return [part / sum(parts) for part in parts]


def attend(queries, keys):
    """Probabilities (T, S) of one head, number by number."""
    found = np.zeros((len(queries), len(keys)))
    for i, query in enumerate(queries):
        found[i] = softmax_row(
            [
                sum(a * b for a, b in zip(query, key, strict=True))
                / math.sqrt(len(query))
                for key in keys
            ]
        )
    return found


class Twin:
    """`TinyViT` in numpy. ``run(image, {layer: attention})`` takes given attentions
    instead of its own.
    """

    def __init__(self, net):
        self.prefix, self.pool, self.depth = net.prefix, net.pool, len(net.blocks)
        self.weights = {
            name: value.detach().double().numpy()
            for name, value in net.state_dict().items()
        }

    def tokens(self, image):
        kernel, found = self.weights["patches.weight"], []
        for y in range(2):
            for x in range(3):
                patch = image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
                found.append(
                    [(one * patch).sum() for one in kernel]
                    + self.weights["patches.bias"]
                )
        return (
            np.concatenate([self.weights["extra"][0], np.array(found)])
            + self.weights["places"][0]
        )

    def qkv(self, x, block):
        inner = (
            "attn.inner.in_proj_"
            if f"{block}.attn.inner.in_proj_weight" in self.weights
            else "attn.qkv."
        )
        said = (
            x @ self.weights[f"{block}.{inner}weight"].T
            + self.weights[f"{block}.{inner}bias"]
        )
        q, k, v = (
            part.reshape(len(x), 2, -1).transpose(1, 0, 2)
            for part in np.split(said, 3, axis=1)
        )
        return q, k, v

    def block(self, x, at, given, kept):
        name = f"blocks.{at}"
        q, k, v = self.qkv(norm(x, self.weights, f"{name}.norm1"), name)
        attention = (
            given[at]
            if at in given
            else np.array([attend(q[head], k[head]) for head in range(2)])
        )
        kept.append(attention)
        mixed = np.concatenate(
            [attention[head] @ v[head] for head in range(2)], axis=1
        )
        out = (
            "attn.inner.out_proj"
            if f"{name}.attn.inner.out_proj.weight" in self.weights
            else "attn.proj"
        )
        x = x + linear(mixed, self.weights, f"{name}.{out}")
        hidden = gelu(
            linear(
                norm(x, self.weights, f"{name}.norm2"), self.weights, f"{name}.fc1"
            )
        )
        return x + linear(hidden, self.weights, f"{name}.fc2")

    def rest(self, x, given, kept):
        """Norm, pooling, head: (K,)."""
        x = norm(x, self.weights, "norm")
        if self.pool == "map":
            k, v = np.split(linear(x, self.weights, "attn_pool.kv"), 2, axis=1)
            row = given.get("pool", attend(self.weights["attn_pool.query"][0], k))
            kept.append(row[None])
            return linear(row[0] @ v, self.weights, "head")
        rows = {"token": [0], "both": [0, 1], "avg": range(self.prefix, len(x))}[
            self.pool
        ]
        return linear(np.mean([x[row] for row in rows], axis=0), self.weights, "head")

    def run(self, image, given=()):
        """Logits (K,), the attentions, and the tokens after each block."""
        given, kept, after = dict(given), [], []
        x = self.tokens(image)
        for at in range(self.depth):
            x = self.block(x, at, given, kept)
            after.append(x)
        return self.rest(x, given, kept), kept, after

    def score_of_block(self, image, at, given, index):
        """LeGrad's s_l: the network's own rest on the tokens after block ``at``."""
        after = self.run(image, given)[2]
        return self.rest(after[at], dict(given), [])[index]


def differences(score, attention, step=1e-5):
    """d score(attention) / d attention, number by number."""
    found = np.zeros_like(attention)
    for at in np.ndindex(*attention.shape):
        moved = [attention.copy(), attention.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        found[at] = (score(moved[0]) - score(moved[1])) / (2 * step)
    return found


# ---- the methods


def fuse(attention, how):
    """(heads, T, S) to (T, S), number by number."""
    if isinstance(how, int):
        return attention[how]
    rule = {"mean": lambda values: sum(values) / len(values), "max": max, "min": min}[
        how
    ]
    found = np.zeros(attention.shape[1:])
    for at in np.ndindex(*found.shape):
        found[at] = rule([head[at] for head in attention])
    return found


def discard(matrix, share):
    order = sorted(np.ndindex(*matrix.shape), key=lambda at: (matrix[at], at))
    found = matrix.copy()
    for at in order[: int(matrix.size * share)]:
        found[at] = 0.0
    return found


def product(first, second):
    found = np.zeros((len(first), second.shape[1]))
    for i in range(len(first)):
        for j in range(second.shape[1]):
            found[i, j] = sum(first[i, k] * second[k, j] for k in range(len(second)))
    return found


def rolled(matrices, residual=0.5, share=0.0):
    """Abnar & Zuidema 2020, section 4: A~ of layer l times what came before; a last
    matrix of one row has no residual.
    """
    rolled = None
    for matrix in matrices:
        layer = discard(matrix, share)
        if layer.shape[0] == layer.shape[1]:
            layer = (1 - residual) * layer + residual * np.eye(len(layer))
            layer = np.array([row / row.sum() for row in layer])
        rolled = layer if rolled is None else product(layer, rolled)
    return rolled


def positive_mean(attention, gradient):
    """E_h[(A * grad)+]: Chefer et al., ICCV 2021, equation 5."""
    found = np.zeros(attention.shape[1:])
    for at in np.ndindex(*found.shape):
        found[at] = sum(
            max(a[at] * g[at], 0.0) for a, g in zip(attention, gradient, strict=True)
        ) / len(attention)
    return found


def mean_then_positive(attention, gradient):
    """vit-explain: (E_h[A * grad])+."""
    return np.maximum((attention * gradient).sum(axis=0) / len(attention), 0.0)


def generic(attentions, gradients):
    """Equation 6 from R = I; for a pooling attention Abar R."""
    relevance = np.eye(attentions[0].shape[-1])
    for attention, gradient in zip(attentions, gradients, strict=True):
        step = product(positive_mean(attention, gradient), relevance)
        relevance = relevance + step if step.shape == relevance.shape else step
    return relevance


def legrad(gradients):
    """Bousselham et al. 2024, equations 6 and 8: the positive part's mean over heads,
    queries and layers; (S,).
    """
    total = np.zeros(gradients[0].shape[-1])
    for gradient in gradients:
        for head in gradient:
            for row in head:
                total += np.maximum(row, 0.0) / (
                    gradient.shape[0] * gradient.shape[1]
                )
    return total / len(gradients)


# ---- AttnLRP


class Relevance:
    """AttnLRP (Achtibat et al.

    2024, section 3) of a `Twin` that reads a class token, rule by rule, from the logit
    to pixels.

    ``elsewhere`` adds up what does not go on to pixels: biases, embeddings, the class
    token, softmax's constant.
    """

    def __init__(self, twin, image, index):
        self.twin, self.weights, self.elsewhere, self.attentions = (
            twin,
            twin.weights,
            0.0,
            {},
        )
        self.logit = twin.run(image)[0][index]
        self.pixels = self.of_pixels(image, self.through(image, index))

    def linear(self, x, weight, bias, relevance):
        """Equation 8, epsilon 0: of (in,) for relevance (out,)."""
        found = np.zeros(len(x))
        for i, given in enumerate(relevance):
            if given == 0:
                continue
            z = sum(weight[i, j] * x[j] for j in range(len(x))) + bias[i]
            for j in range(len(x)):
                found[j] += x[j] * weight[i, j] * given / z
            self.elsewhere += bias[i] * given / z
        return found

    def rows(self, x, name, relevance):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return np.array(
            [
                self.linear(one, weight, bias, given)
                for one, given in zip(x, relevance, strict=True)
            ]
        )

    def norm(self, x, name, relevance):
        """Proposition 3.4: linear, with the deviation of this very row."""
        found = []
        for row, given in zip(x, relevance, strict=True):
            deviation = math.sqrt(((row - row.mean()) ** 2).mean() + 1e-5)
            matrix = (
                (np.eye(len(row)) - 1 / len(row))
                / deviation
                * self.weights[f"{name}.weight"][:, None]
            )
            found.append(
                self.linear(row, matrix, self.weights[f"{name}.bias"], given)
            )
        return np.array(found)

    def start(self):
        return self.logit

    def split(self, first, second, relevance):
        return relevance * first / (first + second), relevance * second / (
            first + second
        )

    @staticmethod
    def product(first, second, relevance):
        """Proposition 3.3 for first (T, S) times second (S, D)."""
        out, of_first, of_second = (
            first @ second,
            np.zeros_like(first),
            np.zeros_like(second),
        )
        for j, i, p in np.ndindex(*first.shape, second.shape[1]):
            share = (
                first[j, i] * second[i, p] * relevance[j, p] / (2 * out[j, p])
                if relevance[j, p]
                else 0.0
            )
            of_first[j, i] += share
            of_second[i, p] += share
        return of_first, of_second

    def softmax(self, scores, relevance):
        """Proposition 3.1, row by row."""
        found = np.zeros_like(scores)
        for j, row in enumerate(scores):
            said = softmax_row(list(row))
            for i in range(len(row)):
                found[j, i] = row[i] * (
                    relevance[j, i] - said[i] * relevance[j].sum()
                )
        self.elsewhere += relevance.sum() - found.sum()
        return found

    def attention(self, x, at, relevance):
        """From the relevance of what a block's attention adds (T, D) to that of the
        block's normed tokens.
        """
        name = f"blocks.{at}"
        q, k, v = self.twin.qkv(x, name)
        attention = [attend(q[head], k[head]) for head in range(2)]
        mixed = np.concatenate(
            [attention[head] @ v[head] for head in range(2)], axis=1
        )
        of_mixed = np.split(
            self.rows(mixed, f"{name}.attn.proj", relevance), 2, axis=1
        )
        parts = {"q": [], "k": [], "v": []}
        for head in range(2):
            of_attention, of_values = self.product(
                attention[head], v[head], of_mixed[head]
            )
            self.attentions.setdefault(at, []).append(of_attention)
            root = math.sqrt(q.shape[-1])
            of_scores = self.softmax(q[head] @ k[head].T / root, of_attention)
            of_q, of_k = self.product(q[head] / root, k[head].T, of_scores)
            for key, value in (("q", of_q), ("k", of_k.T), ("v", of_values)):
                parts[key].append(value)
        whole = np.concatenate(
            [np.concatenate(parts[key], axis=1) for key in "qkv"], axis=1
        )
        return self.rows(x, f"{name}.attn.qkv", whole)

    def block(self, x, at, relevance):
        """From the relevance of a block's tokens to that of the tokens that it was
        given.
        """
        name = f"blocks.{at}"
        normed = norm(x, self.weights, f"{name}.norm1")
        q, k, v = self.twin.qkv(normed, name)
        mixed = np.concatenate(
            [attend(q[head], k[head]) @ v[head] for head in range(2)], axis=1
        )
        added = linear(mixed, self.weights, f"{name}.attn.proj")
        middle = x + added
        normed2 = norm(middle, self.weights, f"{name}.norm2")
        hidden = linear(normed2, self.weights, f"{name}.fc1")
        brought = linear(gelu(hidden), self.weights, f"{name}.fc2")
        of_middle, of_brought = self.split(middle, brought, relevance)
        of_hidden = self.rows(
            gelu(hidden), f"{name}.fc2", of_brought
        )  # the identity rule: gelu passes it on
        of_normed = self.rows(normed2, f"{name}.fc1", of_hidden)
        of_x, of_added = self.split(
            x, added, of_middle + self.norm(middle, f"{name}.norm2", of_normed)
        )
        return of_x + self.norm(
            x, f"{name}.norm1", self.attention(normed, at, of_added)
        )

    def through(self, image, index):
        """Relevance (T, D) of the tokens with their places."""
        after = [self.twin.tokens(image), *self.twin.run(image)[2]]
        normed = norm(after[-1], self.weights, "norm")
        start = np.zeros(len(self.weights["head.bias"]))
        start[index] = self.start()
        relevance = np.zeros_like(normed)
        relevance[0] = self.linear(
            normed[0], self.weights["head.weight"], self.weights["head.bias"], start
        )
        relevance = self.norm(after[-1], "norm", relevance)
        for at in reversed(range(self.twin.depth)):
            relevance = self.block(after[at], at, relevance)
        return relevance

    def of_pixels(self, image, relevance):
        """(3, h, w): tokens are patches times a kernel, a bias and a place."""
        found = np.zeros_like(image)
        prefix, kernel = (
            self.twin.prefix,
            self.weights["patches.weight"].reshape(relevance.shape[1], -1),
        )
        self.elsewhere += relevance[:prefix].sum()
        for at, given in enumerate(relevance[prefix:]):
            y, x = 4 * (at // 3), 4 * (at % 3)
            patch = image[:, y : y + 4, x : x + 4]
            bias = (
                self.weights["patches.bias"] + self.weights["places"][0, prefix + at]
            )
            found[:, y : y + 4, x : x + 4] = self.linear(
                patch.ravel(), kernel, bias, given
            ).reshape(patch.shape)
        return found


class PositiveRelevance(Relevance):
    """Relevance of attention in Chefer, Gur & Wolf, CVPR 2021: equations 3 and 8 to 10,
    from 1 at the class.
    """

    def start(self):
        return 1.0

    def linear(self, x, weight, bias, relevance):
        """Equation 3: only positive x w."""
        found = np.zeros(len(x))
        for i, given in enumerate(relevance):
            parts = [max(x[j] * weight[i, j], 0.0) for j in range(len(x))]
            if sum(parts):
                found += np.array(parts) * given / sum(parts)
        return found

    def norm(self, x, name, relevance):
        return relevance

    def softmax(self, scores, relevance):
        return relevance

    def split(self, first, second, relevance):
        """Equations 9 and 10."""
        parts = super().split(first, second, relevance)
        sums = [abs(part.sum()) for part in parts]
        return [
            part / part.sum() * total / sum(sums) * relevance.sum()
            for part, total in zip(parts, sums, strict=True)
        ]


def attributed(relevances, gradients):
    """Equations 13 and 14."""
    rolled = np.eye(gradients[0].shape[-1])
    for relevance, gradient in zip(relevances, gradients, strict=True):
        rolled = product(
            np.eye(len(rolled)) + positive_mean(np.array(relevance), gradient), rolled
        )
    return rolled
