"""Training: the loop and what it needs.

Modules: schedule (learning rates), optimizer (flat buffers and AdamW), checkpoint (safetensors and
a manifest, committed by one rename), metrics (lines, JSONL, TensorBoard), loop (Trainer), report.
`python -m stellarator.train` and `torchrun -m stellarator.train` run `__main__`.
"""
