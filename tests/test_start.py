"""What a command imports before it answers, and what stands in for torch's compiler."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from consilience.models.importing import uncollected

HEAVY = ("torch._dynamo", "scipy.stats", "matplotlib.axes", "sympy", "openvino")
ONE = """
import sys
from consilience.cli import main
assert main(["explain", sys.argv[1], "--by", "gradcam", "-o", sys.argv[2]]) == 0
print([name for name in {names} if name in sys.modules])
"""


def python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_one_grad_cam_loads_nothing_that_it_does_not_need(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    code = ONE.replace("{names}", repr(HEAVY))
    assert python(code, tmp_path / "a.png", tmp_path / "run") == "[]"
    assert not (tmp_path / "run" / "panels").exists()


def test_a_wrong_path_is_answered_without_torch():
    code = (
        "import sys; from consilience.cli import main; "
        "code = main(['explain', 'nosuch.jpg']); print(code, 'torch' in sys.modules)"
    )
    assert python(code) == "1 False"


@pytest.mark.parametrize("was", [True, False])
def test_garbage_is_looked_for_again_after_an_import(was):
    """Whether it was looked for is as before, also where an import fails."""
    try:
        (gc.enable if was else gc.disable)()
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() is was
        with pytest.raises(ImportError), uncollected():
            raise ImportError
        assert gc.isenabled() is was
    finally:
        gc.enable()


@pytest.mark.parametrize(("alone", "frozen"), [(True, True), (False, False)])
def test_what_a_command_imports_is_kept_only_where_the_process_is_its_own(
    alone, frozen, tmp_path
):
    """Objects of somebody else's program, or of tests, are not kept from the collector."""
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    code = f"""
import gc, sys
from consilience import cli
def verb(arguments):
    print(gc.isenabled(), gc.get_freeze_count(), "torch" in sys.modules)
    return 0
cli.explain_verb = verb
cli.main(["explain", sys.argv[1]], alone={alone})
"""
    enabled, count, loaded = python(code, tmp_path / "a.png").split()
    assert (enabled, loaded) == ("True", "True")
    assert (int(count) > 100_000) is frozen


def test_the_compiler_is_as_it_would_be_afterwards():
    """A marked function is left out of a compiled one, and pooling asks the compiler."""
    code = """
import sys, torch
from consilience.models.importing import import_libraries
import_libraries("torchvision", "timm")
assert "timm" in sys.modules and "torch._dynamo" not in sys.modules
from timm.models.naflexvit import NaFlexRopeIterator
from torchvision.ops import roi_align
graphs = []
def count(graph, inputs):
    graphs.append(graph)
    return graph.forward
marked = next(
    value for value in vars(NaFlexRopeIterator).values()
    if getattr(value, "_torchdynamo_disable", False)
)
@torch.compile(backend=count)
def whole(x):
    y = x + 1
    left_out(y)
    return y * 2
seen = []
def left_out(y):
    seen.append(type(y).__name__)
left_out._torchdynamo_disable = True
assert torch.equal(whole(torch.ones(3)), torch.full((3,), 4.0))
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu") in (True, False)
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
print(len(graphs), seen)
"""
    assert python(code) == "2 ['Tensor']"


@pytest.mark.parametrize(
    "asks", ["from torch._dynamo import convert_frame", "torch._dynamo.config.x = 1"]
)
def test_a_library_that_wants_more_is_imported_with_the_compiler(tmp_path, asks):
    (tmp_path / "wanting.py").write_text(
        f"import torch\nimport torch._dynamo\n{asks}\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from consilience.models.importing import import_libraries;"
        "import_libraries('wanting');"
        "print('wanting' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    assert python(code, tmp_path) == "False False"


def test_nothing_stands_in_beside_other_threads():
    code = (
        "import sys, threading, time;"
        "from consilience.models.importing import import_libraries;"
        "threading.Thread(target=time.sleep, args=(2,)).start();"
        "import_libraries('torchvision'); print('torchvision' in sys.modules)"
    )
    assert python(code) == "False"
