"""Shared images and networks of known answers."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from consilience.types import Sample

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared():
    """The folder of study images, where this machine has it."""
    if not SHARED.is_dir():
        pytest.skip(f"the data folder {SHARED} is absent")
    return SHARED


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Converted models of the tests stay among themselves, and are shared by the whole
    run.
    """
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("CONSILIENCE_CACHE", str(base))


class RedFinder(nn.Module):
    """Two classes, "nothing" and "red"; the second is decided by red pixels alone, on
    an 8 x 8 grid of a 64 x 64 input.
    """

    def __init__(self):
        super().__init__()
        self.colours = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(8)
        self.mix = nn.Conv2d(4, 4, 1)
        self.last = nn.ReLU()
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            centre = torch.tensor(
                [
                    [2.0, -2.0, -2.0],
                    [-2.0, 2.0, -2.0],
                    [-2.0, -2.0, 2.0],
                    [0.3, 0.3, 0.3],
                ]
            )
            self.colours.weight[:, :, 1, 1] = centre
            self.mix.weight[:, :, 0, 0] = torch.eye(4)
            self.head.weight[:] = torch.tensor(
                [[0.0, 0.0, 0.0, 1.0], [20.0, 0.0, 0.0, 0.0]]
            )

    def forward(self, x):
        x = self.pool(self.act(self.colours(x)))
        x = self.last(self.mix(x))
        return self.head(x.mean(dim=(2, 3)))


class RedAttention(nn.Module):
    """Two heads whose class token looks at red tokens, and sees how red they are;
    patches look at each other evenly.
    """

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.qkv.weight[[0, 2], 3] = 3.0  # queries: the class token's mark
            self.qkv.weight[[4, 6], 0] = 1.0  # keys: redness
            self.qkv.weight[[8, 10], 0] = 1.0  # values: redness
            self.proj.weight[1] = torch.tensor([0.5, 0.0, 0.5, 0.0])

    def forward(self, x):
        q, k, v = (
            self.qkv(x).reshape(len(x), -1, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        )
        return x + self.proj(
            functional.scaled_dot_product_attention(q, k, v)
            .transpose(1, 2)
            .reshape(x.shape)
        )


class RedTransformer(nn.Module):
    """The red finder as a transformer: a class token and 8 x 8 patches of redness, two
    blocks of attention, fused.

    Of four channels the first holds how red a token is, the second what attention
    brings, the last marks the class token.
    """

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 8, stride=8)
        self.token = nn.Parameter(torch.tensor([[[0.0, 0.0, 0.0, 1.0]]]))
        self.blocks = nn.Sequential(RedAttention(), RedAttention())
        self.last = nn.Identity()
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            for parameter in (*self.patches.parameters(), *self.head.parameters()):
                parameter.zero_()
            self.patches.weight[0] = (
                torch.tensor([2.0, -1.0, -1.0])[:, None, None] / 64
            )
            self.head.weight[:, 1] = torch.tensor([-10.0, 10.0])

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1)
        return self.head(self.last(self.blocks(x))[:, 0])


PATCH = (slice(8, 24), slice(40, 56))


def planted_image(seed=0):
    """Grey noise with one red square at PATCH."""
    rng = np.random.default_rng(seed)
    pixels = np.repeat(rng.integers(90, 160, (64, 64, 1)), 3, axis=2).astype(np.uint8)
    pixels[PATCH] = (230, 20, 20)
    return Sample(f"planted{seed}", pixels)


@pytest.fixture(scope="session")
def red_model():
    """The red finder as a model, plain torch."""
    from consilience.models.network import wrap

    torch.manual_seed(0)
    network = wrap(
        RedFinder(),
        classes=("nothing", "red"),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=64,
        name="red-finder",
    )
    return network.using(engine="torch")


@pytest.fixture(scope="session")
def red_transformer():
    """The red finder as a transformer, plain torch."""
    from consilience.models.network import wrap

    network = wrap(
        RedTransformer(),
        classes=("nothing", "red"),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=64,
        name="red-transformer",
    )
    return network.using(engine="torch")


@pytest.fixture
def planted():
    """An image whose evidence for "red" lies in PATCH."""
    return planted_image()
