"""The network of the kept runs: tells the colour of a disc."""

import torch
from torch import nn

import consilience as cs


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()
    return cs.wrap(
        net, size=48, classes=["red", "green", "blue"], engine="torch", name="kept"
    )
