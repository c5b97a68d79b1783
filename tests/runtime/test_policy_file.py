"""A learned policy is saved, loaded, refused for another model, and run."""

import json
from collections.abc import Mapping
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config
from dash_runtime.errors import PolicyFileError
from dash_runtime.policy.compensation_file import save_compensation
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import State, Token
from dash_runtime.policy.policy_file import find_policies, load_compensation_of, load_policy, save_policy
from tests.runtime.support import CPU, load_decoder, some_affine, some_calibration, some_costs, some_network, some_plans
from tests.tiny_models import HIDDEN_SIZE, NUM_LAYERS

FINGERPRINT = "a model"


@pytest.fixture(scope="module")
def policy(tiny_folder: Path) -> LearnedPolicy:
    spec = PlanSpec(
        actions=(Action.SKIP, Action.INT4, Action.FULL),
        pinned={0: Action.FULL, 5: Action.FULL},
        lookahead=1,
        block_size=3,
        head=Action.INT8,
        costs=some_costs(),
    )
    return LearnedPolicy(
        name="tiny",
        network=some_network(spec, HIDDEN_SIZE, seed=5).rounded(),
        spec=spec,
        compensation=some_affine(load_decoder(tiny_folder)),
        calibration=some_calibration(spec, (0.5, 1.0, 0.4), (0.8, 0.0, 0.1), (0.85, -1.0, 0.02)),
        plans=some_plans(),
    )


@pytest.fixture
def file(policy: LearnedPolicy, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_policy(path, policy, FINGERPRINT)
    return path


def load(
    path: Path, tiny_folder: Path, fingerprint: str = FINGERPRINT, known: Mapping[str, Action] = Action.__members__
) -> LearnedPolicy:
    return load_policy(path, load_model_config(tiny_folder), fingerprint, dtype=torch.float32, device=CPU, known=known)


def rewrite(path: Path, facts: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> None:
    """Writes the file again with some metadata or tensors changed; a fact that is None goes."""
    with safe_open(path, framework="pt") as opened:
        old_facts = json.loads(opened.metadata()["dash_policy"])
        old_tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    new_facts = {name: own for name, own in (old_facts | (facts or {})).items() if own is not None}
    save_file(old_tensors | (tensors or {}), path, metadata={"dash_policy": json.dumps(new_facts)})


POINT = {"log_price": 0.0, "counts": {"FULL": 6.0}, "divergence": 0.1, "agreement": 0.9}
PLAN = {"name": "p", "actions": ["FULL"] * 6, "head": "FULL", "divergence": 0.1}


def some_state(rows: int = 3) -> State:
    hidden = torch.randn(rows, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2))
    return State(
        [Token(0, 0, 1.5)] * rows, hidden, 0, (Action.SKIP, Action.FULL, Action.INT4)[:rows], [0.1, 0.2, 0.3][:rows]
    )


def test_a_saved_policy_decides_as_it_did_before(policy: LearnedPolicy, file: Path, tiny_folder: Path) -> None:
    loaded = load(file, tiny_folder)
    expected, decision = (own.start(1, some_state())() for own in (policy, loaded))
    assert decision.plan == expected.plan
    assert decision.scores is not None
    assert expected.scores is not None
    assert torch.equal(decision.scores, expected.scores)
    assert torch.equal(
        loaded.compensation(3, torch.ones(1, HIDDEN_SIZE)), policy.compensation(3, torch.ones(1, HIDDEN_SIZE))
    )
    plain = ("name", "spec", "calibration")
    assert [getattr(loaded, name) for name in plain] == [getattr(policy, name) for name in plain]


def test_each_row_is_decided_from_its_own_state(policy: LearnedPolicy) -> None:
    state = some_state()
    together = policy.start(1, state)().plan
    assert len(together) == 3
    for row in range(3):
        alone = State(
            state.tokens[:1],
            state.hidden[row : row + 1],
            0,
            state.actions[row : row + 1],
            state.cost_spent[row : row + 1],
        )
        assert policy.start(1, alone)().plan == tuple(actions[row : row + 1] for actions in together)


def test_a_policy_of_another_model_is_refused(file: Path, tiny_folder: Path) -> None:
    with pytest.raises(PolicyFileError, match=r"tiny\.safetensors.*another model"):
        load(file, tiny_folder, "another model's fingerprint")


def test_a_missing_file_and_a_folder_are_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(PolicyFileError, match=path.name):
            load(path, tiny_folder)


@pytest.mark.parametrize(
    "facts",
    [
        {"format": "dash-policy-99"},
        {"features": "something else"},
        {"actions": ["SKIP", "FULL"]},
        {"actions": ["SKIP", "INT2", "FULL"]},
        {"actions": 7},
        {"pinned": [0, 5]},
        {"pinned": {"0": "FULL"}},
        {"pinned": {"5": "FULL"}},
        {"pinned": {"0": "FULL", "5": "FULL", "99": "FULL"}},
        {"pinned": {"x": "FULL", "0": "FULL", "5": "FULL"}},
        {"lookahead": 2},
        {"lookahead": 0},
        {"block_size": 0},
        {"block_size": 2},
        {"compensation": "magic"},
        {"compensation": "dense"},
        {"costs": {"num_layers": 6, "layer": {"FULL": 1}, "head": {"FULL": 1}, "fixed": 0}},
        {"calibration": []},
        {"calibration": [[0.9, 1.0], [0.5, 0.0]]},
        {"calibration": [POINT | {"log_price": 1}, POINT]},
        {"calibration": [POINT | {"log_price": 1e3}]},
        {"calibration": [POINT | {"counts": {"FULL": 5}}]},
        {"calibration": [POINT | {"counts": {"FULL": 7, "SKIP": -1}}]},
        {"calibration": [POINT | {"counts": {"INT8": 6}}]},
        {"calibration": [POINT | {"divergence": float("nan")}]},
        {"calibration": [POINT | {"agreement": 2}]},
        {"calibration": [POINT | {"surprise": 2}]},
        {"plans": 7},
        {"plans": [{}]},
        {"plans": [PLAN | {"actions": ["FULL"]}]},
        {"plans": [PLAN | {"actions": ["INT2"] * 6}]},
        {"plans": [PLAN | {"divergence": -1}]},
        {"plans": [PLAN | {"name": ""}]},
        {"head": "INT4"},
    ],
)
def test_damaged_metadata_is_refused_by_name(facts: dict[str, Any], file: Path, tiny_folder: Path) -> None:
    rewrite(file, facts)
    with pytest.raises(PolicyFileError, match=r"tiny\.safetensors"):
        load(file, tiny_folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"network.hidden_weight": torch.zeros(16, 7)},
        {"network.hidden_bias": torch.full((2, 16), float("nan"))},
        {"network.output_weight": torch.zeros(2, 3, 3, 8, dtype=torch.bfloat16)},
        {"network.inner_weight": torch.zeros(4)},
        {"compensation.factors": torch.zeros(NUM_LAYERS, 3)},
        {"compensation.surprise": torch.zeros(NUM_LAYERS, HIDDEN_SIZE)},
    ],
)
def test_tampered_tensors_are_refused_by_name(tensors: dict[str, Any], file: Path, tiny_folder: Path) -> None:
    rewrite(file, tensors=tensors)
    with pytest.raises(PolicyFileError, match=r"tiny\.safetensors"):
        load(file, tiny_folder)


def test_a_failed_save_leaves_the_old_file_and_no_other(policy: LearnedPolicy, file: Path) -> None:
    before = file.read_bytes()
    broken = replace(policy, name=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        save_policy(file, broken, FINGERPRINT)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_budgets_price_lies_between_those_of_the_calibrated_budgets_around_it(policy: LearnedPolicy) -> None:
    budgets = policy.budgets(policy.costs)
    assert (budgets.lowest, budgets.highest) == pytest.approx((0.5, 0.85))
    assert budgets.price(0.8) == pytest.approx(1.0)
    assert budgets.price(0.825) == pytest.approx(0.6065, abs=1e-3)
    assert budgets.price(0.5) == pytest.approx(2.718, abs=1e-3)
    assert budgets.price(1.0) == pytest.approx(0.368, abs=1e-3)
    assert budgets.divergence(0.65) == pytest.approx(0.25)


def test_an_action_without_a_kernel_here_is_never_chosen(policy: LearnedPolicy) -> None:
    fewer = policy.without({Action.INT4})
    assert fewer.spec.actions == (Action.SKIP, Action.FULL)
    kept, scores = fewer.start(1, some_state())().scores, policy.start(1, some_state())().scores
    assert kept is not None
    assert scores is not None
    torch.testing.assert_close(kept, scores[..., [0, 2]])


def test_policies_are_found_by_the_model_they_were_made_for(file: Path) -> None:
    assert find_policies(file.parent, FINGERPRINT) == [file]
    assert find_policies(file.parent, "another model's fingerprint") == []
    assert find_policies(file.parent / "nowhere", FINGERPRINT) == []


def test_a_drafter_keeps_what_its_pinned_layers_run(policy: LearnedPolicy, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "drafter.safetensors"
    drafter = replace(policy, spec=replace(policy.spec, pinned={0: Action.INT4, 5: Action.FULL}), is_drafter=True)
    save_policy(path, drafter, FINGERPRINT)
    loaded = load(path, tiny_folder)
    assert (loaded.pinned, loaded.is_drafter) == ({0: Action.INT4, 5: Action.FULL}, True)
    assert set(loaded.without({Action.INT4}).pinned.values()) == {Action.FULL}
    for refused in ("SKIP", "INT2"):
        rewrite(path, {"pinned": {"0": refused, "5": "FULL"}})
        with pytest.raises(PolicyFileError, match=str(path)):
            load(path, tiny_folder)


def test_a_file_names_int4_weights_of_its_own_and_says_nothing_of_the_usual_ones(
    policy: LearnedPolicy, file: Path, tiny_folder: Path
) -> None:
    with safe_open(file, framework="pt") as opened:
        assert "int4" not in json.loads(opened.metadata()["dash_policy"])  # older versions refuse what they do not know
    assert load(file, tiny_folder).rounding is None
    save_policy(file, replace(policy, rounding="0123456789abcdef"), FINGERPRINT)
    assert load(file, tiny_folder).rounding == "0123456789abcdef"
    rewrite(file, {"int4": 7})
    with pytest.raises(PolicyFileError, match="int4"):
        load(file, tiny_folder)


def test_a_file_of_the_format_before_is_refused_in_a_line_that_says_how_to_make_another(
    file: Path, tiny_folder: Path
) -> None:
    rewrite(file, {"format": "dash-policy-2"})
    with pytest.raises(PolicyFileError, match="dash-policy train") as refused:
        load(file, tiny_folder)
    assert "\n" not in str(refused.value)


def test_a_policy_keeps_its_fixed_plans(policy: LearnedPolicy, file: Path, tiny_folder: Path) -> None:
    assert load(file, tiny_folder).plans == policy.plans


def test_the_layers_of_an_action_without_a_kernel_count_as_the_next_dearer_ones(policy: LearnedPolicy) -> None:
    points = policy.without({Action.SKIP}).calibration.points
    assert all(Action.SKIP not in point.counts for point in points)
    assert [sum(point.counts.values()) for point in points] == pytest.approx([NUM_LAYERS] * 3)


SixActions = IntEnum("SixActions", [*Action.__members__, "INT2"])
SIX: dict[str, Any] = dict(SixActions.__members__)
"""The actions of a runtime with one more, by name."""


def test_a_runtime_with_one_more_action_runs_the_files_of_today(
    policy: LearnedPolicy, file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    newer = load(file, tiny_folder, known=SIX)
    assert newer.spec == policy.spec
    assert newer.network.num_known == 6
    assert not newer.network.fact_weight[:, SixActions.INT2 - 1].any()
    state = some_state()
    expected, decision = (own.start(1, state)() for own in (policy, newer))
    assert decision.plan == expected.plan
    torch.testing.assert_close(decision.scores, expected.scores)
    state.actions = (SIX["INT2"],) * 3  # has no row of its own
    assert newer.start(1, state)().scores is not None

    again = tmp_path / "newer.safetensors"
    save_policy(again, newer, FINGERPRINT, SIX)
    assert torch.equal(load(again, tiny_folder, known=SIX).network.fact_weight, newer.network.fact_weight)
    assert torch.equal(load(again, tiny_folder).network.fact_weight, policy.network.fact_weight)


def test_rows_are_read_by_name_and_need_no_name_in_the_first_order(
    policy: LearnedPolicy, file: Path, tiny_folder: Path
) -> None:
    rows = policy.network.fact_weight

    def in_order(names: list[str]) -> torch.Tensor:
        own = torch.stack([rows[:, Action[name] - 1] for name in names], dim=1)
        return torch.cat((own, rows[:, len(Action) :]), dim=1)

    names = ["FULL", "INT8", "SKIP", "INT4", "INT3"]
    rewrite(file, {"embedded_actions": names}, {"network.fact_weight": in_order(names)})
    assert torch.equal(load(file, tiny_folder).network.fact_weight, rows)
    rewrite(file, {"embedded_actions": None}, {"network.fact_weight": in_order(["SKIP", "INT4", "INT8", "FULL"])})
    read = load(file, tiny_folder).network.fact_weight
    assert not read[:, Action.INT3 - 1].any()
    others = torch.arange(rows.shape[1]) != Action.INT3 - 1
    assert torch.equal(read[:, others], rows[:, others])
    for damaged in ([], names[:3], [*names[:3], "FULL"], [*names, "INT2"], "SKIP", [1, 2, 3, 4]):
        rewrite(file, {"embedded_actions": damaged})
        with pytest.raises(PolicyFileError, match=r"tiny\.safetensors"):
            load(file, tiny_folder)


def test_compensation_is_read_from_a_policy_as_from_a_file_of_its_own(
    policy: LearnedPolicy, file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    own = tmp_path / "compensation.safetensors"
    save_compensation(own, policy.compensation, FINGERPRINT)
    config, expected = load_model_config(tiny_folder), policy.compensation.tensors()
    for path in (file, own):
        read = load_compensation_of(path, config, FINGERPRINT, dtype=torch.float32, device=CPU)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in read.tensors().items())
    (tmp_path / "broken").write_bytes(b"neither")
    with pytest.raises(PolicyFileError, match="broken cannot be read"):
        load_compensation_of(tmp_path / "broken", config, FINGERPRINT, dtype=torch.float32, device=CPU)
