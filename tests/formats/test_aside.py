import pytest

from loramix.errors import AdapterError
from loramix.formats.aside import aside


def build(place, text, **options):
    with aside(place, **options) as new:
        new.mkdir()
        (new / "file").write_text(text, "utf-8")


def test_a_folder_appears_when_it_is_whole(tmp_path):
    place = tmp_path / "a" / "b"
    with aside(place) as new:
        new.mkdir()
        assert new.parent == place.parent
        assert not place.exists()
    assert [*place.parent.iterdir()] == [place]


def test_what_is_there_stays_until_the_new_one_is_whole(tmp_path):
    place = tmp_path / "x"
    build(place, "old")
    with pytest.raises(AdapterError, match="exists"):
        build(place, "new")
    with pytest.raises(TypeError):
        build(place, None, replace=True)
    assert (place / "file").read_text("utf-8") == "old"
    build(place, "new", replace=True)
    assert (place / "file").read_text("utf-8") == "new"
    assert [*tmp_path.iterdir()] == [place]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path):
    place = tmp_path / "x"
    build(place, "old")
    with pytest.raises(AdapterError, match="Cannot write"), aside(place, replace=True):
        pass  # nothing was built, so there is nothing to rename
    assert (place / "file").read_text("utf-8") == "old"
    assert [*tmp_path.iterdir()] == [place]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(AdapterError, match=r"Cannot write .*: (File exists|Not a directory)"):
        build(tmp_path / "file" / "x", "new")
