"""The rooms of each package, from the top of the house to the bottom. A file may import from its own room and below.

A name with a slash is a folder with everything in it that is not listed by itself. Names on one line share a room.
`docs/architecture.md` says what each room is for.
"""

ROOMS = {
    "dash_client": """
        cli
        commands/
        commands/arguments commands/answer_printer commands/bench_figures commands/client_arguments
        commands/conversation commands/heatmap_file commands/heatmap_picture commands/interrupts
        commands/depth_painter commands/heatmap_rows commands/output commands/prompts
        commands/exit_codes commands/extras
        adapters/
        adapters/answer_facts adapters/langchain_messages adapters/option_fields adapters/shared_clients
        aio client
        aio_session session
        prompt_map readiness session_stream streams
        stream_state
        calls
        requests responses rpc_errors connection
        constraint_messages tool_messages
        channel checks
        trace/
        trace/decision_trace_messages trace/trace_summary
        decision_trace score server_facts terminal
        options
        types
        constraint errors json_schema tools
    """,
    "dash_server": """
        main
        running
        server
        telemetry/tracing telemetry/metric_export telemetry/pending_traces
        telemetry/call_spans telemetry/metrics
        telemetry/token_spans telemetry/trace_sampling telemetry/span_export
        telemetry/
        vllm_engine
        service health auth_interceptor
        session
        service_state
        generation reading
        to_pb
        vllm_requests audit
        recent_decisions
        request_record
        worker_pool
        dispatcher
        admission from_pb listening
        settings_table load_settings
        settings setting_types auth served_model fair_queue pace scaling receiving
        worker/__main__
        worker/engine_loop
        worker/link
        worker/ray_start worker/ray_launcher
        worker/remote_worker worker/ray_actor worker/listener
        worker/process worker/flush worker/outbox worker/ray_messages
        worker/connection worker/server_socket
        worker/
        readers
        tools turns grammar_check
        text wire statuses watched_files logs handlers loop_watch stop_signals exits
    """,
    "dash_runtime": """
        commands/
        evaluation/
        training/
        startup/
        engine/engine
        engine/bursts engine/draft_rounds engine/made_tokens engine/prompt_passes
        engine/decoding_rows engine/graph_work
        engine/sequence
        engine/guesses engine/speculative engine/text_drafts
        engine/decision_log engine/device_times engine/trace_recorder
        engine/decider engine/planner
        engine/lanes engine/policy_graphs
        engine/waiting_line engine/prefix_cache engine/prompt_pace
        engine/constraints engine/logits_processors engine/sampling engine/scores
        engine/cost_fit engine/step_times
        engine/
        rollout/
        policy/
        decoder/
        decoder/backends/cuda decoder/backends/native decoder/backends/split
        decoder/backends/native_heads decoder/backends/native_plans decoder/backends/eager
        decoder/backends/
        layers/
        native/
        linears/
        checkpoints/
        families/
        passes
        events
        decision_trace
        devices/
        config
        model_config actions grammar child_process progress
        constraint
        files/
        errors
    """,
}
