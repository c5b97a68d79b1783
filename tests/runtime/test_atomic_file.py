"""Files that are whole or not there, also while several containers write to one folder."""

from pathlib import Path

from dash_runtime.files.atomic_file import replacing


def test_writers_with_the_same_process_id_do_not_write_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with replacing(path) as first:
        first.write_text("fir")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "fir"
        first.write_text("first")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
