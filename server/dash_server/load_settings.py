"""Reads the settings from the environment, and says by name what is wrong there. Knows no gRPC and starts nothing."""

import difflib
from collections.abc import Mapping

from pydantic import ValidationError

from dash_server.settings import ENV_PREFIX, Settings, variable_of

_VARIABLES_OF_THE_CLIENT = ("DASH_TARGET", "DASH_TOKEN")


class SettingsError(ValueError):
    """One or more settings are wrong. `lines` has a sentence for each that names the variable."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def load_settings(cls: type[Settings] = Settings) -> Settings:
    """Reads the settings from the environment.

    Raises:
        SettingsError: a variable is wrong; has a line for each.
    """
    try:
        return cls()
    except ValidationError as error:
        raise SettingsError([_line(cls, details) for details in error.errors(include_url=False)]) from None


def _line(cls: type[Settings], details: Mapping) -> str:
    sentence = str(details["msg"]).replace("Input should be", "must be").replace("Value error, ", "")
    if not details["loc"]:  # several settings contradict each other; the sentence names them
        return sentence
    name = str(details["loc"][0])
    if not sentence.startswith("must"):
        sentence = f"cannot be used: {sentence}"
    is_secret = "Secret" in str(cls.model_fields[name].annotation)
    got = "" if is_secret else f", got {str(details['input'])[:100]!r}"
    return f"{variable_of(name)}: {sentence}{got}"


def unknown_variables(environment: Mapping[str, str], cls: type[Settings] = Settings) -> list[str]:
    """Returns a warning for each DASH_ variable that no setting reads; it suggests the closest name."""
    known = [variable_of(name) for name in cls.model_fields]
    warnings = []
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and name not in (*known, *_VARIABLES_OF_THE_CLIENT):
            closest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {closest[0]}?" if closest else ""
            warnings.append(f"{name} is set, but there is no such setting{hint}")
    return warnings
