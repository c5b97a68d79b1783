"""Tests the figure of docs/policies.md, as far as it can be drawn without a server's answer."""

from pathlib import Path

import pytest

from benchmarks.policy_figure import Column, draw, shipped_policy

ROOT = Path(__file__).parents[2]


@pytest.mark.embedded
def test_a_plan_for_each_token_becomes_a_picture(embedded_folder: Path, tmp_path: Path) -> None:
    policy = shipped_policy(embedded_folder)
    plan = tuple(policy.spec.actions[layer % 4] for layer in range(policy.costs.num_layers))
    columns = [Column(text, plan) for text in (" sky", "\n", "$x_$", "é", "_")]
    draw(columns, policy, "Why $x_$?", 0.5, tmp_path / "policy.png")
    assert (tmp_path / "policy.png").stat().st_size > 10_000


def test_pictures_are_small_enough_for_a_repository() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs").glob("*.png")}
    assert {name: size for name, size in sizes.items() if size > 150_000} == {}
