"""A plan that runs in seconds, and cases with functions that are planted."""

import dataclasses

from benchmarks import ops, suite
from benchmarks.points import validate

PLAN = suite.Plan(
    ops=("layer_norm",), model="tiny", small=True, dtype="float32", peers="eager", repeats=3
)


def plant(monkeypatch, **changes) -> None:
    """Every case of every op gets other functions: change(the case) makes each."""
    real = ops.cases

    def planted(op, shape, device):
        return [
            dataclasses.replace(case, **{name: make(case) for name, make in changes.items()})
            for case in real(op, shape, device)
        ]

    monkeypatch.setattr(ops, "cases", planted)


def run(plan: suite.Plan) -> tuple[list[dict], suite.Outcome]:
    """The points of a plan, each valid."""
    points = []
    outcome = suite.run([plan], points.append, lambda done, text: None)
    for point in points:
        validate(point)
    return points, outcome
