"""Prints the table of docs/settings.md: `python -m dash_server.settings_table`. Knows settings; reads none."""

from dash_server.settings import Settings, variable_of


def settings_table() -> str:
    """Returns the table."""
    rows = ["| variable | default | what it is |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=False)
        shown = "" if default is None or field.default_factory is not None else f"`{default}`"
        rows.append(f"| `{variable_of(name)}` | {shown} | {field.description} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(settings_table(), end="")
