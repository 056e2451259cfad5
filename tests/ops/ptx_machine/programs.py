"""What test_ptx_machine.py runs in a process without Triton's interpreter; prints JSON.

defines: PLANTED, planted, training_step
"""

import collections
import json
import re

import torch
from ptx_machine import device, machine, reader

# What is replaced in the PTX of two designs of attention's forward, one place at a time.
PLANTED = {
    "forward": {
        "wait for the copies": (r"cp\.async\.wait_group\s+\d+;", ""),
        "wait for the products": (r"wgmma\.wait_group\.sync\.aligned \d;", ""),
        "fence": (r"fence\.proxy\.async\.shared::cta;", ""),
        "barrier": (r"bar\.sync\s+0;", ""),
    },
    "gluon": {
        "wait for the products": (r"wgmma\.wait_group\.sync\.aligned 0;", ""),
        "arrival": (r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", ""),
        "bytes": (r", 16384;", ", 8192;"),
        "fence": (r"fence\.proxy\.async\.shared::cta;", ""),
        "wait for the store": (r"cp\.async\.bulk\.wait_group\.read\s+0;", ""),
        "wait at a barrier": (
            r"mbarrier\.try_wait\.parity\S+ complete, (\S+), (\S+);",
            r"mov.pred complete, -1;",
        ),
    },
}


def planted() -> None:
    """What the first place at which each of PLANTED is seen gives, under two orders of events.

    Not all places are: some barriers stand where others would do.
    """
    launches = []
    device.install("sm_90", lambda *launch: launches.append(launch) or machine.run(*launch))
    from stellarator_kernels import flash_attention, tuned

    entries = {"forward": {"design": "triton"}}
    entries["gluon"] = {"design": "gluon", "step": 64, "stages": 2, "turns": 1}
    q, k, v = (torch.randn(1, 300, n, 128).to(torch.bfloat16) for n in (2, 1, 1))
    results = {}
    for name, bugs in PLANTED.items():
        with tuned.use({"flash_attention forward design 128": entries[name]}):
            out, lse = flash_attention(q, k, v, return_lse=True, impl="triton")
        (kernel, *launch), right = launches[-1], out.clone()

        def seen(text, launch=launch, out=out, right=right):
            for seed in (1, 2):
                out.fill_(float("nan"))
                try:
                    machine.run(reader.parse(text), *launch, seed, limit=10**7)
                except machine.EmulationError as error:
                    return str(error)
                if not torch.equal(out, right):
                    return "wrong"
            return None

        results[name] = {"nothing": seen(kernel.ptx)}
        for bug, (old, new) in bugs.items():
            places = re.finditer(old, kernel.ptx)
            ptx = kernel.ptx
            texts = (ptx[: x.start()] + x.expand(new) + ptx[x.end() :] for x in places)
            results[name][bug] = next(filter(None, map(seen, texts)), None)
    print(json.dumps(results))


def training_step(arch: str | None = None) -> None:
    """Loss and gradients of the tiny model in bf16, where given on an emulated GPU, beside fp32."""
    from stellarator import build_model, recipes

    config = recipes.get("tiny").model
    generator = torch.Generator().manual_seed(1)
    size = {"size": (1, 128), "generator": generator}
    tokens, targets = (torch.randint(0, config.vocab_size, **size) for _ in range(2))
    documents = torch.tensor([0, 50, 128], dtype=torch.int32)

    def step(dtype):
        torch.manual_seed(0)
        model = build_model(config).to(dtype)
        loss = model(tokens, targets, cu_seqlens=documents)
        loss.backward()
        gradients = [x.grad.float().flatten() for x in model.parameters() if x.grad is not None]
        return loss.item(), torch.cat(gradients)

    exact_loss, exact = step(torch.float32)
    launches = collections.Counter()
    if arch is not None:
        device.install(arch, lambda k, *rest: launches.update([k.name]) or machine.run(k, *rest))
    loss, found = step(torch.bfloat16)
    error = ((found - exact).norm() / exact.norm()).item()
    told = {"loss": loss, "exact_loss": exact_loss, "error": error, "launches": dict(launches)}
    print(json.dumps(told))
