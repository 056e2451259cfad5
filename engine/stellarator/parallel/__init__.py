"""Parallelism over torch.distributed.

Modules: layout (ranks and axes, without torch), mesh (this process among all), collectives (on a
group, with tags), journal (what was entered and left, for others to read), watchdog (who is
missing), stragglers (who is slow), zigzag (rows cut over ranks, who sends what), context (attention
of such rows).
"""
