"""The slider of a notebook, as a widget (extra ``notebook``)."""

from __future__ import annotations

import anywidget
import traitlets

from consilience.show import html


class Slider(anywidget.AnyWidget):  # type: ignore[misc]
    """Maps of one image and a slider for the cut; see `notebook.slider`."""

    _esm = (
        f"{html.part('viewer.js')}\nViewer.ramps({html.ramps()});\n"
        f"{html.part('widget.js')}"
    )
    _css = "".join(
        (html.part("viewer.css"), html.part("tiles.css"), html.ramp_styles())
    )
    tiles = traitlets.Unicode().tag(sync=True)
    cut = traitlets.Enum(("run", "area", "share"), "area").tag(sync=True)
    level = traitlets.Int(20, min=1, max=99).tag(sync=True)
    a = traitlets.Int(0).tag(sync=True)
    b = traitlets.Int(1).tag(sync=True)
    iou = traitlets.Float(None, allow_none=True).tag(sync=True)
    expected = traitlets.Float(None, allow_none=True).tag(sync=True)
    excess = traitlets.Float(None, allow_none=True).tag(sync=True)
