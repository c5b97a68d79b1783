"""The served model while its workers come and go: what of it is read again."""

import os
from pathlib import Path
from typing import Any

from dash_server.served_model import ServedModel
from dash_server.worker.messages import Ready
from tests.server.server_harness import write_model_folder


def loaded(folder: Path, facts: Any, last: ServedModel | None = None) -> ServedModel:
    return ServedModel.load(Ready(facts, str(folder), 0.1), "model", None, folder.parent, last)


def test_a_worker_that_comes_back_brings_facts_but_no_second_tokenizer(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    first = loaded(folder, "facts")
    again = loaded(folder, "newer facts", first)
    assert again.facts == "newer facts"
    assert again.tokenizer is first.tokenizer
    assert again.chat_template is first.chat_template


def test_files_that_changed_meanwhile_and_another_folder_are_read_again(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    first = loaded(folder, "facts")
    (folder / "gone").symlink_to(tmp_path / "nothing")
    os.utime(folder / "chat_template.jinja", ns=(1, 1))
    second = loaded(folder, "facts", first)
    assert second.chat_template is not first.chat_template
    assert loaded(folder, "facts", second).tokenizer is second.tokenizer
    assert loaded(write_model_folder(tmp_path / "other"), "facts", second).tokenizer is not second.tokenizer
