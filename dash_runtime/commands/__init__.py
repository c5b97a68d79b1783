"""The `dash-policy` command: what a person types."""
