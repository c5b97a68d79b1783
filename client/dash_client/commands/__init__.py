"""The commands of `dash-client`, one module each, with what they share. Users import nothing from here.

A command's module has `run(arguments)`, which prints and returns an exit code; it is imported when the command is run.
"""
