"""The service config in docs/scaling.md, for other clients, is the one that ours uses."""

import json
from pathlib import Path

from dash_client.channel import DEFAULT_RETRIES, channel_options, resolve_target
from tests.docs.code_blocks import code_blocks

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_service_config_is_our_clients_own() -> None:
    (shown,) = (block.code for block in code_blocks(PAGE) if block.language == "json")
    options = dict(channel_options(resolve_target("localhost:50051"), DEFAULT_RETRIES))
    assert json.loads(shown) == json.loads(str(options["grpc.service_config"]))
