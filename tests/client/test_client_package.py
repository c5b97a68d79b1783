"""The exports of the package, and the cost of importing it."""

import json
import subprocess
import sys
import time

import dash_client

MEASURE = """
import json, sys, time
begin = time.process_time()
import dash_client
client = time.process_time()
import dash_client.cli
end = time.process_time()
print(json.dumps({"client": client - begin, "cli": end - client, "modules": sorted(sys.modules)}))
"""


def test_the_exports_are_what_the_package_lists() -> None:
    """The list is that of the reference (tests/docs/test_reference.py)."""
    assert dash_client.__all__ == sorted(dash_client.__all__)
    public = {name for name in vars(dash_client) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(dash_client, name)).__name__ == "module"}
    assert public - modules == set(dash_client.__all__)


def test_importing_is_quick_and_pulls_in_no_numerics() -> None:
    runs = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, check=True)
        runs.append(json.loads(result.stdout))
        # Other processes cost this one cache misses, so one quick run of several is enough.
        if runs[-1]["client"] + runs[-1]["cli"] < 0.3:
            break
        time.sleep(0.2)
    assert min(run["client"] + run["cli"] for run in runs) < 0.3
    forbidden = {"numpy", "torch", "transformers", "msgspec", "pydantic", "dash_runtime", "dash_server"}
    forbidden |= {"opentelemetry", "tqdm"}
    assert not forbidden & {name.partition(".")[0] for name in runs[0]["modules"]}
    only_for_traces = ("google.protobuf.json_format", "dash_client.trace")
    assert not [name for name in runs[0]["modules"] if name.startswith(only_for_traces)]
