"""What is kept for later starts: trials, read again unless they are damaged or wrong, and files that are whole."""

from functools import partial
from pathlib import Path

import pytest
import torch

from dash_runtime.files.atomic_file import replacing
from dash_runtime.linears import dense_linear
from dash_runtime.linears.dense_linear import BatchInvariantLinear, FullLinear
from dash_runtime.linears.kept_trials import KeptTrials

KEY = ("packed", (64, 32), False, 2)


def test_numbers_are_read_by_their_key_only(tmp_path: Path) -> None:
    KeptTrials().keep(KEY, [2, 64])
    assert KeptTrials().read(KEY) is None
    trials = KeptTrials(tmp_path / "new")
    trials.keep(KEY, [2, 64])
    assert trials.read(KEY) == [2, 64]
    assert trials.read((*KEY[:3], 1)) is None


@pytest.mark.parametrize("content", ["", "[2, 64", '{"2": 64}', '[2, "64"]', "[true]", "2"])
def test_a_damaged_file_is_as_none(content: str, tmp_path: Path) -> None:
    trials = KeptTrials(tmp_path)
    trials.keep(KEY, [2, 64])
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert trials.read(KEY) is None


class Counting:
    """A product that counts its calls, and whose rows depend on their number unless that is in `agreeing`."""

    def __init__(self, agreeing: set[int]) -> None:
        self.agreeing = agreeing
        self.num_calls = 0

    def __call__(self, full: FullLinear) -> "dense_linear.Linear":
        def product(inputs: torch.Tensor) -> torch.Tensor:
            self.num_calls += 1
            return (inputs[:, None] * full.weight).sum(-1) + (0 if len(inputs) in self.agreeing else len(inputs))

        return product


def test_a_kept_trial_is_not_made_again_and_a_wrong_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = partial(dense_linear._tried_first_parts.__wrapped__, KeptTrials(tmp_path))
    first, second = Counting({2, 16, 64}), Counting({4, 16, 64})
    monkeypatch.setattr(dense_linear, "_NAMES", dict.fromkeys((first, second), "counting"))
    parts = tried(first, (64, 32), False, 1)
    assert first.num_calls > 40
    first.num_calls = 0
    assert tried(first, (64, 32), False, 1) == parts
    assert first.num_calls < 5
    others = tried(second, (64, 32), False, 1)
    assert (others[2], others[4]) == (4, 4)
    assert tried(second, (64, 32), False, 1) == others


def test_writers_with_the_same_process_id_do_not_write_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with replacing(path) as first:
        first.write_text("fir")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "fir"
        first.write_text("first")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_each_decoder_keeps_its_trials_in_its_own_folder(tmp_path: Path) -> None:
    weight = torch.zeros(64, 32, dtype=torch.bfloat16)
    for folder in (tmp_path / "one", tmp_path / "other"):
        if not isinstance(dense_linear.make_full_linear(FullLinear(weight), KeptTrials(folder)), BatchInvariantLinear):
            pytest.skip("this processor tries nothing")
        assert list(folder.iterdir())
