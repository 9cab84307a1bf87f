"""Small networks that several test files explain."""

import torch
from torch import nn


def small_cnn(outputs=3, channels=3, seed=0):
    """Two strided convolutions, pooling, one linear layer; layers ``0`` to ``6``."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, outputs),
    ).eval()
