"""Parallelism over torch.distributed.

Modules: layout (ranks and axes, without torch), mesh (this process among all),
pipeline (schedules as data, and their simulation).
"""
