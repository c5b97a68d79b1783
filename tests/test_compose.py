"""The local stack's files: what compose makes of them, and whether the dashboard asks for metrics that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.server.scraping import scrape
from tests.server.server_harness import fake_model, running_server, write_model_folder
from tests.server.test_audit import audit_of

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "dash.json"
FILES = ("docker-compose.yml", "docker-compose.gpu.yml")
SERVICES = ("server", "jaeger", "demo", "prometheus", "grafana")
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")


def compose_command() -> list[str] | None:
    """Compose version 2, which needs no engine to read its files. Version 1 knows neither all of them nor JSON."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            version = subprocess.run([*command, "version", "--short"], capture_output=True, text=True)
            if version.returncode == 0 and not version.stdout.startswith("1."):
                return command
    return None


def read_stack(*files: str) -> dict[str, Any]:
    """All services as compose puts the files together; without it, the first file as it is written."""
    command = compose_command()
    if command is None:
        yaml = pytest.importorskip("yaml")
        if len(files) > 1:
            pytest.skip("needs docker-compose")
        return dict(yaml.safe_load((ROOT / files[0]).read_text())["services"])
    options = [option for file in files for option in ("--file", file)]
    profiles = ["--profile", "demo", "--profile", "metrics"]
    done = subprocess.run(
        [*command, *options, *profiles, "config", "--format", "json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["services"])


def _default(words: str) -> str:
    """Returns the default of a variable, which compose fills in."""
    return re.sub(r"\$\{\w+:-(.*)\}", r"\1", words)


@pytest.fixture(scope="module", params=[FILES[:1], FILES], ids=["plain", "gpu"])
def stack(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read_stack(*request.param)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_and_has_no_more_rights_than_it_needs(stack: dict[str, Any], name: str) -> None:
    service = stack[name]
    assert PINNED.fullmatch(_default(service["image"])), service["image"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    user, _, _ = service["user"].partition(":")
    assert int(user) > 0
    assert service["mem_limit"]
    assert service["cpus"]
    assert not service.get("privileged")


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_this_machines_alone(stack: dict[str, Any], name: str) -> None:
    for port in stack[name].get("ports", []):
        assert port["host_ip"] == "127.0.0.1" if isinstance(port, dict) else port.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", SERVICES)
def test_what_goes_on_running_says_whether_it_is_well(stack: dict[str, Any], name: str) -> None:
    check = stack[name]["healthcheck"]
    if name == "demo":
        assert check == {"disable": True}
    else:
        assert check["test"][0] == "CMD"


def test_the_server_waits_for_nobody_and_the_others_for_it(stack: dict[str, Any]) -> None:
    assert not stack["server"].get("depends_on"), "a collector that is down must not keep the server from starting"
    assert stack["demo"]["depends_on"]["server"]["condition"] == "service_healthy"
    assert stack["grafana"]["depends_on"]["prometheus"]["condition"] == "service_healthy"


def test_only_server_and_jaeger_start_unasked(stack: dict[str, Any]) -> None:
    assert {name for name, service in stack.items() if not service.get("profiles")} == {"server", "jaeger"}
    assert set(stack) == set(SERVICES)


def test_mounted_files_exist(stack: dict[str, Any]) -> None:
    for service in stack.values():
        for volume in service.get("volumes", []):
            if isinstance(volume, str):
                source, _, _ = volume.partition(":")
                assert not source.startswith(".") or (ROOT / source).exists()
            elif volume["type"] == "bind":
                assert Path(volume["source"]).exists()
                assert volume["read_only"] is True


def test_the_gpu_file_asks_for_a_device() -> None:
    server = read_stack(*FILES)["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert server["environment"]["DASH_DEVICE"] == "cuda"


def test_the_stacks_jaeger_is_the_one_that_the_tests_run() -> None:
    _, _, version = read_stack(FILES[0])["jaeger"]["image"].partition(":")
    assert f"version.latestVersion=v{version}" in (ROOT / ".ci" / "make-jaeger").read_text()


def test_the_images_torch_is_the_cpu_build_unless_another_is_asked_for() -> None:
    def torch(*files: str) -> str:
        return str(read_stack(*files)["server"]["build"]["args"]["TORCH_BACKEND"])

    # Compose fills the default in; without it, the file's own words are read.
    assert torch(FILES[0]) in {"cpu", "${TORCH_BACKEND-cpu}"}
    assert torch(*FILES) == ""


async def test_every_metric_of_the_dashboard_is_one_that_the_server_exports(tmp_path: Path) -> None:
    expressions = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
    ]
    wanted = {name for expression in expressions for name in re.findall(r"\b(?:dash|gen_ai_server)_\w+", expression)}
    labels = {"dash_mode", "dash_token_type", "dash_action", "dash_layer"}
    labels |= {"dash_audit_agrees", "dash_policy", "dash_draft_source", "dash_draft_state"}
    async with running_server(fake_model(write_model_folder(tmp_path)), metrics_port=0, audit_rate=1.0) as server:
        answer = await server.generate(text="abc", max_new_tokens=3)
        await audit_of(server, answer.started.request_id)
        seen = await scrape(server)
    exported_labels = {label for series in seen.series.values() for given, _ in series for label in given}
    assert wanted - labels - seen.series.keys() == set()
    assert wanted & labels <= exported_labels
    assert len(wanted - labels) >= 15
