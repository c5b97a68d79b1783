"""The error for a package that a command needs and the base install lacks."""

from dash_client.errors import InvalidArgumentError, invalid_argument


def missing_extra(what: str, package: str) -> InvalidArgumentError:
    """Returns the error for a failed import of `package`; `what` is the option or command that needs it."""
    return invalid_argument(what, f"needs {package}, which is not installed: pip install 'dash-llm[cli]'")
