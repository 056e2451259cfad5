"""What the tests of parallel runs share."""

import dataclasses

import pytest
from runs import changed


@pytest.fixture
def small(tiny_config, tmp_path):
    """Four steps in float64, in two micro-batches a rank at most."""
    config = changed(
        tiny_config,
        train={"precision": "fp64", "steps": 4, "micro_batch_size": 2, "global_batch_size": 4},
        checkpoint={"interval": 2},
        metrics={"report": False},
    )
    return dataclasses.replace(config, folder=str(tmp_path / "one"))
