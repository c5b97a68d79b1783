"""The exceptions of the runtime. Each message is one sentence that a user can act on.

DashRuntimeError
├── InvalidRequest        a field of a request is wrong; carries the field's name
├── ConfigError           a setting is wrong; carries the setting's name
├── CheckpointError       a model cannot be loaded
│   ├── CheckpointNotFound
│   ├── CorruptCheckpoint
│   └── UnsupportedArchitecture
└── PolicyFileError       a policy file cannot be used with this model
"""


class DashRuntimeError(Exception):
    """Anything that the runtime refuses."""


class InvalidRequest(DashRuntimeError, ValueError):
    """A request that cannot be served as it stands.

    `field` is a dotted path below the request, such as `sampling.temperature`.
    """

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class ConfigError(DashRuntimeError, ValueError):
    """A configuration that cannot work. `field` is the name of the wrong value."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class CheckpointError(DashRuntimeError):
    """A model that cannot be loaded."""


class CheckpointNotFound(CheckpointError):
    """Nothing is at the place that was named."""


class CorruptCheckpoint(CheckpointError):
    """A file of the model is truncated, inconsistent or not what its name says."""


class UnsupportedArchitecture(CheckpointError):
    """The model's architecture, or a feature of it, has no decoder here."""


class PolicyFileError(DashRuntimeError):
    """A policy file that is damaged, or made for another model."""
