"""Outputs keep to their constraint, in every mode and however a draft ends, and a bad one is named and bounded."""

import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from llguidance import LLParserLimits

from dash_runtime.config import GenerationRequest, SamplingParameters, SkipOptions, StoppingParameters
from dash_runtime.constraint import Constraint, ConstraintKind
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.constraints import ConstraintCompiler, TextConstraint
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import InvalidRequest
from dash_runtime.events import EndReason, EngineEvent, RequestRefused, SequenceFinished
from tests.runtime.planned_engine import ACTIONS, EOS, MODES, make_engine
from tests.runtime.support import finished, load_decoder, run, tokens
from tests.tiny_models import VOCAB_SIZE

FULL, EXACT = MODES["full"], MODES["exact"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "likes": {"type": "array", "items": {"enum": ["sea", "sun"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
SCHEMA = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(PERSON))
DATE = Constraint(ConstraintKind.REGEX, r"[12][0-9]{3}-[01][0-9]-[0-3][0-9]")
CHOICES = Constraint(ConstraintKind.CHOICES, json.dumps(["yes", "yes, please", "no"]))
SUM = Constraint(ConstraintKind.LARK_GRAMMAR, 'start: NUMBER ("+" NUMBER){1,2}\nNUMBER: /[0-9]{1,3}/')


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder, torch.float32, ACTIONS)


def constrained_engine(decoder: Decoder, compiler: ConstraintCompiler | None) -> Engine:
    """Returns an engine that drafts whatever it gains."""
    return make_engine(decoder, frozenset({EOS}), least_gain=0.0, constraints=compiler)


Events = Mapping[str, list[EngineEvent]]
"""By request."""


def request(
    name: str,
    constraint: Constraint | None,
    skip: SkipOptions = FULL,
    max_new_tokens: int = 90,
    ignore_eos: bool = False,
    **sampling: float,
) -> GenerationRequest:
    return GenerationRequest(
        name,
        [1, 2, 3],
        StoppingParameters(max_new_tokens, ignore_eos=ignore_eos),
        sampling=SamplingParameters(**sampling),  # type: ignore[arg-type]
        skip=skip,
        constraint=constraint,
    )


def text(events: Events, name: str) -> str:
    return bytes(token_id for token_id in tokens(events[name]) if token_id < EOS).decode()


def keeps(output: str, constraint: Constraint) -> bool:
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            person = json.loads(output)
            return (
                list(person) == ["name", "age", "likes"]
                and re.fullmatch("[a-z]{1,4}", person["name"]) is not None
                and 0 <= person["age"] <= 99
                and 1 <= len(person["likes"]) <= 2
                and set(person["likes"]) <= {"sea", "sun"}
            )
        case ConstraintKind.REGEX:
            return re.fullmatch(constraint.text, output) is not None
        case ConstraintKind.CHOICES:
            return output in json.loads(constraint.text)
        case _:
            return re.fullmatch(r"\d{1,3}(\+\d{1,3}){1,2}", output) is not None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constraint", [SCHEMA, DATE, CHOICES, SUM], ids=lambda own: own.kind.value)
def test_every_kind_is_kept_in_every_mode_greedy_and_sampled_and_ends_by_itself(
    decoder: Decoder, compiler: ConstraintCompiler, constraint: Constraint, mode: str
) -> None:
    engine = constrained_engine(decoder, compiler)
    requests = [request("greedy", constraint, MODES[mode])]
    requests += [
        request(f"seed {seed}", constraint, MODES[mode], ignore_eos=seed == 1, temperature=2.0, seed=seed)
        for seed in range(4)
    ]
    events = run(engine, *requests)
    for own in requests:
        output = text(events, own.request_id)
        assert keeps(output, constraint), output
        assert finished(events[own.request_id]).reason is EndReason.END_OF_SEQUENCE


def test_exact_puts_out_what_full_depth_does_and_forced_text_is_drafted_free(
    decoder: Decoder, compiler: ConstraintCompiler
) -> None:
    engine = constrained_engine(decoder, compiler)
    events = run(engine, request("exact", SCHEMA, EXACT), request("full", SCHEMA, FULL))
    assert tokens(events["exact"]) == tokens(events["full"])
    drafts = finished(events["exact"]).speculation
    assert drafts is not None
    # `{"name": "`, `"age": ` and `"likes": [` leave nothing to choose between blanks.
    assert drafts.num_accepted_from_text >= len("name") + len("age") + len("likes")


def test_a_row_keeps_its_own_constraint_beside_others(decoder: Decoder, compiler: ConstraintCompiler) -> None:
    engine = constrained_engine(decoder, compiler)
    mixed = [request(f"{kind.kind.value} {mode}", kind, own) for kind in (SCHEMA, DATE) for mode, own in MODES.items()]
    together = run(engine, *mixed)
    for own in mixed:
        alone = run(constrained_engine(decoder, compiler), own)
        assert tokens(together[own.request_id]) == tokens(alone[own.request_id])


@pytest.mark.parametrize("mode", MODES)
def test_only_an_output_that_is_cut_off_is_incomplete_and_it_says_so(
    decoder: Decoder, compiler: ConstraintCompiler, mode: str
) -> None:
    whole = text(run(constrained_engine(decoder, compiler), request("r", SCHEMA, MODES[mode])), "r")
    events = run(constrained_engine(decoder, compiler), request("r", SCHEMA, MODES[mode], max_new_tokens=11))
    assert text(events, "r") == whole[:11]
    assert finished(events["r"]).reason is EndReason.LENGTH
    exactly = run(constrained_engine(decoder, compiler), request("r", SCHEMA, MODES[mode], max_new_tokens=len(whole)))
    assert finished(exactly["r"]).reason is EndReason.END_OF_SEQUENCE


def test_drafted_tokens_that_are_not_allowed_leave_no_trace(compiler: ConstraintCompiler) -> None:
    constraint = compiler.compile(DATE)
    for token_id in b"20x9":
        constraint.accept(token_id)
    constraint.rollback(b"x9")
    for count, token_id in enumerate(b"24-11-26", start=3):
        assert not constraint.is_complete_after(count - 1)
        constraint.accept(token_id)
    assert constraint.is_complete_after(10)
    constraint.accept(EOS)
    assert constraint.is_complete_after(10)
    assert not constraint.is_complete_after(11)
    constraint.rollback([*b"6", EOS])
    assert _allowed(constraint) == set(b"0123456789")


@pytest.mark.parametrize(
    ("constraint", "output"),
    [
        (SCHEMA, b'{"name": "ab", "age": 7, "likes": ["sea"]}'),
        (DATE, b"2024-11-26"),
        (CHOICES, b"yes, please"),
        (SUM, b"12+3+456"),
    ],
    ids=lambda own: own.kind.value if isinstance(own, Constraint) else "",
)
def test_each_token_is_allowed_by_itself_where_it_is_among_all(
    compiler: ConstraintCompiler, constraint: Constraint, output: bytes
) -> None:
    own = compiler.compile(constraint)
    own.accept(0)  # a draft's, which is not allowed
    assert not any(own.leaves_first(number) for number in range(VOCAB_SIZE))
    own.rollback([0])
    for token_id in output:
        allowed = _allowed(own)
        assert {number for number in range(VOCAB_SIZE) if own.leaves_first(number)} == allowed
        assert token_id in allowed
        own.accept(token_id)
    assert own.leaves_first(EOS)
    assert {number for number in range(VOCAB_SIZE) if own.leaves_first(number)} == _allowed(own)


def _allowed(constraint: TextConstraint) -> set[int]:
    logits = torch.zeros(VOCAB_SIZE)
    constraint.process(logits)
    return set(logits.isfinite().nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("kind", "content", "named"),
    [
        ("json_schema", "{", "constraint.json_schema: is not JSON"),
        ("json_schema", "[1]", "constraint.json_schema: must be a JSON object or boolean"),
        ("json_schema", '{"type": "strng"}', "constraint.json_schema: #: Invalid type: strng"),
        (
            "json_schema",
            '{"properties": {"a/b": {"items": {"anyOf": [{"type": "null"}, {"pattern": "(", "type": "string"}]}}}}',
            "constraint.json_schema: #/properties/a~1b/items/anyOf/1: ",
        ),
        ("json_schema", '{"$defs": {"x": {"uniqueItems": true}}, "$ref": "#/$defs/x"}', "#/$defs/x: Unimplemented"),
        ("json_schema", '{"a":' * 5000, "nested too deeply"),
        ("json_schema", "false", "constraint.json_schema: #: Unsatisfiable"),
        ("regex", "([", "constraint.regex: "),
        ("regex", r"\bword", "constraint.regex: "),
        ("regex", "", "constraint.regex: must not be empty"),
        ("lark_grammar", "start: missing", 'constraint.lark_grammar: at 1(8): unknown name: "missing"'),
        ("choices", "[]", "constraint.choices: must be strings that are not empty, one or more"),
        ("choices", '["a", ""]', "constraint.choices: must be strings that are not empty, one or more"),
    ],
)
def test_what_is_wrong_is_named_on_one_line_with_its_place_in_the_schema(
    decoder: Decoder, compiler: ConstraintCompiler, kind: str, content: str, named: str
) -> None:
    engine = constrained_engine(decoder, compiler)
    try:
        constraint = Constraint(ConstraintKind(kind), content)
    except InvalidRequest as error:
        told = str(error)
    else:
        (refused,) = run(engine, request("r", constraint))["r"]
        assert isinstance(refused, RequestRefused)
        told = f"{refused.field}: {refused.description}"
    assert named in told
    assert "\n" not in told
    assert not engine.has_work


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"enum": [f"word {number}" for number in range(20_000)]}),
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(6)]} for i in range(6)]}),
        json.dumps({"type": "array", "minItems": 10**6, "items": {"type": "string", "minLength": 10**6}}),
    ],
)
def test_a_schema_made_to_explode_costs_little_time(compiler: ConstraintCompiler, content: str) -> None:
    began = time.process_time()
    try:
        constraint = compiler.compile(Constraint(ConstraintKind.JSON_SCHEMA, content))
        constraint.process(torch.zeros(VOCAB_SIZE))
    except InvalidRequest:
        pass
    assert time.process_time() - began < 2.0


class SlowCompiler:
    """Compiles when it is told to, in a thread."""

    def __init__(self, compiler: ConstraintCompiler) -> None:
        self._compiler = compiler
        self._executor = ThreadPoolExecutor(1)
        self.may_go_on = threading.Event()
        self.compiled: list[str] = []

    def begin(self, constraint: Constraint) -> Future[TextConstraint]:
        return self._executor.submit(self._compile, constraint)

    def _compile(self, constraint: Constraint) -> TextConstraint:
        self.may_go_on.wait(10)
        self.compiled.append(constraint.kind.value)
        return self._compiler.compile(constraint)


def test_others_decode_while_a_constraint_is_compiled_and_a_cancelled_one_never_is(
    decoder: Decoder, compiler: ConstraintCompiler
) -> None:
    slow = SlowCompiler(compiler)
    engine = constrained_engine(decoder, slow)  # type: ignore[arg-type]
    for name, constraint in (("date", DATE), ("cancelled", SCHEMA), ("none", None)):
        engine.submit(request(name, constraint))
    events: dict[str, list[EngineEvent]] = defaultdict(list)
    while not any(isinstance(event, SequenceFinished) for event in events["none"]):
        for event in engine.step():
            events[event.request_id].append(event)
    assert set(events) == {"none"}
    engine.cancel("cancelled")
    slow.may_go_on.set()
    assert keeps(text(run(engine), "date"), DATE)
    assert slow.compiled == ["regex"]
    assert not engine.has_work


class Panic(BaseException):
    """A panic of a Rust library, which is no Exception."""


@pytest.mark.parametrize("method", ["compute_bitmask", "try_consume_tokens"])
def test_a_library_that_panics_ends_the_request_and_no_other(
    decoder: Decoder, compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def panics(*arguments: object) -> None:
        raise Panic

    class Broken:
        def __init__(self, matcher: object) -> None:
            self._matcher = matcher

        def __getattr__(self, name: str) -> object:
            return panics if name == method else getattr(self._matcher, name)

    class BreakingCompiler:
        def begin(self, constraint: Constraint) -> Future[TextConstraint]:
            compiling = compiler.begin(constraint)
            if constraint is not DATE:
                made = compiling.result()
                made._matcher = Broken(made._matcher)  # type: ignore[assignment]
            return compiling

    engine = constrained_engine(decoder, BreakingCompiler())  # type: ignore[arg-type]
    events = run(engine, request("bad", SCHEMA), request("good", DATE), request("none", None))
    assert isinstance(events["bad"][-1], RequestRefused)
    assert "the grammar library failed" in events["bad"][-1].description
    assert keeps(text(events, "good"), DATE)
    assert isinstance(events["none"][-1], SequenceFinished)
    assert not engine.has_work


@pytest.mark.parametrize("mode", MODES)
def test_a_constraint_that_grows_too_complex_ends_its_own_request_and_no_other(
    decoder: Decoder, byte_tokenizer_file: Path, mode: str
) -> None:
    compiler = ConstraintCompiler(byte_tokenizer_file, VOCAB_SIZE, {EOS}, LLParserLimits(max_lexer_states=40))
    engine = constrained_engine(decoder, compiler)
    explosive = Constraint(ConstraintKind.REGEX, "[ab]*(a[ab]{9}){5}")
    events = run(engine, request("bad", explosive, MODES[mode]), request("good", DATE, MODES[mode]))
    (refused,) = [event for event in events["bad"] if isinstance(event, RequestRefused)]
    assert (refused.request_id, refused.field) == ("bad", "constraint.regex")
    assert "tokens: " in refused.description
    assert keeps(text(events, "good"), DATE)
    assert not [event for event in events["bad"] if isinstance(event, SequenceFinished)]
    assert not engine.has_work
    assert engine.num_reserved_cache_tokens == 0


def test_an_engine_without_a_tokenizer_refuses_constraints(decoder: Decoder) -> None:
    with pytest.raises(InvalidRequest, match="constraint"):
        constrained_engine(decoder, None).submit(request("r", DATE))
