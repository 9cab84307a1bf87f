"""The study as it was run, errors and all, and the protocols by name.

Two errors are code here, so that they can be reproduced and found: a mask cut from the
luminance of a saved figure, and a fill truncated to black. Presets are TOML files:
those in ``presets/``, or a user's own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from consilience import images
from consilience.agreement.masks import Cutter, Mask
from consilience.images import Placement
from consilience.registry import (
    cutters,
    explainers,
    fills,
    option,
    parse,
    render,
    spell,
    unknown,
)
from consilience.types import (
    Array,
    ConsilienceError,
    Explainer,
    Explanation,
    View,
    ViewMode,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PUBLISHED_IOU: Mapping[str, float] = {
    "West_Highland_white_terrier": 0.1025,
    "American_coot": 0.1692,
    "racer": 0.1343,
    "flamingo": 0.1007,
    "kite": 0.1391,
    "goldfish": 0.0924,
    "tiger_shark": 0.1971,
    "vulture": 0.0790,
    "common_iguana": 0.1101,
    "orange": 0.0739,
}
"""IoU of LIME against Grad-CAM as the study prints it, by class."""
PUBLISHED_MEAN = 0.1198
"""Its mean over the ten images, as printed."""


# ---- two errors, reproduced


@cutters.register("luminance")
@dataclass(frozen=True)
class Luminance:
    """An error reproduced on purpose: pixels at or above a percentile of the *luminance
    of a saved figure*, not of the map.

    The figure has three panels (image, heat map, overlay) on a white page and is
    squeezed into the model's frame. Where more than the rest of the page is white the
    percentile is white itself: the mask selects the page's margins, whatever the map.
    ``tied`` is how many pixels share the value of the cut.
    """

    percentile: float = option(
        80.0, help="0 to 100, of the figure's luminance", least=0, most=100
    )

    def cut(self, explanation: Explanation) -> Mask:
        """The mask, in the frame of the explanation's values."""
        grey = luminance(figure(explanation), explanation.values.shape)
        cut = np.percentile(grey, self.percentile)
        tied = int(np.count_nonzero(grey == cut))
        note = f"cut at luminance {cut:g} of a saved figure, which {tied / grey.size:.0%} of it share"
        return Mask(grey >= cut, spell(self), tied if tied > 1 else 0, note)


def figure(explanation: Explanation) -> Array:
    """The figure that the study saved, as pixels (H, W, 3) uint8: three panels with
    titles on a white page.

    Its exact size is not known: 12 x 5 inches leave a quarter of it white, within the
    22-32 % that its masks covered.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(12, 5), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(page)
    _draw_panels(page, explanation)
    page.tight_layout()
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.array(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]


def _draw_panels(page: Figure, explanation: Explanation) -> None:
    image = images.place(
        explanation.sample.rgb,
        Placement.from_dict(explanation.geometry.as_dict()),
        "bilinear",
    )
    titles = ("Original image", "Grad-CAM heatmap", "Overlay")
    for number, (title, axes) in enumerate(
        zip(titles, page.subplots(1, 3), strict=True)
    ):
        if number != 1:
            axes.imshow(image)
        if number != 0:
            axes.imshow(
                explanation.values, cmap="jet", alpha=0.5 if number == 2 else 1.0
            )
        axes.set_title(title)
        axes.axis("off")


def luminance(pixels: Array, size: tuple[int, ...]) -> Array:
    """Luminance (h, w) uint8 of an image squeezed to ``size``: ITU-R 601, as Pillow's
    mode L has it.
    """
    from PIL import Image

    return np.array(
        Image.fromarray(images.resize(pixels, (size[0], size[1]))).convert("L")
    )


@fills.register("truncated")
@dataclass(frozen=True)
class Truncated:
    """An error reproduced on purpose: the percentile of each channel, computed on [0,
    1] and cast to a whole number: black.
    """

    percentile: float = option(20.0, help="0 to 100", least=0, most=100)

    def image(self, view: View, segments: Array | None) -> Tensor:
        """(1, C, h, w): 0, save in a channel whose percentile is 1 exactly."""
        whole = np.percentile(
            images.to_array(view.pixels), self.percentile, axis=(0, 1)
        ).astype(int)
        return torch.ones_like(view.pixels) * torch.from_numpy(whole).to(
            view.pixels
        ).reshape(1, -1, 1, 1)


# ---- what was published


def published_iou(name: str) -> float | None:
    """The study's IoU for an image named ``WNID_class`` or ``class``; None for any
    other.
    """
    return PUBLISHED_IOU.get(
        re.sub(r"^n\d{8}_", "", name.rpartition("/")[2]).partition(".")[0]
    )


def with_published(table: pd.DataFrame) -> pd.DataFrame:
    """The table of pairs with the study's IoU beside, in a column ``published_iou``
    (NaN where it has none).
    """
    found = [published_iou(str(name)) for name in table["sample"]]
    return table.assign(published_iou=np.array(found, dtype=float))


# ---- presets


@dataclass(frozen=True)
class RunColumn:
    """One column of a comparison: an explainer with its model, view, target and mask;
    None leaves each to the run.
    """

    label: str
    by: str
    model: str | None = None
    view: ViewMode | None = None
    mask: str | None = None
    target: str | None = None
    unseeded: bool = False
    built: Explainer | None = field(default=None, compare=False, repr=False)

    @cached_property
    def explainer(self) -> Explainer:
        """The explainer, built once: here, unless it was ``built`` already."""
        made: Explainer = self.built or explainers.build(self.by)
        return made

    @cached_property
    def cutter(self) -> Cutter | None:
        """The cutter of its mask, built once; None for the default."""
        built: Cutter | None = cutters.build(self.mask) if self.mask else None
        return built


@dataclass(frozen=True)
class Preset:
    """A named protocol.

    ``allow_mismatch`` lets columns differ in model, view or target; ``published`` adds
    the study's IoU.
    """

    name: str
    title: str
    columns: tuple[RunColumn, ...]
    note: str = ""
    allow_mismatch: bool = False
    published: bool = False


def preset_names() -> tuple[str, ...]:
    """The packaged presets."""
    folder = files("consilience") / "presets"
    return tuple(
        sorted(
            item.name.removesuffix(".toml")
            for item in folder.iterdir()
            if item.name.endswith(".toml")
        )
    )


def load_preset(name: str | Path) -> Preset:
    """A packaged preset by its name, or one's own by the path of its TOML file.

    Raises `ConsilienceError` for a name, a key or a value that there is not, and for a
    spec that does not parse; what a spec means is first asked where the preset runs.
    """
    text = str(name)
    if text in preset_names():
        return _preset(
            text,
            (files("consilience") / "presets" / f"{text}.toml").read_text(
                encoding="utf-8"
            ),
        )
    path = Path(name)
    if not path.is_file():
        raise ConsilienceError(
            f"{unknown('preset', text, preset_names())}; or a TOML file of one's own"
        )
    try:
        return _preset(path.stem, path.read_text(encoding="utf-8-sig"), where=text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConsilienceError(f"preset {text} cannot be read: {error}") from None


def _preset(name: str, text: str, where: str | None = None) -> Preset:
    where = f"preset {where or name}"
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConsilienceError(f"{where} is no TOML: {error}") from None
    columns = raw.pop("column", [])
    if (
        not isinstance(columns, list)
        or len(columns) < 1
        or not all(isinstance(item, dict) for item in columns)
    ):
        raise ConsilienceError(
            f"{where} needs its columns: one [[column]] or more, each with label and by"
        )
    kinds = {"title": str, "note": str, "allow_mismatch": bool, "published": bool}
    _check_keys(where, raw, kinds, needed=("title",), extra=("column",))
    built = tuple(
        _column(f"{where}, column {number}", item)
        for number, item in enumerate(columns, 1)
    )
    labels = [column.label for column in built]
    if len(set(labels)) < len(labels):
        raise ConsilienceError(
            f"{where} has two columns of one label: {', '.join(labels)}"
        )
    return Preset(
        name, columns=built, **{key: _one_line(value) for key, value in raw.items()}
    )


def _column(where: str, raw: dict[str, Any]) -> RunColumn:
    kinds = {
        item.name: bool if item.name == "unseeded" else str
        for item in fields(RunColumn)
        if item.name != "built"
    }
    _check_keys(where, raw, kinds, needed=("label", "by"))
    if raw.get("view") not in (None, "crop", "squash"):
        raise ConsilienceError(
            f"{where}: view is crop or squash; got {raw['view']!r}"
        )
    for key in ("by", "mask", "model"):
        if key in raw:
            parse(raw[key])
    return RunColumn(**raw)


def _check_keys(
    where: str,
    raw: Mapping[str, Any],
    kinds: Mapping[str, type],
    needed: Sequence[str],
    extra: Iterable[str] = (),
) -> None:
    for key, value in raw.items():
        if key not in kinds:
            raise ConsilienceError(
                f"{where}: {unknown('key', key, [*kinds, *extra])}"
            )
        if type(value) is not kinds[key]:
            what = "true or false" if kinds[key] is bool else "text"
            raise ConsilienceError(f"{where}: {key} is {what}; got {value!r}")
    missing = [key for key in needed if key not in raw]
    if missing:
        raise ConsilienceError(f"{where} lacks {', '.join(missing)}")


def _one_line(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value


def resolve_column(column: RunColumn, model: str | None) -> RunColumn:
    """The column with its model settled: ``model`` where given, but the column's own
    weights of that same network.

    A preset's ``resnet50:weights=IMAGENET1K_V1`` stays when plain ``resnet50`` is asked
    for, and gives way to anything else.
    """
    own = column.model
    if model is None or (own is not None and parse(own).name == model.strip()):
        return column
    return replace(column, model=model)


def columns_for(
    preset: Preset, models: Sequence[str] | None = None
) -> tuple[RunColumn, ...]:
    """The preset's columns with their models: none given leaves each its own, one is
    for all, else one for each.
    """
    given: list[str | None] = list(models) if models else [None]
    if len(given) == 1:
        given *= len(preset.columns)
    if len(given) != len(preset.columns):
        raise ConsilienceError(
            f"{len(given)} models for the {len(preset.columns)} columns of {preset.name}; "
            f"give one for all or one for each"
        )
    return tuple(
        resolve_column(column, model)
        for column, model in zip(preset.columns, given, strict=True)
    )


def with_seed(by: str, seed: int) -> str:
    """An explainer's spelling with its seed set to ``seed``, and nothing else changed."""
    spec = parse(by)
    options = tuple((key, value) for key, value in spec.options if key != "seed")
    return render(replace(spec, options=(*options, ("seed", str(seed)))))
