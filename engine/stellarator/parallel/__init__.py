"""Parallelism over torch.distributed.

Modules: layout (ranks and axes, without torch), mesh (this process among all), shard (which part of
a parameter is here), unfilled (parameters without memory), tensor (before and after products that
ranks share), products (these with their communication), loss (a split vocabulary), gradients
(shares made whole), buckets (flat buffers of parameters), states (what AdamW keeps), reducer (sums
beside the backward), zero (parameters gathered when used), gather (whole tensors of parts),
pipeline (schedules as data, their simulation, their execution), rows (tokens cut over ranks),
collectives (on a group, with tags), journal (what was entered and left, for others to read),
findings (who is missing), verdict (one rank says it for all), watchdog (ends what is stuck),
stragglers (who is slow), zigzag (rows cut over ranks, who sends what), context (attention of such
rows).
"""
