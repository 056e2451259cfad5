"""Pipelines: consecutive layers on different ranks, micro-batches one after the other.

Modules: schedules (who does what in which order), simulate (whether that ends, when, and what it
holds), split (which layers a stage has), all pure arithmetic; execute (a schedule on real
processes), deferred (weight gradients that are made later).
"""
