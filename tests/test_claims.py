"""Folders that are begun with settings, and what differs from them."""

import pytest

from babel_jax.claims import changes, is_begun
from babel_jax.errors import BadInput


def test_tables_and_lists_of_tables_are_entered_and_other_values_are_compared_whole():
    before = {"seed": 0, "stages": [{"steps": 4}, {"steps": 5}], "mesh": {"fsdp": 2}, "ids": [1, 2], "old": 1}
    now = {"seed": 0, "stages": [{"steps": 4}, {"steps": 6}], "mesh": {"fsdp": 4}, "ids": [1, 3], "new": 2}
    assert changes(before, now) == [
        ("stages.1.steps", 5, 6),
        ("mesh.fsdp", 2, 4),
        ("ids", [1, 2], [1, 3]),
        ("new", None, 2),
        ("old", 1, None),
    ]
    assert changes(now, now) == []
    # Lists of other lengths, and a table in place of a number, have no common part to enter.
    assert changes({"stages": [{"steps": 4}]}, {"stages": []}) == [("stages", [{"steps": 4}], [])]
    assert changes({"cleaning": None}, {"cleaning": {"mask": True}}) == [("cleaning", None, {"mask": True})]


@pytest.mark.parametrize(
    ("files", "begun"),
    [((), False), (("settings.json",), True), (("settings.json", "a"), True), ((".x.partial",), False)],
)
def test_a_folder_is_begun_if_it_has_settings(tmp_path, files, begun):
    for name in files:
        (tmp_path / name).write_text("{}")
    assert is_begun(tmp_path, "settings.json", "a study", "--out") == begun
    assert not is_begun(tmp_path / "missing", "settings.json", "a study", "--out")


def test_a_folder_of_someone_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        BadInput, match=r"not empty and not a study \(it has no settings.json\); give another --out"
    ):
        is_begun(tmp_path, "settings.json", "a study", "--out")
