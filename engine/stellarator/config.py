"""Configuration: frozen dataclasses, one per section of a run.

defines: ModelConfig, FimConfig, DataConfig, OptimConfig, TrainConfig, ParallelConfig,
CheckpointConfig, MetricsConfig, RunConfig. Values only: no torch, no file access at import. `None`
means off. Reading TOML, overrides and all error messages live in `stellarator.settings`.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder of the StarCoder family; one class covers both generations.

    `family` names the Hugging Face model type that the weights are exported as. The rest is what
    the computation needs: StarCoder is `positions="learned"` with one key/value head, StarCoder2 is
    `positions="rope"` with grouped heads and a window.
    """

    family: str = "starcoder2"  # or "gpt_bigcode"
    vocab_size: int = 49152  # V
    num_layers: int = 6  # L
    width: int = 384  # C
    num_heads: int = 6  # H
    num_kv_heads: int = 2  # G
    ffn_width: int = 1536  # F
    max_positions: int = 16384
    positions: str = "rope"  # or "learned"
    rope_theta: float = 10000.0
    window: int | None = 4096  # visible keys, the query's own included; None: all
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"  # or "gelu_erf"
    tie_embeddings: bool = True
    init_std: float = 0.02
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def head_width(self) -> int:
        """D, the width of one head."""
        return self.width // self.num_heads


@dataclass(frozen=True)
class FimConfig:
    """Fill-in-the-middle. Facts: Bavarian et al. 2022 and the public StarCoder loaders."""

    rate: float = 0.5  # of documents (v1) or of repositories (repo context)
    fragment_rate: float = 0.5  # of the files of a chosen repository
    spm_rate: float = 0.5  # suffix-prefix-middle (variant 2) among transformed samples
    split_at_files: bool = True  # StarCoder2: files of a repository are transformed one by one
    keep_metadata: bool = True  # `<repo_name>...` is never transformed
    drop_empty_texts: bool = False  # of a chosen repository, each with the `<file_sep>` after it
    max_middle_tokens: int | None = None
    max_text_tokens: int | None = None  # longer texts are divided at random, for long files
    end_cut_middles: bool = True  # `<|endoftext|>` after a middle whose document the row cuts off


@dataclass(frozen=True)
class DataConfig:
    """What is read: token shards (prefixes of .bin/.idx pairs) and how rows are cut from them."""

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # of the shards; empty: in proportion to their tokens
    validation: tuple[str, ...] = ()
    tokenizer: str = ""  # folder with tokenizer.json
    seq_length: int = 1024  # T
    attend_across_documents: bool = False
    seed: int = 1234
    fim: FimConfig = field(default_factory=FimConfig)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. Tensors with one dimension are never decayed."""

    lr: float = 3e-4
    min_lr: float = 3e-5
    schedule: str = "cosine"  # or "wsd", "constant"
    warmup_steps: int = 100
    decay_steps: int | None = None  # cosine: end of the decay; wsd: length of the tail
    wsd_shape: str = "linear"  # tail of wsd: "linear", "cosine" or "sqrt"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    weights: str = "masters"  # beside bf16 parameters: fp32; or "remainders", "stochastic"
    moments: str = "fp32"  # or "8bit": of tensors with two or more dimensions


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    global_batch_size: int = 8  # rows per optimizer step, over all ranks
    micro_batch_size: int = 8  # rows per forward pass on one rank
    precision: str = "bf16"  # parameters; masters, moments and accumulated gradients are fp32
    device: str = "auto"  # "cpu", "cuda"; auto: cuda where there is one
    recompute: str = "none"  # "selective", "full"
    seed: int = 1234  # of the initial weights
    kernels: str = "auto"  # impl= of every op
    init_from: str | None = None  # Hugging Face folder to start from
    eval_interval: int | None = None
    eval_batches: int = 8
    on_nonfinite: str = "stop"  # or "skip": leave out the update of a step that is not finite


@dataclass(frozen=True)
class ParallelConfig:
    """How processes share a run. The data-parallel size is what the other axes leave of them."""

    tp: int = 1  # tensor: heads, MLP columns and vocabulary
    sp: bool = False  # between these products the tensor ranks share out the tokens
    pp: int = 1  # pipeline: ranks that hold consecutive layers
    stages_per_rank: int = 1  # v: model chunks of a rank, for interleaved and V-shaped schedules
    schedule: str = "1f1b"  # see stellarator.parallel.pipeline.schedules
    cp: int = 1  # context: tokens of a row
    cp_form: str = "ring"  # keys and values go round; "gather": each rank has those of whole rows
    zero: int = 0  # 1: states, 2: and gradients, 3: and parameters are shared out over dp, cp
    bucket_mib: float = 32.0  # of gradients that are summed at a time, beside the backward pass
    reduce_dtype: str = "fp32"  # of that sum; "bf16": half the bytes, rounded
    timeout_seconds: float = 600.0  # of a collective; then the run ends and says who is missing


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run."""

    interval: int | None = None  # steps; one is always written at the end and on a signal
    keep: int | None = 3  # newest ones kept; at least 2, the newest may be damaged
    resume: str = "auto"  # "none", or the path of a checkpoint for the first start


@dataclass(frozen=True)
class MetricsConfig:
    """What is written beside the weights."""

    log_interval: int = 1
    tensorboard: bool = True  # where it is installed
    peak_tflops: float | None = None  # for MFU; None: table for known GPUs, else measured
    report: bool = True


@dataclass(frozen=True)
class RunConfig:
    """Everything about one run."""

    name: str = "run"
    folder: str = "runs/run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
