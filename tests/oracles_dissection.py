"""Dissection in slow loops, a tiny Broden folder, and networks whose units detect what
they were built to detect.
"""

import csv

import numpy as np
import torch
from PIL import Image
from torch import nn

from consilience.models.network import wrap

# ---- the counts, pixel by pixel


def position(pixel, pixels, cells, upsample):
    """Where a pixel lies among cells, held at the edges."""
    if upsample == "half-pixel":
        at = (pixel + 0.5) / pixels * cells - 0.5
    elif upsample == "align_corners":
        at = pixel / (pixels - 1) * (cells - 1)
    else:
        at = pixel / (pixels / cells)
    return min(max(at, 0.0), cells - 1.0)


def enlarged(values, size, upsample="half-pixel"):
    """A map (h, w) at ``size``, bilinear, one pixel at a time, in float64."""
    found = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            at_y, at_x = (
                position(y, size[0], values.shape[0], upsample),
                position(x, size[1], values.shape[1], upsample),
            )
            top, left = int(at_y), int(at_x)
            bottom, right = (
                min(top + 1, values.shape[0] - 1),
                min(left + 1, values.shape[1] - 1),
            )
            down, across = at_y - top, at_x - left
            upper = (1 - across) * float(values[top, left]) + across * float(
                values[top, right]
            )
            lower = (1 - across) * float(values[bottom, left]) + across * float(
                values[bottom, right]
            )
            found[y, x] = (1 - down) * upper + down * lower
    return found


def literal(
    maps,
    stacks,
    categories,
    grid,
    quantile=0.995,
    upsample="half-pixel",
    union="paper",
):
    """Thresholds, intersections and unions by unit and concept, as the paper defines
    them.

    ``maps`` (N, U, h, w); ``stacks`` a list an image of {concept: mask (H, W) bool};
    ``categories`` of every concept.
    """
    units, concepts = maps.shape[1], len(categories)
    cuts = [
        np.quantile(maps[:, unit].astype(np.float64).ravel(), quantile)
        for unit in range(units)
    ]
    shared = np.zeros((units, concepts), dtype=np.int64)
    unions = np.zeros((units, concepts), dtype=np.int64)
    for unit in range(units):
        for image, stack in enumerate(stacks):
            mask = enlarged(maps[image, unit], grid, upsample) > np.float32(
                cuts[unit]
            )
            for concept in range(concepts):
                label = stack.get(concept, np.zeros(grid, dtype=bool))
                own = [
                    other
                    for other in stack
                    if categories[other] == categories[concept] and stack[other].any()
                ]
                counts = (
                    len(own) > 0
                    if union == "paper"
                    else any((mask & stack[other]).any() for other in own)
                )
                shared[unit, concept] += (mask & label).sum()
                unions[unit, concept] += (
                    label.sum() + (mask.sum() if counts else 0) - (mask & label).sum()
                )
    return np.array(cuts, dtype=np.float32), shared, unions


def stacks_of(concepts, geometries=None):
    """By image {concept: mask}, read from the set's labels."""
    found = []
    for index in range(len(concepts)):
        labels = concepts.labels(index, geometries[index] if geometries else None)
        stack = {
            int(one): mask
            for one, mask in zip(labels.present, labels.masks, strict=True)
        }
        stack |= {one: np.ones(concepts.grid, dtype=bool) for one in labels.whole}
        found.append(stack)
    return found


# ---- a tiny Broden


def write_png(path, numbers):
    """A label map as Broden has it: number = R + 256 G."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.stack(
        [numbers % 256, numbers // 256, np.zeros_like(numbers)], axis=2
    ).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_broden(folder, images, labels, cells, grid):
    """``images`` {name: pixels}, ``labels`` {number: (name, categories)}, ``cells``
    {category: [map or number]} an image.
    """
    (folder / "images").mkdir(parents=True)
    categories = list(
        dict.fromkeys(
            category for _, several in labels.values() for category in several
        )
    )
    rows = []
    for (name, pixels), shown in zip(images.items(), cells, strict=True):
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        row = {
            "image": f"{name}.png",
            "split": "train",
            "ih": pixels.shape[0],
            "iw": pixels.shape[1],
            "sh": grid[0],
            "sw": grid[1],
        }
        for category in categories:
            parts = []
            for place, one in enumerate(shown.get(category, [])):
                if isinstance(one, int):
                    parts.append(str(one))
                else:
                    parts.append(f"{name}_{category}_{place}.png")
                    write_png(folder / "images" / parts[-1], one)
            row[category] = ";".join(parts)
        rows.append(row)
    write_csv(folder / "index.csv", rows)
    write_csv(
        folder / "category.csv",
        [
            {"name": one, "first": 1, "last": 1, "count": 1, "frequency": 1}
            for one in categories
        ],
    )
    known = [
        {"number": n, "name": name, "category": ";".join(f"{c}(1)" for c in cs)}
        for n, (name, cs) in labels.items()
    ]
    write_csv(folder / "label.csv", known)
    for category in categories:
        own = [
            {
                "code": code,
                "number": number,
                "name": name,
                "frequency": 1,
                "coverage": 1,
            }
            for code, (number, (name, several)) in enumerate(labels.items(), start=1)
            if category in several
        ]
        write_csv(folder / f"c_{category}.csv", own)
    return folder


LABELS = {
    1: ("sky", ("object",)),
    2: ("wheel", ("object", "part")),
    3: ("door", ("part",)),
    4: ("-", ("part",)),
    300: ("crimson", ("color",)),
    301: ("grey", ("color",)),
    302: ("teal", ("color",)),
    310: ("street", ("scene",)),
    311: ("forest", ("scene",)),
}


def small_broden(folder, count=12, seed=0, side=32, grid=(16, 16)):
    """Blocky random labels: overlapping maps of one category, whole-image labels,
    images without a category.
    """
    rng = np.random.default_rng(seed)

    def blocks(numbers):
        coarse = rng.choice(numbers, size=(4, 4))
        return np.kron(coarse, np.ones((grid[0] // 4, grid[1] // 4), dtype=np.int64))

    images, cells = {}, []
    for index in range(count):
        noise = rng.integers(0, 256, (side // 4, side // 4, 3)).astype(np.uint8)
        images[f"p{index}"] = np.kron(noise, np.ones((4, 4, 1), dtype=np.uint8))
        shown = {
            "color": [blocks([0, 300, 301]), blocks([0, 0, 302, 300])],
            "scene": [310 + index % 2],
        }
        if index % 3:
            shown["object"] = [blocks([0, 1, 2])]
        if index % 2:
            shown["part"] = (
                [blocks([0, 0, 2, 3, 4]), 3]
                if index == 5
                else [blocks([0, 0, 2, 3, 4])]
            )
        cells.append(shown)
    return write_broden(folder, images, LABELS, cells, grid)


# ---- networks of known answers


class SmallNet(nn.Module):
    """A map at half size, one at a quarter through an in-place ReLU, and a vector."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.deep = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.clip = nn.ReLU6(inplace=True)
        self.embed = nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.clip(self.deep(self.act(self.stem(x))) * 9)
        return self.head(self.embed(x.mean(dim=(2, 3))))


def small_model(side=32, seed=0, **how):
    torch.manual_seed(seed)
    return wrap(
        SmallNet(),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=side,
        name="small",
        **{"engine": "torch", **how},
    )


def assert_within(rows, values, bounds, rank):
    """Every value is off the one at ``rank`` from the top by no more ranks than bound."""
    for row, value, bound in zip(rows, values, bounds, strict=True):
        above, not_below = int((row > value).sum()), int((row >= value).sum())
        assert above - bound < rank <= not_below + bound


CELL = 8
PLANTED = ("red", "striped", "cross", "nothing")


def cross(size=CELL):
    shape = np.zeros((size, size), dtype=bool)
    shape[size // 2 - 1 : size // 2 + 1] = True
    shape[:, size // 2 - 1 : size // 2 + 1] = True
    return shape


PAINTS = {
    "color": np.array([240, 10, 10]),
    "texture": np.tile([230, 230, 20, 20], CELL // 4)[None, :, None],
    "shape": np.where(cross(), 230, 20)[:, :, None],
}


class PlantedNet(nn.Module):
    """Units that by construction say where a cell of 8 x 8 pixels is red, striped, or
    shows a cross; the last says nothing.
    """

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(3, len(PLANTED), CELL, stride=CELL)
        self.act = nn.ReLU()
        self.head = nn.Linear(len(PLANTED), 2)
        stripes = torch.tensor([1.0, 1, -1, -1] * (CELL // 4)).expand(CELL, CELL)
        shape = torch.from_numpy(np.where(cross(), 1.0, -1.0)).float()
        with torch.no_grad():
            self.look.weight.zero_()
            self.look.weight[0] = torch.tensor([1.0, -1, -1])[:, None, None] / CELL**2
            self.look.weight[1] = stripes / CELL**2
            self.look.weight[2] = (shape - shape.mean()) / CELL**2
            self.look.bias[:] = torch.tensor([0.0, -0.2, -0.2, -1.0])

    def forward(self, x):
        return self.head(self.act(self.look(x)).mean(dim=(2, 3)))


def planted_model(cells=16):
    return wrap(
        PlantedNet(),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        size=cells * CELL,
        name="planted",
        engine="torch",
    )


def planted_broden(folder, count=60, cells=16, seed=0):
    """Cells that are red, striped or crossed, each a little under .5 % of all, on quiet
    grey; labels are of the cells' size.
    """
    rng = np.random.default_rng(seed)
    labels = {
        1: ("red", ("color",)),
        2: ("striped", ("texture",)),
        3: ("cross", ("shape",)),
        4: ("grey", ("color",)),
    }
    images, shown = {}, []
    for index in range(count):
        grey = rng.integers(110, 140, (cells * CELL, cells * CELL, 1))
        pixels = np.repeat(grey, 3, axis=2).astype(np.uint8)
        maps = {category: np.zeros((cells, cells), dtype=int) for category in PAINTS}
        maps["color"] += 4
        for place, category in enumerate(PAINTS):
            row, column = (
                rng.integers(0, cells, 2)
                if index % 3 != place
                else (3 + place, 5 * place)
            )
            for one in maps.values():
                one[row, column] = 0
            maps[category][row, column] = 1 + place
            pixels[
                row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL
            ] = PAINTS[category]
        images[f"p{index}"] = pixels
        shown.append({category: [one] for category, one in maps.items()})
    return write_broden(folder, images, labels, shown, (cells, cells))
