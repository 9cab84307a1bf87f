"""What can be refused before torch is loaded, is."""

import subprocess
import sys

import pytest

from consilience import catalogue, registry
from consilience.cli import main
from consilience.registry import options_of
from consilience.types import ConsilienceError

KINDS = (
    registry.explainers,
    registry.metrics,
    registry.fills,
    registry.segmenters,
    registry.cutters,
)


@pytest.mark.parametrize("of", KINDS, ids=lambda of: of.kind)
def test_the_source_says_what_the_registry_has(of):
    own = {
        name
        for name in of.names()
        if of.get(name).__module__.startswith("consilience.")
    }
    assert set(catalogue._listed(of.kind)) == own
    for name in own:
        listed = catalogue._all_options(of.kind, catalogue._listed(of.kind)[name])
        assert list(listed) == [item.name for item in options_of(of.get(name))]


WRONG = [
    (["explain", "nosuch.jpg"], 1, "no images: nosuch.jpg does not exist"),
    (["explan", "x.jpg"], 2, "no verb 'explan'; did you mean 'explain'?"),
    (["explain", ".", "--by", "gradcamm"], 1, "did you mean 'gradcam'?"),
    (["explain", ".", "--by", "lime:sample=3"], 1, "(did you mean samples?)"),
    (["explain", ".", "--by", "lime:fill=blurr"], 1, "no fill 'blurr'"),
    (["explain", ".", "--by", "lime:5,segments=sli(9)"], 1, "no segmenter 'sli'"),
    (["evaluate", ".", "--metric", "insertio"], 1, "no metric 'insertio'"),
    (["explain", ".", "--truth", "no.csv"], 1, "--truth: no.csv does not exist"),
    (["report", "nosuch"], 1, "nosuch does not exist"),
    (["compare", "nosuch", "other:layer4"], 1, "nosuch does not exist"),
    (["dissect", "drawn:images=3", "--words", "no.txt"], 1, "no.txt does not exist"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG)
def test_one_line_and_the_exit_code(
    arguments, code, message, capsys, tmp_path, monkeypatch
):
    (tmp_path / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_none_of_them_loads_torch(tmp_path):
    (tmp_path / "a.png").touch()
    script = (
        "import sys; from consilience.cli import main\n"
        f"for arguments in {[arguments for arguments, _, _ in WRONG]!r}:\n"
        "    main(arguments)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_is_right_passes():
    for spec in ("lime:64,segments=slic(9),fill=blur", "gradcam:layer=a+b", "rise"):
        catalogue.check_specification(registry.explainers, spec)
    catalogue.check_specification(registry.metrics, "insertion:steps=3,fill=black")
    with pytest.raises(ConsilienceError, match="no option"):
        catalogue.check_specification(registry.explainers, "gradcam:layr=a")
