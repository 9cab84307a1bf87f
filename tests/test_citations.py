"""What a report cites: every key is there, every entry is whole, and the paragraph names
what was run.
"""

import re

import pytest

from consilience.registry import explainers, metrics, summary_of
from consilience.show import citations


def test_every_key_has_an_entry_and_every_entry_is_whole():
    there = citations.entries()
    used = {key for keys in citations.CITED.values() for key in keys} | {"holm1979"}
    assert used <= set(there)
    for key, entry in there.items():
        assert re.match(r"@(article|inproceedings)\{" + re.escape(key), entry)
        assert entry.count("{") == entry.count("}")
        for field in ("author", "title", "year"):
            assert re.search(rf"{field} = \{{.+\}}", entry), (key, field)


def test_only_registered_names_are_cited():
    assert set(citations.CITED) <= {*explainers.names(), *metrics.names()}


@pytest.mark.parametrize("registry", [explainers, metrics])
def test_a_year_of_the_docstring_is_the_year_of_a_work(registry):
    """Two hands wrote them: where a docstring names one year, one of its works has it."""
    for name in registry.names():
        said = set(re.findall(r"\b(?:19|20)\d\d\b", summary_of(registry.get(name))))
        keys = citations.CITED.get(name, ())
        if not keys or not said:
            continue
        years = {
            re.search(r"year = \{(\d+)\}", citations.entries()[k])[1] for k in keys
        }
        assert years & said, (name, said, years)


def test_paragraph_and_keys_are_of_what_was_run():
    spelled = [
        "gradcam:layer=layer4",
        "lime:samples=700,seed=1",
        "gradcam",
        "own:x=1",
    ]
    said = citations.methods_paragraph(spelled, ["deletion"], True, "1.2")
    assert "consilience 1.2: Grad-CAM (Selvaraju et al., ICCV 2017" in said
    assert said.count("Selvaraju") == 1
    assert "; own." in said
    assert "Holm" in said
    assert "measured by Deletion (Petsiuk" in said
    keys = citations.keys_of([*spelled, "deletion"])
    assert keys == ["petsiuk2018rise", "ribeiro2016lime", "selvaraju2017gradcam"]
    alone = citations.methods_paragraph(["gradcam"], [], False, "1.2")
    assert "Holm" not in alone
    assert "measured" not in alone
    assert citations.bibtex(keys).count("@") == 3
