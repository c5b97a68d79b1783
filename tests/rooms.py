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
        decoder/
        decoder/backends/
        decoder/batch
        decoder/pending_kv decoder/kv_cache decoder/attention decoder/compensation decoder/layer decoder/rotary
        decoder/weight_loader decoder/norm
        programs/
        linears/
        checkpoints/
        families/
        decision_trace config
        model_config actions child_process progress
        files/
        errors
    """,
}
