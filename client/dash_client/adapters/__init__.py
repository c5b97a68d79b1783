"""Dash where its users already are: a LangChain chat model and a plugin for the `llm` command.

Each module needs the extra of its name; importing this package needs none.
"""
