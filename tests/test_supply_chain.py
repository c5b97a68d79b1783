"""The image is made of exact versions with digests, which agree with what pyproject.toml declares."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "deploy" / "image"
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}\b")


def entries(lock: str) -> dict[str, tuple[list[str], int]]:
    """Returns each package's versions, which may be one for each Python, and the fewest digests that one has."""
    found: dict[str, tuple[list[str], int]] = {}
    for entry in re.split(r"\n(?=\w)", (LOCKS / f"{lock}.lock").read_text()):
        name, _, version = entry.partition("==")
        versions, fewest = found.get(name, ([], 1 << 30))
        number = len(re.findall(r"--hash=sha256:[0-9a-f]{64}", entry))
        found[name] = ([*versions, version.split()[0]], min(fewest, number))
    return found


@pytest.mark.parametrize("lock", ["requirements", "model", "tools"])
def test_every_package_of_a_lock_file_has_digests(lock: str) -> None:
    assert all(number > 0 for _, number in entries(lock).values())


def test_the_lock_file_has_a_version_of_each_package_that_is_declared_to_work() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = entries("requirements")
    for text in [*project["dependencies"], *project["optional-dependencies"]["server"]]:
        requirement = Requirement(text)
        versions, _ = locked[requirement.name]
        assert all(requirement.specifier.contains(version, prereleases=True) for version in versions), text


def test_nothing_comes_into_the_image_but_by_a_lock_file_or_by_name() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert DIGEST.search(re.findall(r"^ARG PYTHON_IMAGE=.*", dockerfile, re.MULTILINE)[0])
    installs = re.findall(r"\b(?:pip|uv pip) install[^|&;]*", re.sub(r"^\s*#.*", "", dockerfile, flags=re.MULTILINE))
    assert len(installs) == 3
    tools, function, wheel = installs
    assert "--require-hashes" in tools
    assert '"$@"' in function
    assert wheel.rstrip(" \\\n").endswith("--no-deps /wheel/*.whl")


def test_the_stacks_images_have_digests_but_for_our_own_and_jaegers() -> None:
    images = re.findall(r"^ +image: (.+)$", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    without = [image for image in images if not DIGEST.search(image)]
    assert [image.partition(":")[0] for image in without] == ["dash-llm", "jaegertracing/jaeger"]
