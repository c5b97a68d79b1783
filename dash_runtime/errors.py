"""The exceptions of the runtime. Each message is one sentence that a user can act on.

DashRuntimeError
├── InvalidRequest        a field of a request is wrong; carries the field's name
├── ConfigError           a setting is wrong; carries the setting's name
├── NotEnoughMemory       the model does not fit on its devices
├── CheckpointError       a model cannot be loaded
│   ├── CheckpointNotFound
│   ├── CorruptCheckpoint
│   └── UnsupportedArchitecture
└── PolicyFileError       a policy file cannot be used with this model
"""


class DashRuntimeError(Exception):
    """The base of everything that the runtime refuses."""


class InvalidRequest(DashRuntimeError, ValueError):
    """A request that cannot be served.

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


class NotEnoughMemory(DashRuntimeError):
    """A model that needs more memory than its devices have."""


class CheckpointError(DashRuntimeError):
    """A model that cannot be loaded."""


class CheckpointNotFound(CheckpointError):
    """A model or file that is not there."""


class CorruptCheckpoint(CheckpointError):
    """A file of the model that is truncated, inconsistent or of another kind than its name says."""


class UnsupportedArchitecture(CheckpointError):
    """An architecture, or a feature of one, that has no decoder here."""


class PolicyFileError(DashRuntimeError):
    """A policy file that is damaged or belongs to another model."""
