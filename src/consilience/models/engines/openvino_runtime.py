"""OpenVINO itself: imported once, one core, and what this machine can do."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

# ---- OpenVINO


@cache
def _openvino() -> Any:
    # OpenVINO reports its use over the network unless that package is missing; nothing
    # here does.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@cache
def _core() -> Any:
    return _openvino().Core()


@cache
def _openvino_capabilities() -> tuple[str, ...]:
    return tuple(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
