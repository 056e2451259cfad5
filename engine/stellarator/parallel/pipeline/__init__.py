"""Pipelines: consecutive layers on different ranks, micro-batches one after the other.

Modules: schedules (who does what in which order), simulate (whether that ends, when, and what it
holds), split (which layers a stage has). All of them pure arithmetic.
"""
