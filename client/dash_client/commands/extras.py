"""What to say where a command needs a package that the base install does not bring."""

from dash_client.errors import InvalidArgumentError, invalid_argument


def missing_extra(what: str, package: str) -> InvalidArgumentError:
    """For an import that failed; `what` was asked for."""
    return invalid_argument(what, f"needs {package}, which is not installed: pip install 'dash-llm[cli]'")
