"""Parallelism over torch.distributed.

Modules: layout (ranks and axes, without torch), mesh (this process among all), shard (which part of
a parameter is here), tensor (before and after products that ranks share), loss (a split
vocabulary), gradients (shares made whole), gather (whole tensors of parts), pipeline (schedules as
data, their simulation, their execution), collectives (on a group, with tags), journal (what was
entered and left, for others to read), findings (who is missing), verdict (one rank says it for
all), watchdog (ends what is stuck), stragglers (who is slow), zigzag (rows cut over ranks, who
sends what), context (attention of such rows).
"""
