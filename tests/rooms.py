"""The rooms of each package, from the top of the house to the bottom: what a file may import lies in its own room or
further down. A name with a slash is a folder with all below it that is not listed on its own; names on one line share
a room. `docs/architecture.md` says what each room is for."""

ROOMS = {
    "dash_client": """
    """,
    "dash_server": """
    """,
    "dash_runtime": """
        commands/
        evaluation/
        training/
        startup/
        engine/
        policy/
        decoder/loading decoder/full_path
        decoder/decoder
        decoder/backends/
        decoder/
        programs/
        linears/
        checkpoints/
        decision_trace
        devices/
        config
        model_config actions child_process
        files/
        errors
    """,
}
