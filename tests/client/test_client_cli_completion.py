"""dash-client completion: the shells accept the scripts, which complete commands, options and files."""

import os
import shutil
import subprocess

import pytest

from dash_client.cli import main

pytest.importorskip("shtab")


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_accepts_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    result = subprocess.run([shell, "-n"], input=script(shell, capsys), capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


COMPLETE_IN_BASH = """
source /dev/stdin
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
specification=$(complete -p dash-client) || exit 1
[[ $specification =~ -F\\ ([^ ]+) ]] || exit 1
"${BASH_REMATCH[1]}" dash-client "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["he"], {"heatmap", "health"}),
        (["generate", "--fix"], {"--fixed-action"}),
        (["generate", "hello", "--mode", "ad"], {"adaptive"}),
        (["chat", "--ca-file", "certificate"], {"certificate.pem"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["bench", "--token"], {"--token-file"}),  # an option that is always refused is not offered
    ],
    ids=["command", "option", "choice", "file", "argument", "hidden"],
)
def test_bash_completes(
    words: list[str],
    expected: set[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: os.PathLike[str],
) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    monkeypatch.chdir(tmp_path)
    open("certificate.pem", "w").close()
    result = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE_IN_BASH, "bash", "dash-client", *words],
        input=script("bash", capsys),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == expected


def test_fish_completes(capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    code = "source - ; complete --do-complete 'dash-client generate --mode ad'"
    result = subprocess.run(
        ["fish", "--no-config", "-c", code], input=script("fish", capsys), capture_output=True, text=True, timeout=30
    )
    assert result.stdout.split()[:1] == ["adaptive"], result.stderr
