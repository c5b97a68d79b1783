"""dash-client completion: the shells accept the scripts, which complete commands, options and files."""

import os
import shutil
import subprocess

import pytest
from command_runs import Command

pytest.importorskip("shtab")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_accepts_its_script(shell: str, command: Command) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    result = subprocess.run(
        [shell, "-n"], input=command("completion", shell).out, capture_output=True, text=True, timeout=30
    )
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
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: os.PathLike[str],
) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    monkeypatch.chdir(tmp_path)
    open("certificate.pem", "w").close()
    result = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE_IN_BASH, "bash", "dash-client", *words],
        input=command("completion bash").out,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == expected


def test_fish_completes(command: Command) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    code = "source - ; complete --do-complete 'dash-client generate --mode ad'"
    result = subprocess.run(
        ["fish", "--no-config", "-c", code],
        input=command("completion fish").out,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.stdout.split()[:1] == ["adaptive"], result.stderr
