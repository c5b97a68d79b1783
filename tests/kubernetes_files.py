"""Reads deploy/kubernetes, file by file and as kustomize puts an overlay together. Checks nothing but their schemas."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.31", kubernetes_validate.latest_version())
# Kinds that others define, whose schemas the validator does not have.
FOREIGN_KINDS = {"GRPCRoute", "PodMonitor", "ScaledObject"}

Manifest = dict[str, Any]


def read(path: Path) -> Manifest:
    (manifest,) = yaml.safe_load_all(path.read_text())
    return dict(manifest)


def files() -> list[Path]:
    return sorted(FOLDER.rglob("*.yaml"))


def patches() -> set[Path]:
    """Returns the files that only change a part of another."""
    return {
        path.parent / patch["path"]
        for path in files()
        if path.name == "kustomization.yaml"
        for patch in read(path).get("patches", [])
        if "path" in patch
    }


def whole_files() -> list[Path]:
    return [path for path in files() if path.name != "kustomization.yaml" and path not in patches()]


def kustomize_command() -> list[str] | None:
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


@cache
def build(folder: str) -> list[Manifest]:
    """Returns everything in a folder, as kustomize puts it together."""
    command = kustomize_command()
    if command is None:
        pytest.skip("needs kustomize or kubectl")
    done = subprocess.run([*command, str(FOLDER / folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def pod_of(manifests: list[Manifest]) -> Manifest:
    return dict(of_kind(manifests, "Deployment")["spec"]["template"]["spec"])


def base() -> list[Manifest]:
    return [read(path) for path in whole_files() if path.parent.name == "base"]


def validate(manifest: Manifest, version: str) -> None:
    if manifest["kind"] not in FOREIGN_KINDS:
        kubernetes_validate.validate(manifest, version, strict=True)


def settings_of(manifests: list[Manifest]) -> dict[str, str]:
    """Returns the server's environment in an overlay."""
    (server,) = pod_of(manifests)["containers"]
    own = {variable["name"]: variable["value"] for variable in server.get("env", [])}
    return {**of_kind(manifests, "ConfigMap")["data"], **own}


def strings(node: Any) -> Iterator[str]:
    """Yields every text in a manifest, keys included."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from (key, *strings(value))
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
    elif isinstance(node, str):
        yield node
