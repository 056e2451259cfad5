"""`train.kernels`: a value that some op does not have is one line before anything is made.

The ops of a training step are those that really ask for an implementation in one.
"""

import dataclasses
import os

import pytest
import torch

from stellarator.train import kernels
from stellarator.train.loop import Trainer
from stellarator_kernels import dispatch

BIGCODE = {"family": "gpt_bigcode", "positions": "learned", "num_kv_heads": 1, "window": None}


def with_(config, impl: str = "reference", precision: str = "fp32", **model):
    train = dataclasses.replace(config.train, kernels=impl, precision=precision, steps=3)
    return dataclasses.replace(
        config, train=train, model=dataclasses.replace(config.model, **model)
    )


@pytest.mark.parametrize("model", [{}, BIGCODE], ids=["starcoder2", "gpt_bigcode"])
@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_every_op_of_a_step_is_asked_about(tiny_config, monkeypatch, model, precision):
    config = with_(tiny_config, precision=precision, **model)
    asked, used, facts = {}, {}, dispatch.facts

    def noting(found):
        def note(op, tensor, *options):
            found[op] = tensor.dtype, tuple(tensor.shape[1:])
            return facts(op, tensor, *options)

        return note

    monkeypatch.setattr(dispatch, "facts", noting(used))
    Trainer(with_(config, "auto", precision)).run()
    monkeypatch.setattr(dispatch, "facts", noting(asked))
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}[precision]
    kernels.check(config, torch.device("cpu"), dtype)
    for op in ("embedding", "linear", "add_weight_gradient_"):  # which the model leaves to "auto"
        del used[op]
    del used["bias_rope"]  # asked only whether it is Triton's
    assert asked.keys() == used.keys() and ("rope" in asked) == (not model)
    for op in asked.keys() - {"rope", "flash_attention"}:
        assert asked[op] == used[op], op
    for op in asked.keys() & {"rope", "flash_attention"}:  # heads and their width come last
        assert asked[op][0] == used[op][0] and asked[op][1] == used[op][1][-2:], op


def test_an_implementation_that_some_op_lacks_is_one_line(tiny_config, monkeypatch):
    table = dispatch._OPS | {"layer_norm": ("torch", "reference"), "rope": ("torch",)}
    monkeypatch.setattr(dispatch, "_OPS", table)
    with pytest.raises(ValueError) as refused:
        Trainer(with_(tiny_config, "cpu")).run()
    text = str(refused.value)
    assert text.startswith("train.kernels: expected an implementation that every op has here")
    assert "layer_norm: there is no cpu implementation" in text and "rope: there" in text
    assert text.endswith("Pass train.kernels=auto.") and "\n" not in text
    assert not os.path.exists(os.path.join(tiny_config.folder, "checkpoints"))


def test_what_this_machine_cannot_run_is_said(tiny_config, monkeypatch):
    monkeypatch.setattr(dispatch.extension, "failure", lambda *name: "no such file")
    with pytest.raises(ValueError, match="adamw_: the C.. extension does not load: no such file"):
        Trainer(with_(tiny_config, "cpu")).run()
    with pytest.raises(ValueError, match="not torch.float64"):
        Trainer(with_(tiny_config, "triton", "fp64")).run()


def test_dropout_rules_out_the_kernels_that_lack_it(tiny_config):
    rates = {"residual_dropout": 0.1, "attention_dropout": 0.1, "width": 64}
    with pytest.raises(ValueError, match="flash_attention: dropout_p is in triton"):
        Trainer(with_(tiny_config, "cpu", **rates)).run()
