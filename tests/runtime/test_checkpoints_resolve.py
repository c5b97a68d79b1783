"""Any model name leads to a complete local folder, or to one sentence that says what to do."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from dash_runtime.checkpoints import resolve_checkpoint
from dash_runtime.checkpoints.embedded import EMBEDDED_FILE, INSTALL_COMMAND, embedded_gguf
from dash_runtime.checkpoints.hub import download_snapshot, is_hub_id
from dash_runtime.errors import CheckpointError, CheckpointNotFound, ConfigError, CorruptCheckpoint


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, dash_runtime.checkpoints\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'tokenizers', 'huggingface_hub'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_complete_folder_is_returned_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tiny_folder), None, tmp_path / "cache") == tiny_folder
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        if file.name != name:
            (folder / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=name) as caught:
        resolve_checkpoint(str(folder), None, tmp_path)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("model", ["gpt2", "./no/folder", "/no/folder", "a/b/c", "../x"])
def test_a_name_that_is_nothing_is_refused_with_what_a_model_can_be(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFound, match=r"embedded.*hub id") as caught:
        resolve_checkpoint(model, None, tmp_path)
    assert model in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"neither a folder nor a \.gguf"):
        resolve_checkpoint(str(file), None, tmp_path)


def test_an_empty_name_is_not_the_working_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model"):
        resolve_checkpoint("", None, tmp_path)


def test_a_revision_belongs_to_the_hub(tiny_folder: Path, tmp_path: Path) -> None:
    for model in ("embedded", str(tiny_folder)):
        with pytest.raises(ConfigError, match="revision"):
            resolve_checkpoint(model, "main", tmp_path)


def test_hub_ids_are_told_from_paths() -> None:
    hub_ids = ["org/model", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B"]
    paths = ["model", "a/b/c", "./a", "../a", "/a/b", "a/..", "a b/c", "a/", "https://x/y"]
    assert [model for model in (*hub_ids, *paths) if is_hub_id(model)] == hub_ids


def test_only_safetensors_json_and_templates_are_fetched_from_the_hub(tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def fake_download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(tmp_path)

    assert download_snapshot("org/model", "v1", fake_download) == tmp_path
    assert (asked["hub_id"], asked["revision"]) == ("org/model", "v1")

    from huggingface_hub.utils import filter_repo_objects

    files = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "chat_template.jinja",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/params.json",
        "onnx/model.onnx",
        "code.py",
    ]
    kept = filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == files[:5]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LocalEntryNotFoundError("offline\nand so on"), CheckpointNotFound),
        (OSError("no space\nleft"), CheckpointError),
        (RuntimeError("of some HTTP client"), CheckpointError),
    ],
)
def test_a_failed_download_is_one_sentence(error: Exception, kind: type[Exception]) -> None:
    def fail(hub_id: str, **options: Any) -> str:
        raise error

    with pytest.raises(kind, match="org/model") as caught:
        download_snapshot("org/model", None, fail)
    assert "\n" not in str(caught.value)


def test_without_its_package_the_embedded_model_says_how_to_install_it() -> None:
    with pytest.raises(CheckpointNotFound, match=INSTALL_COMMAND):
        embedded_gguf(package="no_such_package_here")


def test_another_file_in_the_place_of_the_embedded_model_is_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fake_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / EMBEDDED_FILE).write_bytes(b"GGUF and something else")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CorruptCheckpoint, match=EMBEDDED_FILE):
        embedded_gguf(package="fake_model_package")
