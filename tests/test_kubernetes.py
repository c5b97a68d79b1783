"""The files for Kubernetes: valid, no more rights than needed, in agreement with the code, the image and compose."""

import os
import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")

import kubernetes_validate
import yaml

from dash_server.health import ALIVE, READY
from dash_server.settings import ENV_PREFIX, Settings
from tests.kubernetes_files import (
    FOLDER,
    FOREIGN_KINDS,
    ROOT,
    VERSIONS,
    Manifest,
    base,
    build,
    files,
    of_kind,
    patches,
    pod_of,
    read,
    settings_of,
    strings,
    validate,
    whole_files,
)
from tests.server.scraping import scrape
from tests.server.server_harness import fake_model, running_server, write_model_folder

OVERLAYS = ("cpu", "gpu", "metrics", "tls")
KUSTOMIZE_KINDS = {"Kustomization", "Component"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", whole_files(), ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_file_is_valid_and_a_misspelt_one_would_not_be(path: Path, version: str) -> None:
    manifest = read(path)
    validate(manifest, version)
    if manifest["kind"] not in FOREIGN_KINDS:
        with pytest.raises(kubernetes_validate.ValidationError):
            validate({**manifest, "specc": {}}, version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_valid_as_kustomize_builds_it(overlay: str, version: str) -> None:
    manifests = build(f"overlays/{overlay}")
    assert {manifest["kind"] for manifest in manifests} >= {"Deployment", "Service", "NetworkPolicy"}
    for manifest in manifests:
        validate(manifest, version)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "dash-llm"


def test_all_parts_go_together(tmp_path: Path) -> None:
    components = [os.path.relpath(FOLDER / "components" / name, tmp_path) for name in ("metrics", "tls", "gateway")]
    own = {"resources": [os.path.relpath(FOLDER / "overlays" / "gpu", tmp_path)], "components": components}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(own))
    manifests = build(str(tmp_path))
    for manifest in manifests:
        validate(manifest, VERSIONS[-1])
    (server,) = pod_of(manifests)["containers"]
    assert server["image"] == "dash-llm:0.2.0-cuda"
    assert {port["name"] for port in server["ports"]} == {"grpc", "metrics"}
    assert {"DASH_METRICS_PORT", "DASH_TLS_KEY_FILE"} <= settings_of(manifests).keys()
    assert {manifest["kind"] for manifest in manifests} >= FOREIGN_KINDS


def test_every_file_is_used_and_every_patch_has_something_to_change() -> None:
    used: set[Path] = set()
    for path in files():
        if path.name == "kustomization.yaml":
            content = read(path)
            assert content["kind"] in KUSTOMIZE_KINDS
            named = [*content.get("resources", []), *content.get("components", [])]
            used |= {(path.parent / name).resolve() for name in named}
    assert set(whole_files()) <= used
    assert all(path.exists() for path in used)
    known = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in base()}
    pod = pod_of(base())
    containers = {container["name"] for container in (*pod["containers"], *pod["initContainers"])}
    for path in patches():
        patch = read(path)
        assert (patch["kind"], patch["metadata"]["name"]) in known, path
        changed = patch["spec"]["template"]["spec"]
        names = {container["name"] for key in ("containers", "initContainers") for container in changed.get(key, [])}
        assert names <= containers, path


def check_pod(pod: Manifest) -> None:
    """Checks that the pod may do no more than it has to, and is limited and looked after."""
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False  # a Service `dash` would set DASH_PORT
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod["containers"], *pod["initContainers"]):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        resources = container["resources"]
        for name in ("cpu", "memory"):
            assert resources["requests"][name] == resources["limits"][name]
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert container.keys() >= {"startupProbe", "livenessProbe", "readinessProbe"}


def test_the_base_has_no_more_rights_than_it_needs() -> None:
    check_pod(pod_of(base()))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_has_no_more_rights_than_it_needs(overlay: str) -> None:
    pod = pod_of(build(f"overlays/{overlay}"))
    check_pod(pod)
    # The step that measures the machine must have what the server has.
    first, second = pod["containers"][0], pod["initContainers"][0]
    assert (first["resources"], first["image"], first["envFrom"]) == (
        second["resources"],
        second["image"],
        second["envFrom"],
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_torch_takes_the_threads_that_the_container_has(overlay: str) -> None:
    manifests = build(f"overlays/{overlay}")
    (server,) = pod_of(manifests)["containers"]
    assert settings_of(manifests)["DASH_NUM_THREADS"] == server["resources"]["limits"]["cpu"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_of_an_overlay_can_be_read(overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = build(f"overlays/{overlay}")
    (server,) = pod_of(manifests)["containers"]
    mounted = [mount["mountPath"] for mount in server["volumeMounts"]]
    for name, value in settings_of(manifests).items():
        if name.endswith("_FILE"):
            assert any(value.startswith(f"{folder}/") for folder in mounted)
            (secret := tmp_path / Path(value).name).touch()
            value = str(secret)
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.max_connection_age_seconds == 120
    assert (settings.token_file is not None) == (overlay == "tls")
    assert (settings.metrics_port is not None) == (overlay == "metrics")


def test_every_setting_exists() -> None:
    text = "\n".join(path.read_text() for path in (*files(), FOLDER / "base" / "settings.env"))
    named = set(re.findall(r"DASH_[A-Z_]+[A-Z]", text))
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    assert named - known - {"DASH_TLS"} == set()
    assert len(named) > 10


def test_ports_user_image_and_cache_are_those_of_the_image_and_of_compose() -> None:
    compose = read(ROOT / "docker-compose.yml")["services"]["server"]
    gpu = read(ROOT / "docker-compose.gpu.yml")["services"]["server"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    pod = pod_of(base())
    server = pod["containers"][0]
    assert server["ports"] == [{"name": "grpc", "containerPort": Settings().port}]
    assert f"EXPOSE {Settings().port}" in dockerfile
    assert f"useradd --uid {pod['securityContext']['runAsUser']} " in dockerfile
    assert compose["user"].startswith(f"{pod['securityContext']['runAsUser']}:")
    assert {container["image"] for container in (*pod["containers"], *pod["initContainers"])} == {compose["image"]}
    (image,) = read(FOLDER / "overlays" / "gpu" / "kustomization.yaml")["images"]
    assert f"{image['name']}:{image['newTag']}" == gpu["image"]
    (cache_mount,) = (mount for mount in server["volumeMounts"] if mount["name"] == "model-cache")
    assert f"DASH_CACHE_FOLDER={cache_mount['mountPath']}" in dockerfile
    endpoint = read(FOLDER / "components" / "metrics" / "endpoint.yaml")["spec"]["template"]["spec"]["containers"][0]
    assert {one["name"]: one["value"] for one in endpoint["env"]}.items() <= compose["environment"].items()
    assert str(endpoint["ports"][0]["containerPort"]) == compose["environment"]["DASH_METRICS_PORT"]


def test_the_kubelet_waits_for_the_drain_and_asks_what_health_knows() -> None:
    pod = pod_of(base())
    server = pod["containers"][0]
    before = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + Settings().shutdown_grace_seconds + 10
    port = server["ports"][0]["containerPort"]
    assert server["startupProbe"]["grpc"] == server["livenessProbe"]["grpc"] == {"port": port, "service": ALIVE}
    assert server["readinessProbe"]["grpc"] == {"port": port, "service": READY}


def test_a_pod_with_tls_is_not_asked_without() -> None:
    (server,) = pod_of(build("overlays/tls"))["containers"]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert "grpc" not in server[name]
    assert "appProtocol" not in of_kind(build("overlays/tls"), "Service")["spec"]["ports"][0]


@pytest.mark.parametrize("folder", ["base", "components/metrics", "components/gateway"])
def test_names_and_labels_lead_to_each_other(folder: str) -> None:
    deployment = of_kind(base(), "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    manifests = [read(path) for path in whole_files() if path.parent == FOLDER / folder]
    own_ports = {"grpc", "metrics"}
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector", {}))
        assert selector.get("matchLabels", selector) in ({}, labels)
        for rule in spec.get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= own_ports
        if manifest["kind"] == "Service":
            assert {port["targetPort"] for port in spec["ports"]} == {"grpc"}
        if manifest["kind"] == "PodMonitor":
            assert [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]] == ["metrics"]
        if manifest["kind"] == "ScaledObject":
            assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        if manifest["kind"] == "GRPCRoute":
            (service,) = (one for one in manifests if one["kind"] == "Service")
            (backend,) = spec["rules"][0]["backendRefs"]
            assert backend == {"name": service["metadata"]["name"], "port": service["spec"]["ports"][0]["port"]}


def test_the_scaler_owns_the_number_of_pods() -> None:
    manifests = build("overlays/metrics")
    assert "replicas" not in of_kind(manifests, "Deployment")["spec"]
    assert of_kind(manifests, "ScaledObject")["spec"]["minReplicaCount"] >= 2
    budget = of_kind(manifests, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] < of_kind(manifests, "ScaledObject")["spec"]["minReplicaCount"]


async def test_every_metric_and_method_that_the_files_name_exists(tmp_path: Path) -> None:
    texts = [text for path in whole_files() for text in strings(read(path))]
    metrics = {name for text in texts for name in re.findall(r"\bdash_(?!api)\w+", text)}
    services = {text for text in texts if re.fullmatch(r"[a-z_0-9.]+\.v\d\.\w+", text)}
    async with running_server(fake_model(write_model_folder(tmp_path)), metrics_port=0) as server:
        seen = await scrape(server)
        assert services == {"dash_api.v1.GenerationService", "dash_api.v1.ModelService", "grpc.health.v1.Health"}
        assert await server.is_serving("dash_api.v1.GenerationService")
    assert metrics == {"dash_queue_requests", "dash_slots_used"}
    assert metrics <= seen.series.keys()


def test_the_model_is_prepared_by_one_pod_at_a_time_on_the_cache_that_they_share() -> None:
    (step,) = pod_of(base())["initContainers"]
    flock, _, lock, *command = step["command"]
    assert (flock, command) == ("flock", ["dash-server", "--prepare"])
    assert command[0] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert any(lock.startswith(f"{mount['mountPath']}/") for mount in step["volumeMounts"])
