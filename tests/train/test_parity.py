"""50 steps beside transformers and torch.optim.AdamW: same weights, same batches, same losses.

The peer computes its own logits, loss, gradients, clip and update in fp32. Batches have FIM on;
documents of a row see each other here, because the peer has no packed attention. The bound is 1e-4
nats.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stellarator.data.batches import Batches
from stellarator.data.packing import PackedDataset
from stellarator.data.shards import Shard
from stellarator.data.tokenizer import Tokenizer
from stellarator.model import build_model, save_pretrained
from stellarator.train.loop import Trainer
from stellarator.train.schedule import learning_rate

STEPS = 50


def peer_losses(config, folder) -> list[float]:
    """Losses of the same run by transformers and torch alone."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.train()
    optim = config.optim
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    shards = [Shard(prefix) for prefix in config.data.train]
    dataset = PackedDataset.from_config(config.data, shards, Tokenizer.load(config.data.tokenizer))
    batches = Batches(dataset, config.train.global_batch_size, config.train.global_batch_size)
    losses = []
    for step in range(1, STEPS + 1):
        (batch,) = batches.micro_batches(step - 1, 0, 1)
        logits = model(input_ids=batch.tokens).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, optim, STEPS)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("micro_batch_size", [4, 8])
def test_losses_follow_transformers_for_50_steps(tiny_config, tmp_path, micro_batch_size):
    config = dataclasses.replace(
        tiny_config,
        data=dataclasses.replace(tiny_config.data, attend_across_documents=True),
        train=dataclasses.replace(
            tiny_config.train, steps=STEPS, precision="fp32", micro_batch_size=micro_batch_size
        ),
    )
    initial = build_model(config.model, dtype=torch.float32, seed=config.train.seed)
    save_pretrained(initial, tmp_path / "initial")
    expected = peer_losses(config, tmp_path / "initial")
    Trainer(config).run()
    records = map(json.loads, Path(config.folder, "metrics.jsonl").read_text().splitlines())
    got = [record["loss"] for record in records if record["kind"] == "train"]
    differences = [abs(a - b) for a, b in zip(got, expected, strict=True)]
    assert max(differences) < 1e-4, max(differences)
    assert expected[-1] < expected[0] - 1.0  # the run learns, so the comparison means something
