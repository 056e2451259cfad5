"""Parallelism over torch.distributed. Modules: mesh (who is where)."""
