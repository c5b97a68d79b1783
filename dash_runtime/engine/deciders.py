"""Says who decides for which rows of a batch. Knows sequences and their policies; runs nothing."""

from dash_runtime.engine.fused_decider import FusedDecider
from dash_runtime.engine.sequence import Sequence
from dash_runtime.engine.step import Decider
from dash_runtime.policy.catalog import Assignment
from dash_runtime.policy.learned import LearnedPolicy


def deciders_of(
    sequences: list[Sequence], assignments: list[Assignment], decides_alone: bool, num_rows: int
) -> list[Decider]:
    """Returns one decider per policy in the batch. A single row's pass evaluates it if both can.

    There is a row for each sequence, or `num_rows` of a single one.
    """
    if num_rows > len(sequences):
        (sequence,), (assignment,) = sequences, assignments
        tokens = [sequence.next_token()] * num_rows
        return [Decider(assignment.policy, range(num_rows), tokens, assignment.state_costs, num_rows)]
    rows_by_policy: dict[int, list[int]] = {}
    for row, assignment in enumerate(assignments):
        rows_by_policy.setdefault(id(assignment.policy), []).append(row)
    deciders: list[Decider] = []
    for rows in rows_by_policy.values():
        assignment = assignments[rows[0]]
        tokens = [sequences[row].next_token() for row in rows]
        policy, arguments = assignment.policy, (rows, tokens, assignment.state_costs, len(sequences))
        if decides_alone and isinstance(policy, LearnedPolicy) and policy.decides_alone:
            deciders.append(FusedDecider(policy, *arguments))
        else:
            deciders.append(Decider(policy, *arguments))
    return deciders
