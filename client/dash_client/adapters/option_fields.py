"""The client's options as pydantic fields, for frameworks that need declared options. Knows no framework."""

from typing import Any

from pydantic import BaseModel, Field

from dash_client.types import Action


class ConnectionFields(BaseModel):
    """The connection options, without secrets."""

    target: str | None = Field(default=None, description="host:port; unset: DASH_TARGET, else localhost:50051")
    tls: bool | None = Field(default=None, description="Whether the connection is encrypted; unset: with a file below")
    ca_file: str | None = Field(default=None, description="PEM file of who may sign the server's certificate")
    certificate_file: str | None = Field(default=None, description="PEM file of this client's certificate chain")
    key_file: str | None = Field(default=None, description="PEM file of that certificate's key")
    server_name: str | None = Field(default=None, description="Name in the server's certificate, if not the target's")
    allow_insecure_token: bool | None = Field(default=None, description="Send a token without TLS")


class OptionFields(BaseModel):
    """The options of every request. None leaves the server's default; the client and the server check the ranges."""

    temperature: float | None = Field(default=None, description="Divides the logits, in [0, 100]; 0 is greedy")
    max_tokens: int | None = Field(default=None, description="Most tokens to generate")
    stop: str | list[str] | None = Field(default=None, description="Stop before the first of these strings")
    top_k: int | None = Field(default=None, description="Keep the k most probable tokens; 0 keeps all")
    top_p: float | None = Field(default=None, description="Keep tokens up to this probability in sum, in (0, 1]")
    min_p: float | None = Field(default=None, description="Keep tokens at least this probable beside the best one")
    repetition_penalty: float | None = Field(default=None, description="Weakens the tokens seen so far, in (0, 100]")
    presence_penalty: float | None = Field(default=None, description="Subtracted from tokens already in the output")
    frequency_penalty: float | None = Field(default=None, description="Subtracted once per occurrence in the output")
    seed: int | None = Field(default=None, description="Seed of the request's own generator")
    ignore_eos: bool | None = Field(default=None, description="Go on past the model's end-of-sequence tokens")
    immediate: bool | None = Field(default=None, description="Send every token at once, also on a busy server")
    priority: str | None = Field(default=None, description='Class in the server\'s queue: "low", "normal" or "high"')
    parallel_tool_calls: bool | None = Field(default=None, description="Whether a reply may call several tools")
    mode: str | None = Field(
        default=None, description='How layers are chosen: "adaptive", "full_depth", "fixed" or "exact"'
    )
    compute_budget: float | None = Field(
        default=None, description="Upper bound on the mean decode cost, as a share of the full-depth token, in (0, 1]"
    )
    policy_name: str | None = Field(default=None, description="Which policy decides")
    fixed_action: Action | str | None = Field(
        default=None, description='In mode "fixed": "skip", "int3", "int4", "int8" or "full"'
    )
    draft_length: int | None = Field(default=None, description='In mode "exact": most tokens per draft')
    trace: bool | None = Field(default=None, description="Trace this request's decisions")
    timeout: float | None = Field(default=None, description="Deadline of the whole call in seconds")


def client_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the client's keyword arguments: without those that are None, and under the client's names."""
    given = {name: value for name, value in options.items() if value is not None}
    if "max_tokens" in given:
        given["max_new_tokens"] = given.pop("max_tokens")
    return given
