"""Tensor and sequence parallelism train the same model: gloo processes, float64, through the loop.

The reference is the run of one process: its losses, weights and moments, and the weights of step 0
to the bit. Not covered: NCCL; mixtures with pipelines and context parallelism (test_zero.py,
test_parity_matrix.py).
"""

import dataclasses

import pytest
import torch
from runs import assert_same_state, losses, stopping, torchrun

from stellarator import settings
from stellarator.config import ParallelConfig
from stellarator.model import build_model
from stellarator.parallel.mesh import Axis
from stellarator.parallel.shard import shards_of
from stellarator.parallel.tensor import TensorParallel
from stellarator.train.loop import Trainer


def test_four_ranks_follow_one_process(small, tmp_path):
    """Two replicas of two ranks that share tokens; others are in test_parity_matrix.py."""
    Trainer(small).run()
    layout = ParallelConfig(tp=2, sp=True)
    many = dataclasses.replace(small, parallel=layout, folder=str(tmp_path / "many"))
    done = torchrun(many, tmp_path, 4)
    assert done.returncode == 0, done.stderr[-6000:]
    expected, got = losses(small.folder), losses(many.folder)
    assert len(expected) == len(got) == 6  # 4 steps and 2 evaluations
    assert got == pytest.approx(expected, rel=1e-12, abs=0)
    assert_same_state(small.folder, many.folder, 4)


def test_a_checkpoint_goes_from_one_layout_to_another(small, tmp_path):
    """Two steps of one process, then two of four ranks; test_pipeline.py goes the other way."""
    Trainer(small).run()
    folder = str(tmp_path / "both")
    for layout, processes, steps in ((ParallelConfig(), 1, 2), (ParallelConfig(tp=4), 4, 4)):
        # The last step decides the learning rates, so the run is stopped, not shortened.
        config = dataclasses.replace(small, parallel=layout, folder=folder)
        done = torchrun(config, tmp_path, processes, (str(stopping(tmp_path, steps)),))
        assert done.returncode == 0, done.stderr[-6000:]
    assert losses(folder) == pytest.approx(losses(small.folder), rel=1e-12, abs=0)
    assert_same_state(small.folder, folder, 4)


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("model", [{}, {"num_kv_heads": 1}, {"tie_embeddings": False}], ids=str)
def test_first_weights_are_those_of_one_process(tp, model, tiny_config):
    """To the bit, without the whole model; what counts makes up each parameter once."""
    heads = {"num_heads": 12, "num_kv_heads": 6 if tp == 3 else 4, "width": 96, "ffn_width": 72}
    config = dataclasses.replace(tiny_config.model, **(heads | model))
    whole = dict(build_model(config, seed=5).named_parameters())
    counted = {name: torch.zeros_like(p) for name, p in whole.items()}
    for rank in range(tp):
        part = build_model(config, seed=5, tp=TensorParallel(Axis("tp", rank, tp)))
        shards = shards_of(part)
        for name, parameter in part.named_parameters():
            expected = torch.empty_like(parameter)
            assert torch.equal(parameter, shards[name].take_(expected, whole[name].detach())), name
            ones = torch.zeros_like(counted[name])
            counted[name] += shards[name].counted_into_(ones, torch.ones_like(parameter.detach()))
    for name, times in counted.items():
        assert (times == 1).all(), name


def test_layouts_that_cannot_work_are_refused(tiny_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(settings.ConfigError) as refused:
        Trainer(dataclasses.replace(tiny_config, parallel=ParallelConfig(tp=3)))
    text = "\n".join(refused.value.problems)
    assert "expected a divisor of num_heads = 4, got 3" in text and "ffn_width = 64, got 3" in text
    with pytest.raises(settings.ConfigError) as refused:  # 64 tokens a row
        Trainer(dataclasses.replace(tiny_config, parallel=ParallelConfig(cp=3, tp=4, sp=True)))
    assert [p.split(":")[0] for p in refused.value.problems] == ["parallel", "data.seq_length"]
    with pytest.raises(settings.ConfigError) as refused:
        Trainer(dataclasses.replace(tiny_config, parallel=ParallelConfig(cp=5, cp_form="star")))
    first, *others = refused.value.problems
    assert first == "parallel.cp_form: expected one of ring, gather, got 'star'"
    assert [p.split(":")[0] for p in others] == ["parallel", "data.seq_length"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for layout in ({"pp": 2}, {"stages_per_rank": 2, "schedule": "interleaved"}):
        with pytest.raises(settings.ConfigError) as refused:
            parallel = ParallelConfig(zero=2, **layout)
            Trainer(dataclasses.replace(tiny_config, parallel=parallel))
        assert "parallel.zero: expected 0 or 1 with 2 pipeline stages, got 2" in str(refused.value)
