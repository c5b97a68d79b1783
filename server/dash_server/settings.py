"""The server's settings, read from DASH_ environment variables and checked once at start.

Knows no gRPC and starts nothing.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field, FilePath, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dash_runtime.checkpoints import default_cache_folder
from dash_runtime.config import MOST_BURST_MILLISECONDS, EngineConfig, LaneKind
from dash_server.scaling import WorkerRange
from dash_server.setting_types import ActionNames, LogFormat, LogLevel, Names, RayAddress, Workers
from dash_server.worker.messages import WorkerConfig

ENV_PREFIX = "DASH_"
_MEBIBYTE = 1024 * 1024


class Settings(BaseSettings):
    """One field for each DASH_ variable, named in capitals. An empty variable counts as unset."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    model: str = Field(default="embedded", description="`embedded`, a folder, a GGUF file or a hub id")
    model_revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model")
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda` or `cuda:N`")
    devices: Names | None = Field(
        default=None,
        description="Devices that share the layers of a model that is larger than one, such as `cuda:0,cuda:1`; "
        "unset: `DASH_DEVICE`",
    )
    precision: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Weights of the FULL action")
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads of the worker; unset: torch's choice")
    actions: ActionNames | None = Field(
        default=None, description="Actions to offer, such as `INT4,SKIP`; unset: what fits well into free memory"
    )
    weights: Literal["mapped", "copied"] = Field(
        default="mapped", description="Native code's weights: a file that workers share, or a copy in each one's memory"
    )
    policy_file: FilePath | None = Field(default=None, description="A learned policy for this model")
    lane: LaneKind | None = Field(default=None, description="Where the policy runs; unset: the device's default")
    cache_folder: Path = Field(
        default_factory=lambda: default_cache_folder(os.environ),
        description="Converted models and compiled code; $XDG_CACHE_HOME/dash-llm",
    )

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on")
    port: int = Field(default=50051, ge=0, le=65535, description="Port to listen on; 0 is any free port")
    port_file: Path | None = Field(default=None, description="File that the bound port is written to")

    allow_plaintext: bool = Field(
        default=False, description="Listen without TLS on an address that other machines reach"
    )
    tls_certificate_file: FilePath | None = Field(
        default=None, description="Certificate chain in PEM; read again when it changes. Unset: no TLS"
    )
    tls_key_file: FilePath | None = Field(default=None, description="The certificate's private key in PEM")
    tls_client_ca_file: FilePath | None = Field(
        default=None, description="Authorities in PEM; one must have signed each client's certificate (mutual TLS)"
    )
    token_file: FilePath | None = Field(
        default=None,
        description="Bearer tokens and their limits in TOML; read again when it changes. Unset: anyone may call",
    )

    check_costs: bool = Field(
        default=True, description="Correct the cost table by what steps take; false: plans for a budget repeat"
    )
    measure_first: bool = Field(
        default=False,
        description="Measure before serving what was not measured yet; false: once it serves, while nobody calls",
    )
    native: Literal["auto", "build", "off"] = Field(
        default="auto",
        description="Native code: what the wheel brings, else compiled once and kept; always compiled; or none",
    )
    group_planner: bool = Field(
        default=True,
        description="Let rows of a batch agree on an action and share products if that is faster; off: a request's "
        "tokens never depend on its neighbours",
    )
    prompt_lookup: bool = Field(
        default=True, description="Run what followed the last tokens earlier in the text too: right guesses save passes"
    )
    workers: Workers = Field(
        default=WorkerRange(1, 1),
        description="Worker processes, one for each device; a range such as `2-8` follows the load",
    )
    slots: int = Field(default=16, ge=1, le=1024, description="Sequences that a worker decodes together")
    cache_tokens: int = Field(default=8192, ge=2, description="Tokens in a worker's KV cache, over all sequences")
    prefix_cache_tokens: int = Field(
        default=4096,
        ge=0,
        description="Prompt tokens that a worker keeps for later prompts with the same beginning; 0: none",
    )
    ray_address: RayAddress | None = Field(
        default=None,
        description="Run the workers on this Ray cluster: `auto`, `host:port` or `ray://host:port`; needs the extra "
        "`ray` and `DASH_NUM_THREADS`. Unset: on this machine",
    )
    worker_host: str | None = Field(
        default=None,
        min_length=1,
        description="This machine's address for workers on Ray, which connect to it; unset: the one in the cluster",
    )
    worker_port: int = Field(
        default=0, ge=0, le=65535, description="Port that workers on Ray connect to; 0 is any free port"
    )
    flush_milliseconds: float = Field(
        default=25, ge=0, le=25, description="Milliseconds a token may wait to share a message, 10 if alone; 0: none"
    )
    context_length: int | None = Field(
        default=None, ge=2, description="Tokens of one prompt and output; unset: the model's"
    )
    prefill_chunk_tokens: int = Field(default=512, ge=1, description="Prompt tokens between two decode steps, at most")
    prefill: Literal["auto", "full"] = Field(
        default="auto",
        description="Precision of prompts: `full`, or `auto`: INT8 in modes ADAPTIVE and FIXED if that is faster here",
    )
    max_queue: int = Field(default=256, ge=0, description="Requests that may wait for a slot")
    max_queue_tokens: int = Field(
        default=262_144, ge=1, description="Prompt and output tokens of all requests that wait or run"
    )
    max_requests_per_caller: int | None = Field(
        default=None, ge=1, description="Requests of one caller, waiting or running; unset: no limit but the fair queue"
    )

    highest_priority: Literal["low", "normal", "high"] = Field(
        default="normal", description="Highest class that callers may ask for who have no entry in a token file"
    )

    default_mode: Literal["full_depth", "adaptive", "exact"] = Field(
        default="adaptive", description="Mode of requests that set none"
    )
    default_compute_budget: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Compute budget of requests that set none, a share of full depth's cost; unset: the policy's own",
    )
    default_max_new_tokens: int = Field(default=256, ge=1, description="max_new_tokens of requests that set none")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Longest prompt that is accepted; unset: the context's length"
    )
    max_new_tokens: int = Field(default=4096, ge=1, description="Largest max_new_tokens that is accepted")
    max_answers: int = Field(default=16, ge=1, description="Largest n that is accepted: answers to one prompt")
    max_stop_strings: int = Field(default=16, ge=0, description="Stop strings in one request")
    max_stop_string_bytes: int = Field(default=256, ge=1, le=4096, description="Bytes of one stop string in UTF-8")
    max_constraint_bytes: int = Field(
        default=64 * 1024, ge=1, description="Bytes of a request's JSON schema, pattern, grammar or choices"
    )
    max_message_bytes: int = Field(default=_MEBIBYTE, ge=1024, le=32 * _MEBIBYTE, description="Largest request message")
    max_unfinished_bytes: int = Field(
        default=64 * _MEBIBYTE,
        ge=1024,
        description="Memory for the messages of calls on their way, counted as if each was as large as may be; further "
        "ones wait. A session has a message's memory of its own",
    )
    message_timeout_seconds: float = Field(default=10, gt=0, description="Time in which a call's message must arrive")
    max_sessions: int = Field(default=128, ge=1, description="Sessions at once")
    max_sessions_per_caller: int = Field(default=32, ge=1, description="Sessions of one caller at once")

    max_tokenize_calls: int = Field(default=64, ge=1, description="Tokenize calls at once")
    max_metadata_bytes: int = Field(
        default=8192, ge=1024, le=_MEBIBYTE, description="Largest metadata of one call, a token included"
    )
    max_connections: int = Field(
        default=2048,
        ge=1,
        description="Connections at once, as far as the process may have files open; further ones are closed",
    )
    max_calls_per_connection: int = Field(default=256, ge=1, description="Calls at once over one connection")
    max_connection_idle_seconds: float = Field(
        default=900, ge=0.1, description="Connections without a call for so long are told to go away"
    )
    max_connection_age_seconds: float | None = Field(
        default=None,
        ge=0.1,
        description="Connections older than this, by up to a tenth, take no new calls and end with their last one, so "
        "that clients of a DNS name find new servers; unset: never",
    )
    channelz: bool = Field(default=False, description="Serve channelz, gRPC's own view of connections and calls")
    vllm_engine: bool = Field(
        default=False, description="Serve `vllm.grpc.engine.VllmEngine` too, for the SMG gateway; needs the extra `smg`"
    )

    trace_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of requests traced if the caller does not decide; unset: by OTEL_TRACES_SAMPLER, else 0",
    )
    trace_slow_seconds: float | None = Field(
        default=None, gt=0, description="Requests that take longer are always traced; unset: none are"
    )
    trace_steps: int = Field(
        default=32, ge=0, le=4096, description="Steps of each request whose decisions are recorded and traced"
    )
    trace_layers: bool = Field(default=False, description="Trace each layer beside its decision")
    trace_content: bool = Field(
        default=False, description="Put prompts, outputs, token ids and stop strings into traces"
    )
    audit_rate: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of ADAPTIVE answers that are compared with full depth, when nothing else is to do",
    )
    audit_warning_factor: float = Field(
        default=3.0,
        gt=1,
        description="Warn if audited answers diverge so many times as much as their policy did when it was calibrated",
    )
    recent_requests: int = Field(
        default=64, ge=0, description="Latest requests kept for `GetDecisions` and `GetAudit`; 0: none"
    )

    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="Port of the Prometheus endpoint; 0 is any free port. Unset: none"
    )
    metrics_host: str = Field(
        default="127.0.0.1", min_length=1, description="Address of the Prometheus endpoint, which has no TLS"
    )

    start_timeout_seconds: float = Field(default=600, gt=0, description="Time for the worker to load")
    worker_timeout_seconds: float = Field(default=8, gt=0, description="Silence of a worker after which it is replaced")
    shutdown_grace_seconds: float = Field(default=30, ge=0, description="Time for requests to finish after SIGTERM")
    log_level: LogLevel = Field(default="INFO", description="Least severe log level")
    log_format: LogFormat = Field(default="console", description="Log lines for people, or one JSON object a line")

    @property
    def max_unfinished_messages(self) -> int:
        """The messages of calls that may be on their way at once."""
        return max(1, self.max_unfinished_bytes // self.max_message_bytes)

    @model_validator(mode="after")
    def _tls_files_go_together(self) -> "Settings":
        for name, needed in (
            ("tls_certificate_file", "tls_key_file"),
            ("tls_key_file", "tls_certificate_file"),
            ("tls_client_ca_file", "tls_certificate_file"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"{variable_of(needed)}: is required with {variable_of(name)}")
        return self

    @model_validator(mode="after")
    def _devices_are_said_once(self) -> "Settings":
        if self.devices is not None and self.device != "auto":
            raise ValueError(f"{variable_of('devices')}: cannot be set with {variable_of('device')}; set one of them")
        if len(self.device_names) > 1 and self.workers.most > 1 and self.ray_address is None:
            raise ValueError(f"{variable_of('workers')}: must be 1 with several {variable_of('devices')}")
        return self

    @property
    def device_names(self) -> tuple[str, ...]:
        """A worker's devices."""
        return self.devices or (self.device,)

    @model_validator(mode="after")
    def _extras_can_be_used(self) -> "Settings":
        if self.vllm_engine and find_spec("smg_grpc_proto") is None:
            raise ValueError(f"{variable_of('vllm_engine')}: needs `pip install 'dash-llm[smg]'`")
        if self.ray_address is None:
            return self
        name = variable_of("ray_address")
        if find_spec("ray") is None:
            raise ValueError(f"{name}: needs `pip install 'dash-llm[ray]'`")
        if self.num_threads is None:
            raise ValueError(
                f"{variable_of('num_threads')}: is required with {name}: the CPUs that each worker reserves"
            )
        return self

    def worker_config(self, worker_number: int = 0) -> WorkerConfig:
        """Returns the configuration that is sent to worker `worker_number`, from 0.

        Workers on Ray share neither threads nor devices: Ray gives each its own.
        """
        is_alone = self.ray_address is not None
        return WorkerConfig(
            model=self.model,
            revision=self.model_revision,
            devices=self.device_names,
            precision=self.precision,
            num_threads=self.num_threads,
            native_code=self.native,
            actions=self.actions,
            weights=self.weights,
            checks_costs=self.check_costs,
            policy_file=str(self.policy_file) if self.policy_file else None,
            cache_folder=str(self.cache_folder),
            engine=EngineConfig(
                num_slots=self.slots,
                cache_tokens=self.cache_tokens,
                context_length=self.context_length,
                prefill_chunk_tokens=self.prefill_chunk_tokens,
                rounds_prompts=self.prefill == "auto",
                default_compute_budget=self.default_compute_budget,
                lane=self.lane,
                group_planner=self.group_planner,
                prompt_lookup=self.prompt_lookup,
                prefix_cache_tokens=self.prefix_cache_tokens,
                record_steps=self.trace_steps,
                burst_milliseconds=min(MOST_BURST_MILLISECONDS, self.flush_milliseconds),
            ),
            serves_first=not self.measure_first,
            worker_number=0 if is_alone else worker_number,
            num_workers=1 if is_alone else self.workers.most,
        )

    def loggable(self) -> str:
        """Returns all settings in one line; pydantic masks those that are SecretStr."""
        return " ".join(f"{name}={value}" for name, value in self.model_dump(mode="json").items())


def variable_of(name: str) -> str:
    """Returns the environment variable of a setting."""
    return ENV_PREFIX + name.upper()
