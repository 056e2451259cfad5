"""What a run on many GPUs will need and how long a step will take, before it is launched.

defines:
    Case, Stage, make_case     case.py: a recipe on a layout, or all reasons why not
    Memory, memory_of          memory.py: bytes of each pipeline rank, by kind
    Traffic, traffic_of        traffic.py: what ranks send to each other in a step
    Machine, Plan, make_plan   estimate.py: bubble and time of a step
    search                     search.py: all layouts of so many GPUs, the fastest that fit
    plan_lines, search_lines   report.py: both in words
    run                        command.py: the verb `stellarator plan`

Pure arithmetic, without torch. What the engine does is counted; how fast a machine is must be given
or is assumed, and the report says which.
"""

from stellarator.plan.case import Case, Stage, make_case
from stellarator.plan.estimate import Machine, Plan, make_plan
from stellarator.plan.memory import Memory, memory_of
from stellarator.plan.report import plan_lines, search_lines
from stellarator.plan.search import search
from stellarator.plan.traffic import Traffic, traffic_of

__all__ = [
    "Case",
    "Machine",
    "Memory",
    "Plan",
    "Stage",
    "Traffic",
    "make_case",
    "make_plan",
    "memory_of",
    "plan_lines",
    "search",
    "search_lines",
    "traffic_of",
]
