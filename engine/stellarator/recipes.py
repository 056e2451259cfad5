"""Complete configurations by name. A recipe is a function without required arguments.

defines:
    demo, tiny                                                    for one small machine
    starcoder2_3b, starcoder2_7b, starcoder2_15b                  StarCoder2, 4K stage
    starcoder2_3b_long, starcoder2_7b_long, starcoder2_15b_long   StarCoder2, 16K stage
    santacoder, starcoderbase_1b, starcoderbase_3b, starcoderbase_7b, starcoderbase, starcoder
    get(name), names()

Every recipe for a large model needs data.train, data.tokenizer and torchrun's own arguments for the
machines. It has a layout for those that its docstring names; for others `stellarator plan --recipe
NAME --gpus N --search` finds one. Shapes and constants are those of the published models,
configurations and training scripts; what a docstring marks (memory) is quoted from memory of the
papers and was not found in a file, and what it marks (assumed) is ours. No loss or time is given
where none was measured with this engine. The first generation trained with dropout 0.1; these leave
it off.
Standard library only.
"""

import dataclasses
import difflib
import inspect
import sys

from stellarator.config import (
    CheckpointConfig,
    DataConfig,
    FimConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

_HELPERS = ("get", "names")


def names() -> list[str]:
    """The names that `get` knows, in the order of this file."""
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    found = [f for n, f in functions if not n.startswith("_") and n not in _HELPERS]
    return [f.__name__ for f in sorted(found, key=lambda f: f.__code__.co_firstlineno)]


def get(name: str) -> RunConfig:
    """The configuration of a recipe.

    Raises:
        ValueError: no such recipe; the message has the nearest name.
    """
    if name not in names():
        near = difflib.get_close_matches(name.replace("-", "_").lower(), names(), n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(names())}."
        raise ValueError(f"recipes: expected the name of a recipe, got {name!r}. {hint}")
    return getattr(sys.modules[__name__], name)()


# Short middles in short texts, so that minutes of training see very many of them; most of them in
# SPM order, where the middle goes on from the prefix, which is learned first (docs/LOG.md).
_DEMO_FIM = FimConfig(
    rate=0.9, fragment_rate=0.9, spm_rate=0.9, max_middle_tokens=3, max_text_tokens=32
)


def demo() -> RunConfig:
    """A small StarCoder2 that two CPU cores train in minutes.

    Command: make demo, or `stellarator demo` (which prepares the data and fills in its paths).
    Hardware: 2 CPU cores. Result: see the report of the run.
    """
    model = ModelConfig(
        vocab_size=1024,
        num_layers=4,
        width=256,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=1024,
        max_positions=512,
        window=256,
    )
    return RunConfig(
        name="demo",
        folder="runs/demo",
        model=model,
        data=DataConfig(seq_length=256, fim=_DEMO_FIM),
        optim=OptimConfig(lr=3e-3, min_lr=1e-4, warmup_steps=40),
        train=TrainConfig(steps=400, global_batch_size=16, micro_batch_size=16, eval_batches=16),
    )


def tiny() -> RunConfig:
    """Two layers for tests and for trying out an installation; seconds on a CPU.

    Command: torchrun -m stellarator.train --recipe tiny data.train=..., on one or two processes.
    """
    model = ModelConfig(
        vocab_size=512,
        num_layers=2,
        width=64,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=256,
        max_positions=128,
        window=32,
    )
    return RunConfig(
        name="tiny",
        folder="runs/tiny",
        model=model,
        data=DataConfig(seq_length=64),
        optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2),
        train=TrainConfig(steps=20, global_batch_size=4, micro_batch_size=2, precision="fp32"),
    )


def starcoder2_3b() -> RunConfig:
    """StarCoder2-3B, 3,030,371,328 parameters: pre-training at 4,096 tokens.

    Command: torchrun -m stellarator.train --recipe starcoder2_3b data.train=...
    Hardware: the original used 160 A100-80GB and 97,120 GPU-hours (memory). Layout: ZeRO 1
    (assumed), with 160 GPUs 4 micro-batches.
    Constants: lr 3e-4, warm-up 1000, 1.2M steps of 2.6M tokens (memory; here 640 rows), lowest
    learning rate a tenth (assumed), theta 1e5 at this stage (memory). About 3.1T tokens.
    """
    layout = ParallelConfig(zero=1)
    return _starcoder2("3b", layout, steps=1_200_000, rows=640, theta=1e5)


def starcoder2_7b() -> RunConfig:
    """StarCoder2-7B, 7,173,923,840 parameters: pre-training at 4,096 tokens.

    Command: torchrun -m stellarator.train --recipe starcoder2_7b data.train=...
    Hardware: the original used 432 H100 and 145,152 GPU-hours (memory). Layout: tensor parallel 2
    with sp, ZeRO 1 (assumed), with 432 GPUs 4 micro-batches.
    Constants: lr 3e-4, warm-up 1000, 1M steps of 3.5M tokens (memory; here 864 rows), lowest
    learning rate a tenth (assumed), theta 1e5 at this stage (memory).
    """
    layout = ParallelConfig(tp=2, sp=True, zero=1)
    return _starcoder2("7b", layout, steps=1_000_000, rows=864, theta=1e5)


def starcoder2_15b() -> RunConfig:
    """StarCoder2-15B, 15,957,889,024 parameters, untied: pre-training at 4,096 tokens.

    Command: torchrun -m stellarator.train --recipe starcoder2_15b data.train=...
    Hardware: the original used 1,024 H100. Layout: tensor parallel 8 with sp, pipeline 4, ZeRO 1
    (assumed), with 1,024 GPUs 31 micro-batches.
    Constants: lr 3e-4, warm-up 1000, 1M steps of 4.1M tokens (memory; here 992 rows), lowest
    learning rate a tenth (assumed), theta 1e4 at this stage (memory).
    """
    layout = ParallelConfig(tp=8, sp=True, pp=4, zero=1)
    return _starcoder2("15b", layout, steps=1_000_000, rows=992, theta=1e4)


def starcoder2_3b_long() -> RunConfig:
    """StarCoder2-3B, second stage: 16,384 tokens, window 4,096, the released configuration.

    Command: torchrun -m stellarator.train --recipe starcoder2_3b_long train.init_from=FOLDER ...
    Constants: 200B tokens; lr 3e-5, 80k steps (memory; here 160 rows, which keeps the tokens of a
    step), warm-up 1000 and lowest learning rate a tenth (assumed).
    Layout: ZeRO 1 (assumed), with 160 GPUs one micro-batch.
    """
    return _starcoder2_long("3b", ParallelConfig(zero=1), lr=3e-5, steps=80_000, rows=160)


def starcoder2_7b_long() -> RunConfig:
    """StarCoder2-7B, second stage: 16,384 tokens, window 4,096, the released configuration.

    Command: torchrun -m stellarator.train --recipe starcoder2_7b_long train.init_from=FOLDER ...
    Constants: lr 2e-5 or 3e-5, 56k steps (memory; here 2e-5 and 216 rows, which keeps the tokens of
    a step), warm-up 1000 and lowest learning rate a tenth (assumed).
    Layout: tensor parallel 2 with sp, ZeRO 1 (assumed), with 432 GPUs one micro-batch.
    """
    layout = ParallelConfig(tp=2, sp=True, zero=1)
    return _starcoder2_long("7b", layout, lr=2e-5, steps=56_000, rows=216)


def starcoder2_15b_long() -> RunConfig:
    """StarCoder2-15B, second stage: 16,384 tokens, window 4,096, the released configuration.

    Command: torchrun -m stellarator.train --recipe starcoder2_15b_long train.init_from=FOLDER ...
    Constants: lr 3e-5, 50k steps (memory; here 248 rows, which keeps the tokens of a step), warm-up
    1000 and lowest learning rate a tenth (assumed).
    Layout: tensor parallel 8 with sp, ZeRO 1 (assumed), with 992 GPUs 2 micro-batches.
    """
    layout = ParallelConfig(tp=8, sp=True, zero=1)
    return _starcoder2_long("15b", layout, lr=3e-5, steps=50_000, rows=248)


def santacoder() -> RunConfig:
    """SantaCoder, 1,124,886,528 parameters: 300k steps of a schedule of 600k, at 2,048 tokens.

    Command: torchrun -m stellarator.train --recipe santacoder data.train=...
    Hardware: the original used 96 GPUs. 236B tokens in 600k steps. It ran in fp16 with a loss
    scale, this recipe in bf16. No lowest learning rate was set: 0.
    """
    model = _gpt_bigcode(24, 2048, 16, init_std=0.022)
    model = dataclasses.replace(model, vocab_size=49280, max_positions=2048)
    optim = OptimConfig(lr=2e-4, min_lr=0.0, warmup_steps=12_000, decay_steps=600_000)
    return _first_generation("santacoder", model, optim, steps=300_000, rows=192, micro=2)


def starcoderbase_1b() -> RunConfig:
    """StarCoderBase-1B, 1,137,207,296 parameters: 1.05T tokens at 8,192 tokens.

    Command: torchrun -m stellarator.train --recipe starcoderbase_1b data.train=...
    Hardware: the original used 128 GPUs.
    """
    model = _gpt_bigcode(24, 2048, 16, init_std=0.02209)
    optim = OptimConfig(lr=4e-4, min_lr=4e-5, warmup_steps=2000, decay_steps=1_000_000)
    return _first_generation("starcoderbase_1b", model, optim, steps=1_000_000, rows=128)


def starcoderbase_3b() -> RunConfig:
    """StarCoderBase-3B, 3,043,311,104 parameters: 1.05T tokens at 8,192 tokens.

    Command: torchrun -m stellarator.train --recipe starcoderbase_3b data.train=...
    Hardware: the original used 256 GPUs.
    """
    model = _gpt_bigcode(36, 2816, 22, init_std=0.01884)
    optim = OptimConfig(lr=5e-4, min_lr=5e-5, warmup_steps=2000, decay_steps=500_000)
    return _first_generation("starcoderbase_3b", model, optim, steps=500_000, rows=256)


def starcoderbase_7b() -> RunConfig:
    """StarCoderBase-7B, 7,327,263,232 parameters: 1.05T tokens at 8,192 tokens.

    Command: torchrun -m stellarator.train --recipe starcoderbase_7b data.train=...
    Hardware: the original used 512 GPUs, tensor parallel 2, data parallel 256; here with ZeRO 1
    (assumed).
    """
    model = _gpt_bigcode(42, 4096, 32, init_std=0.015625)
    optim = OptimConfig(lr=3e-4, min_lr=3e-5, warmup_steps=2000, decay_steps=250_000)
    config = _first_generation("starcoderbase_7b", model, optim, steps=250_000, rows=512)
    return dataclasses.replace(config, parallel=ParallelConfig(tp=2, zero=1))


def starcoderbase() -> RunConfig:
    """StarCoderBase, 15,517,456,384 parameters: 1.05T tokens at 8,192 tokens.

    Command: torchrun -m stellarator.train --recipe starcoderbase data.train=...
    Hardware: the original used 512 A100-80GB, tensor parallel 4 with sequence parallelism, pipeline
    4, data parallel 32 with a distributed optimizer (ZeRO 1), 16 micro-batches.
    Result of the original: HumanEval pass@1 30.4, MBPP 49.0.
    """
    model = _gpt_bigcode(40, 6144, 48, init_std=0.01275)
    optim = OptimConfig(lr=3e-4, min_lr=3e-5, warmup_steps=2000, decay_steps=250_000)
    config = _first_generation("starcoderbase", model, optim, steps=250_000, rows=512)
    return dataclasses.replace(config, parallel=_STARCODERBASE)


def starcoder() -> RunConfig:
    """StarCoder: StarCoderBase fine-tuned on Python, 35.7B tokens, schedule and moments from zero.

    Command: torchrun -m stellarator.train --recipe starcoder train.init_from=FOLDER data.train=...
    Hardware: the original used 512 A100-80GB in the layout of StarCoderBase. Two epochs of Python.
    Warm-up 1000 as in the paper; the public script has 500.
    Result of the original: HumanEval pass@1 33.6, MBPP 52.7.
    """
    model = _gpt_bigcode(40, 6144, 48, init_std=0.01275)
    optim = OptimConfig(lr=5e-5, min_lr=5e-6, warmup_steps=1000, decay_steps=8_500)
    config = _first_generation("starcoder", model, optim, steps=8_500, rows=512)
    return dataclasses.replace(config, parallel=_STARCODERBASE)


_STARCODERBASE = ParallelConfig(tp=4, sp=True, pp=4, zero=1)


_STARCODER2 = {
    "3b": ModelConfig(
        num_layers=30,
        width=3072,
        num_heads=24,
        num_kv_heads=2,
        ffn_width=12288,
        rope_theta=999999.4420358813,
        init_std=0.018042,
    ),
    "7b": ModelConfig(
        num_layers=32,
        width=4608,
        num_heads=36,
        num_kv_heads=4,
        ffn_width=18432,
        rope_theta=1e6,
        init_std=0.018042,
    ),
    "15b": ModelConfig(
        num_layers=40,
        width=6144,
        num_heads=48,
        num_kv_heads=4,
        ffn_width=24576,
        rope_theta=1e5,
        init_std=0.01275,
        tie_embeddings=False,
    ),
}


def _starcoder2(
    size: str, parallel: ParallelConfig, *, steps: int, rows: int, theta: float
) -> RunConfig:
    """First stage of StarCoder2. `rows` is the batch in tokens, to the nearest 32 rows."""
    return RunConfig(
        name=f"starcoder2_{size}",
        folder=f"runs/starcoder2_{size}",
        model=dataclasses.replace(_STARCODER2[size], rope_theta=theta),
        data=DataConfig(seq_length=4096),
        optim=OptimConfig(lr=3e-4, min_lr=3e-5, warmup_steps=1000, decay_steps=steps),
        train=_train(steps, rows),
        parallel=parallel,
        checkpoint=CheckpointConfig(interval=1000),
    )


def _starcoder2_long(
    size: str, parallel: ParallelConfig, *, lr: float, steps: int, rows: int
) -> RunConfig:
    """Second stage of StarCoder2: long rows, the released theta."""
    return RunConfig(
        name=f"starcoder2_{size}_long",
        folder=f"runs/starcoder2_{size}_long",
        model=_STARCODER2[size],
        data=DataConfig(seq_length=16384),
        optim=OptimConfig(lr=lr, min_lr=lr / 10, warmup_steps=1000, decay_steps=steps),
        train=_train(steps, rows),
        parallel=parallel,
        checkpoint=CheckpointConfig(interval=1000),
    )


def _gpt_bigcode(layers: int, width: int, heads: int, *, init_std: float) -> ModelConfig:
    """Shape of the first generation: one key/value head, learned positions.

    `init_std` is that of training, 1 / sqrt(width); the released configurations say 0.02. The two
    largest were released with the erf form of gelu although training used the tanh form; new runs
    train with tanh, and `load_pretrained` obeys the file.
    """
    return ModelConfig(
        family="gpt_bigcode",
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=1,
        ffn_width=4 * width,
        max_positions=8192,
        positions="learned",
        window=None,
        init_std=init_std,
    )


def _first_generation(
    name: str, model: ModelConfig, optim: OptimConfig, *, steps: int, rows: int, micro: int = 1
) -> RunConfig:
    """Megatron's data of the first generation: FIM by document, attention across documents.

    A middle whose document the row cuts off ends there, without `<|endoftext|>`: its loader adds
    nothing, and these models saw most long documents that way.
    """
    fim = FimConfig(rate=0.5, spm_rate=0.5, split_at_files=False, end_cut_middles=False)
    return RunConfig(
        name=name,
        folder=f"runs/{name}",
        model=model,
        data=DataConfig(seq_length=model.max_positions, attend_across_documents=True, fim=fim),
        optim=optim,
        train=_train(steps, rows, micro),
        checkpoint=CheckpointConfig(interval=1000),
    )


def _train(steps: int, rows: int, micro: int = 1) -> TrainConfig:
    """The loop of a large run."""
    return TrainConfig(
        steps=steps,
        global_batch_size=rows,
        micro_batch_size=micro,
        recompute="selective",
        eval_interval=None,
    )
