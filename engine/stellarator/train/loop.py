"""The training loop.

defines: Trainer, DTYPES

A step: micro-batches forward and backward on the SUM of token losses; gradients summed in fp32,
over micro-batches and then over ranks; one division by the number of target tokens of the whole
batch; clip; AdamW. The state of a run is its step number, the weights, the moments and how many
updates were skipped: everything else (batches, FIM cuts, learning rate) is a function of the step.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

from stellarator import settings
from stellarator.config import RunConfig
from stellarator.data.batches import Batch, Batches
from stellarator.data.packing import PackedDataset
from stellarator.data.shards import Shard, check_tokenizer
from stellarator.data.tokenizer import Tokenizer
from stellarator.files import replace_text
from stellarator.model import Transformer
from stellarator.model.dropout import Dropout
from stellarator.parallel import mesh as meshes
from stellarator.parallel.buckets import DataParallel
from stellarator.parallel.gather import Wholes
from stellarator.parallel.rows import ContextParallel
from stellarator.parallel.tensor import TensorParallel
from stellarator.parallel.unfilled import without_memory
from stellarator.progress import show
from stellarator.sizes import FORMULA
from stellarator.train import checkpoint, flops, kernels, memory, metrics, resume, watch
from stellarator.train.first import first_values
from stellarator.train.inputs import Inputs, inputs_of
from stellarator.train.metrics import RunLog, StepMetrics, ZScore, step_line, write_status
from stellarator.train.optimizer import KINDS, FlatOptimizer
from stellarator.train.pipeline import Pipeline
from stellarator.train.resume import RefusedError, TrainingError
from stellarator.train.schedule import learning_rate
from stellarator.train.signals import Stopped, StopRequest, folder_lock
from stellarator.train.timing import Stopwatch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Trainer:
    """One run: `Trainer(config).run()`.

    Args:
        config: checked again here; see `stellarator.settings`.
    Raises:
        ConfigError: with every problem of the configuration.
    """

    def __init__(self, config: RunConfig):
        if problems := settings.check_run(config, int(os.environ.get("WORLD_SIZE", 1))):
            raise settings.ConfigError(problems)
        self.config = config
        self.folder = Path(config.folder)
        self.progress = resume.Progress()

    @property
    def step(self) -> int:
        """Updates done."""
        return self.progress.step

    def run(self) -> dict:
        """Train to the last step, or until a signal asks to stop.

        Returns:
            {"status", "step", "loss", "validation_loss", "tokens", "seconds", "memory_bytes"};
            status is done, preempted (SIGTERM, SIGHUP, SIGUSR1, SIGUSR2) or interrupted (SIGINT).
            Before the first step, when there is nothing to save, a signal stops it at once.
        Raises:
            TrainingError, CheckpointError, ShardError, ...: with one line that says what to do.
        """
        # Before there is a group: the others only wait for this rank to come, and end with it.
        with folder_lock(self.folder) if _is_main() else contextlib.nullcontext():
            return self._run_in_group()

    def _run_in_group(self) -> dict:
        parallel, journals = self.config.parallel, watch.journals_of(self.folder)
        alike = resume.flat(dataclasses.asdict(self.config)) | {"torch": torch.__version__}
        self.mesh = meshes.start(self.config.train.device, parallel, journals, alike)
        self.tp = TensorParallel(self.mesh.tp, parallel.sp)
        self.data = DataParallel(
            self.mesh.replicas,
            parallel.zero,
            int(parallel.bucket_mib * 2**20),
            torch.bfloat16 if parallel.reduce_dtype == "bf16" else None,
        )
        self.pipeline = self.part = None
        try:
            with StopRequest() as self.stop, self._watched():
                summary = self._run_and_tell() if self.mesh.main else self._run()
        except Stopped:
            return self._summary(float("nan"), time.monotonic())
        # Not after an error: other ranks may be inside a collective that leaving would wait for.
        self.mesh.stop()
        if self.mesh.main:
            watch.remove_journals(self.folder)
        return summary

    def _watched(self) -> contextlib.AbstractContextManager:
        """A block in which a watchdog looks after the collectives."""
        if self.mesh.journal is None:
            return contextlib.nullcontext()
        seconds = self.config.parallel.timeout_seconds
        return watch.watchdog(self.mesh.journal, self.folder, seconds, lambda: self.step)

    def _run_and_tell(self) -> dict:
        """`_run` of rank 0: what went wrong also goes into status.json."""
        try:
            return self._run()
        except Stopped:
            show(f"{self._status()} before the first step", sys.stdout)
            write_status(self.folder, self._status(), self.step, "stopped before the first step")
            raise
        except BaseException as error:
            journal = self.mesh.journal
            if journal is not None and watch.report_of(self.folder, journal).exists():
                raise  # the watchdog has written more than is known here
            reason = (str(error) or type(error).__name__).splitlines()[0]
            with contextlib.suppress(OSError):  # a full disk may be why
                write_status(self.folder, "failed", self.step, reason)
            raise

    def _run(self) -> dict:
        config, main = self.config, self.mesh.main
        if main and self.mesh.journal is not None:
            watch.remove_journals(self.folder, but=self.mesh.journal.folder)
        with RunLog(self.folder, main, config.metrics.tensorboard) as self.log:
            self._build()
            self.stop.check()
            self._resume()
            if main:
                replace_text(self.folder / "config.toml", settings.to_toml(config))
                write_status(self.folder, "running", self.step)
            started = time.monotonic()
            self.stop.defer()
            loss = self._loop(started)
            self._save()
            status = self._status()
            self.log.say(f"{status} at step {self.step}")
        if main:
            write_status(self.folder, status, self.step)
            if config.metrics.report and self.step:
                self._report()
        self.mesh.barrier()  # a rank that leaves early closes connections that others still use
        return self._summary(loss, started)

    def _summary(self, loss: float, started: float) -> dict:
        """What `run` returns."""
        return {
            "status": self._status(),
            "step": self.step,
            "loss": loss,
            "validation_loss": self.progress.last_eval,
            "tokens": self.progress.tokens_total,
            "seconds": time.monotonic() - started,
            "memory_bytes": metrics.peak_memory_bytes(self.mesh.device),
        }

    def _report(self) -> None:
        """Write report.html; a trained model is not lost because a plot cannot be drawn."""
        from stellarator.train.report import write_report  # matplotlib only when needed

        try:
            write_report(self.folder)
        except Exception as error:
            print(f"warning: report.html was not written: {error}", file=sys.stderr)

    # Making everything, and going on from a checkpoint.

    def _build(self) -> None:
        """Data, the checkpoint to go on from, model, optimizer."""
        # The first op would import it, while other ranks wait in the middle of the first step.
        importlib.import_module("torch._dynamo")
        config, device = self.config, self.mesh.device
        self.dtype = DTYPES[config.train.precision]
        form, window = config.parallel.cp_form, config.model.window
        self.cp = ContextParallel(self.mesh.cp, form, window, device)
        if self.mesh.pp.size * config.parallel.stages_per_rank > 1:
            self.pipeline = Pipeline(config, self.mesh)
            self.part = self.pipeline.part
        with self.mesh.together():
            kernels.check(config, device, self.dtype)
            self._open_data()
            # Of a model without values, so that one that is too large costs nothing.
            whole = Transformer(config.model, device="meta", dtype=self._state_dtype)
            self.whole = dict(whole.named_parameters())
            self._print_header(sum(p.numel() for p in self.whole.values()))
            held = Transformer(config.model, tp=self.tp, part=self.part, device="meta").parameters()
            count, replicas = sum(p.numel() for p in held), self.mesh.replicas.size
            kinds = config.optim.weights, config.optim.moments
            precision = config.train.precision
            memory.check(count, precision, device, self.data.stage, replicas, *kinds)
        self._find_checkpoint()
        with self.mesh.together():
            self._make_model()
        if self.pipeline is not None:
            self.pipeline.attach(self.model, self.optimizer.reducer)
        self.clock, self.ranks = Stopwatch(device), watch.SlowRanks(self.mesh, self.log)
        self.peak, self.peak_source = flops.peak_flops(
            device, self.dtype, config.metrics.peak_tflops
        )
        self.log.say(
            f"mfu: {FORMULA} over {self.peak / 1e12:.3g} TFLOP/s a device ({self.peak_source})"
        )

    def _open_data(self) -> None:
        """Tokenizer and batches."""
        config = self.config
        self.tokenizer = Tokenizer.load(config.data.tokenizer)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise RefusedError(
                f"model.vocab_size: expected at least the tokenizer's {self.tokenizer.vocab_size}, "
                f"got {config.model.vocab_size}. Pass model.vocab_size={self.tokenizer.vocab_size}."
            )
        check_tokenizer((*config.data.train, *config.data.validation), self.tokenizer.sha256)
        self.batches = self._batches(config.data.train)
        self.batches.num_micro_batches(self.mesh.dp.size)  # said now, not after the model is made
        self.validation = None
        if config.data.validation:
            self.validation = self._batches(config.data.validation, validation=True)

    def _batches(self, prefixes: tuple[str, ...], validation: bool = False) -> Batches:
        """Batches of token shards; validation rows are neither shuffled nor transformed."""
        config = self.config
        dataset = PackedDataset.from_config(
            config.data,
            [Shard(prefix) for prefix in prefixes],
            self.tokenizer,
            validation=validation,
            fim=not validation,
            keep_segments=self.mesh.main,
        )
        return Batches(dataset, config.train.global_batch_size, config.train.micro_batch_size)

    def _find_checkpoint(self) -> None:
        """`self.found`: the checkpoint to go on from, as `checkpoint.resume` says, or None."""
        self.fingerprint = resume.fingerprint(self.config.data.train, self.tokenizer.sha256)
        if self.mesh.main:
            checkpoint.take_back(self.folder / "checkpoints")
        self.mesh.barrier()
        if not self.mesh.agrees_on(int(self.fingerprint[:14], 16), "token shards"):
            text = (
                "data.train: expected the same token shards and tokenizer on every rank, got "
                "different ones. Copy them again, or put them where all machines see them."
            )
            raise self.mesh.of_all(TrainingError(text))
        with self.mesh.together():
            found = self.found = resume.find(self.config, self.log.warn)
        seal = hashlib.sha256(json.dumps(found.manifest).encode() if found else b"").digest()
        if not self.mesh.agrees_on(int.from_bytes(seal[:7]), "checkpoint to resume"):
            raise TrainingError(
                f"{self.folder}: expected the same newest checkpoint on every rank, got different "
                f"ones (rank {self.mesh.world.rank}: {found and found.folder}). Put `folder` on a "
                "file system that all machines share."
            )
        if found is not None:
            with self.mesh.together():
                lines = resume.compare(found, self.config, self.fingerprint)
            for line in lines:
                self.log.say(line)

    @property
    def _state_dtype(self) -> torch.dtype:
        """Of masters and moments."""
        return torch.float32 if self.dtype == torch.bfloat16 else self.dtype

    def _make_model(self) -> None:
        """Model and optimizer, whose buckets ask for the first values of their parameters."""
        config = self.config
        options = {"kernels": config.train.kernels, "recompute": config.train.recompute}
        # bf16 is rounded from masters that keep all digits of the initial or loaded weights.
        options |= {"tp": self.tp, "part": self.part, "dtype": self._state_dtype}
        self.model = Transformer(config.model, **options, device="meta")
        ranks = (self.tp, self.data, self.mesh.pp)
        with first_values(config, self.found is not None) as fill:
            without_memory(self.model, self.mesh.device, fill)
            self.optimizer = FlatOptimizer(
                *(self.model, config.optim, config.train.kernels, self.dtype, *ranks),
                config.train.seed,
            )

    def _resume(self) -> None:
        """Take over the state of the checkpoint that was found."""
        found, self._saved_step = self.found, None
        if found is not None:
            shards, some = self.optimizer.shards(), self.part is not None
            optimizer = self.optimizer
            found.load_into(optimizer.state(), partly=some, shards=shards, put=optimizer.put)
            self.optimizer.after_load()
            self.progress = resume.Progress(**found.manifest["state"]["progress"])
            self.log.say(f"resumed {found.folder} at step {self.step}")
            folder = self.folder / "checkpoints"
            if found.folder.resolve().parent == folder.resolve():
                self._saved_step = self.step
                if self.mesh.main:
                    checkpoint.set_aside_newer(folder, self.step)
        self.zscore = ZScore(self.progress.recent_losses)
        self.log.rewind(self.step if found is not None else -1)

    def wholes(self) -> Wholes | None:
        """The whole tensors of the training state; None on a replica of who puts them together.

        All ranks that get them read them in turn: each holds other parts.
        """
        if self.mesh.replicas.rank > 0 and not self.data.stage:
            return None
        named = {f"{kind}.{n}": p.detach() for kind in KINDS for n, p in self.whole.items()}
        parts, shards = self.optimizer.state(), self.optimizer.shards()
        return Wholes(parts, shards, named, self.optimizer.axes, self.mesh.device)

    def _save(self, required: bool = True, keep_older: bool = False) -> None:
        """Write a checkpoint (rank 0, with those that hold other parts), unless this step has one.

        A failure is raised if `required`, else told.
        """
        folder = self.folder / "checkpoints"
        failed: checkpoint.CheckpointError | None = None
        wholes, due = self.wholes(), self.step != self._saved_step
        if self.mesh.main and due:
            self.progress.recent_losses = list(self.zscore.values)
            state = {
                "config": dataclasses.asdict(self.config),
                "data_fingerprint": self.fingerprint,
                "progress": dataclasses.asdict(self.progress),
                "torch": torch.__version__,
            }
            try:
                checkpoint.save(folder, self.step, wholes.described, state, wholes.read)
                checkpoint.rotate(folder, None if keep_older else self.config.checkpoint.keep)
            except checkpoint.CheckpointError as error:
                failed = error
        if due and wholes is not None:
            wholes.rest()
        told = torch.tensor([int(failed is not None)], device=self.mesh.device)
        if not self.mesh.world.max_(
            told, "checkpoint"
        ).item():  # a barrier too: nobody goes on before rank 0 is done
            return
        if required:
            raise failed or TrainingError("rank 0 could not save the last checkpoint.")
        self.log.warn(f"{failed} Training goes on.")

    # Steps.

    def _loop(self, started: float) -> float:
        """Steps until the end or a signal; the loss of the last one."""
        config, first, loss = self.config, self.step, float("nan")
        rank, size = self.mesh.dp.rank, self.mesh.dp.size
        if self.validation and self.step == 0:
            self.evaluate()
        with self.batches.steps(self.step, rank, size) as self.source:
            while self.step < config.train.steps and not self._stop_requested():
                done = self._one_step()
                loss, self.progress.step = done.loss, done.step
                self.log.step(done)
                last = self.step == config.train.steps
                if last or self.step % config.metrics.log_interval == 0:
                    spent = time.monotonic() - started
                    eta = spent / (self.step - first) * (config.train.steps - self.step)
                    self.log.say(step_line(done, config.train.steps, eta))
                    self.ranks.look(self.step)
                if self.validation and (last or _due(self.step, config.train.eval_interval)):
                    self.evaluate()
                if not last and _due(self.step, config.checkpoint.interval):
                    self._save(required=False)
        return loss

    def _stop_requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks agree."""
        asked = torch.tensor([int(self.stop.received or 0)], device=self.mesh.device)
        number = int(self.mesh.world.max_(asked, "stop request").item())
        if number:
            self.stop.received = signal.Signals(number)
        return bool(number)

    def _one_step(self) -> StepMetrics:
        """One optimizer step."""
        clock, optimizer, mesh, config = self.clock, self.optimizer, self.mesh, self.config
        started, step = time.perf_counter(), self.step + 1
        mesh.at(step=step)
        self.ranks.times.begin()
        clock.start()
        waited = self.source.data_wait_seconds
        micro_batches = next(self.source)
        waited = self.source.data_wait_seconds - waited
        clock.mark("data")
        optimizer.zero_grad()
        # (sum of token losses, target tokens, model FLOPs), of this rank and then of all
        totals = torch.zeros(3, dtype=torch.float64, device=mesh.device)
        for batch in micro_batches if mesh.cp.rank == 0 else ():  # the others read the same rows
            totals[1] += batch.num_targets
            totals[2] += flops.batch_flops(config.model, batch.cu_seqlens.diff().tolist())
        micro_batches = [
            inputs_of(batch, self.cp, mesh.device, self._dropout(batch)) for batch in micro_batches
        ]
        if self.pipeline is not None:
            totals[0] += self.pipeline.step(micro_batches)
            mesh.pp.sum_(totals[:1], "totals")
            self.pipeline.sum_tied_(optimizer.grad)
            clock.mark("pipeline")
        else:
            for index, batch in enumerate(micro_batches):
                mesh.at(micro_batch=index)
                loss = self._loss_sum(batch)
                clock.mark("forward")
                with optimizer.last_micro_batch(batch is micro_batches[-1]):
                    loss.backward()
                totals[0] += loss.detach()
                clock.mark("backward")
            mesh.at(micro_batch=None, layer=None)
        optimizer.complete_grads()
        mesh.replicas.sum_(totals, "totals")
        clock.mark("reduce")
        loss_sum, num_targets, model_flops = totals.tolist()
        divisor = max(1, int(num_targets))
        mean_loss, lr = loss_sum / divisor, learning_rate(step, config.optim, config.train.steps)
        norm = optimizer.norm(divisor)
        update = self._may_update(step, mean_loss, float(norm))
        if update:
            optimizer.step(step - self.progress.skipped, lr, divisor, norm)
        else:
            self.progress.skipped += 1
        clock.mark("optimizer")
        split = clock.split_ms()
        self.ranks.times.end()
        seconds = time.perf_counter() - started
        self.progress.tokens_total += int(num_targets)
        return StepMetrics(
            step=step,
            loss=mean_loss,
            loss_z=self.zscore(mean_loss),
            grad_norm=float(norm),
            lr=lr,
            step_ms=1e3 * seconds,
            tokens=int(num_targets),
            tokens_total=self.progress.tokens_total,
            tokens_per_second=num_targets / seconds,
            mfu=model_flops / seconds / (self.peak * mesh.world.size),
            data_wait=waited / seconds,
            time_ms=split,
            memory_bytes=metrics.peak_memory_bytes(mesh.device),
            skipped=not update,
        )

    def _dropout(self, batch: Batch) -> Dropout | None:
        """What a micro-batch drops; None where every rate is 0."""
        model = self.config.model
        rates = (model.residual_dropout, model.embedding_dropout, model.attention_dropout)
        return Dropout(self.config.train.seed, batch.first_row) if any(rates) else None

    def _loss_sum(self, batch: Inputs) -> torch.Tensor:
        """Sum of the token losses of one micro-batch."""
        return self.model(batch.tokens, batch.targets, reduction="sum", **batch.options)

    def _may_update(self, step: int, loss: float, norm: float) -> bool:
        """False to skip a step that is not finite; raises if the run should stop there."""
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        if self.config.train.on_nonfinite == "skip":
            self.log.warn(f"step {step}: loss {loss}, gradient norm {norm}: update skipped")
            return False
        names = self.optimizer.not_finite(self.whole)
        self._save(keep_older=True)  # these weights may be spoilt already
        text = (
            f"step {step}: expected a finite loss and gradient, got loss {loss}, norm {norm}; "
            f"gradients that are not finite: {', '.join(names[:3]) or 'none'} ({len(names)} in "
            f"all). The weights of step {self.step} are saved. Lower optim.lr, or pass "
            f"train.on_nonfinite=skip. If it fails again, {self._elsewhere()}"
        )
        raise self.mesh.of_all(TrainingError(text))

    def _elsewhere(self) -> str:
        """Where to begin when the newest weights are spoilt."""
        found = sorted((self.folder / "checkpoints").glob("step_*"))
        older = [path for path in found if path.name < f"step_{self.step:08d}"]
        begin = "begin in a new `folder`"
        if not older:
            return f"those weights are the cause: {begin}."
        return (
            f"those weights are the cause: go on from older ones (checkpoint.resume={older[-1]} "
            f"and another `folder`), or {begin}."
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss in nats per token on the first validation rows, without FIM."""
        config, mesh = self.config, self.mesh
        totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
        rows = config.train.eval_batches * config.train.global_batch_size
        self.model.eval()
        rows_here = self.validation.evaluation(rows, mesh.dp.rank, mesh.dp.size)
        for index, batch in enumerate(rows_here):
            mesh.at(micro_batch=index)
            totals[1] += batch.num_targets if mesh.cp.rank == 0 else 0
            inputs = inputs_of(batch, self.cp, mesh.device)
            if self.pipeline is not None:
                totals[0] += self.pipeline.evaluate(inputs)
            else:
                totals[0] += self._loss_sum(inputs)
        self.model.train()
        mesh.at(micro_batch=None, layer=None)
        mesh.pp.sum_(totals[:1], "evaluation")
        loss_sum, count = mesh.replicas.sum_(totals, "evaluation").tolist()
        loss = self.progress.last_eval = loss_sum / max(1.0, count)
        self.log.record("eval", {"step": self.step, "loss": loss, "tokens": int(count)})
        self.log.say(f"eval at step {self.step}: loss {loss:.4f} over {int(count):,} tokens")
        return loss

    # Words.

    def _status(self) -> str:
        if self.stop.received is None or self.step == self.config.train.steps:
            return "done"
        return "interrupted" if self.stop.received == signal.SIGINT else "preempted"

    def _print_header(self, num_parameters: int) -> None:
        config, mesh = self.config, self.mesh
        model, train, data = config.model, config.train, self.batches.dataset
        epochs = train.steps * train.global_batch_size / data.rows_per_epoch
        for line in (
            f"{config.name}: {model.family}, {num_parameters:,} parameters, "
            f"L {model.num_layers} C {model.width} H {model.num_heads} G {model.num_kv_heads} "
            f"V {model.vocab_size} T {config.data.seq_length}",
            f"data: {data.num_tokens:,} tokens, {data.rows_per_epoch:,} rows an epoch; "
            f"{train.global_batch_size} rows a step, {train.steps:,} steps, {epochs:.2f} epochs",
            f"machine: {mesh.world.size} x {flops.device_name(mesh.device)}, {train.precision}, "
            f"{torch.get_num_threads()} threads",
        ):
            self.log.say(line)


def _is_main() -> bool:
    """Whether this is the first of the processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
