"""A plan to launch: of a layout that this version trains, or a refusal that says what can be launched."""

from __future__ import annotations

from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.nearest import find, what_works
from aifactory_train.plan.nodes import check_nodes
from aifactory_train.plan.plan import Plan, make_plan
from aifactory_train.plan.refuse import refuse_launch
from aifactory_train.plan.support import why_not_trainable
from aifactory_train.recipe.schema import Recipe


def make_launch_plan(
    recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int, partition: str | None, qos: str | None
) -> Plan:
    """As `make_plan`. Raises PlanError as well where training would refuse the plan, with what it would take."""
    try:
        plan = make_plan(recipe, machine, n_nodes, cpu_ranks)
    except PlanError as error:
        if n_nodes < 1 or cpu_ranks < 1:
            raise
        # Too many nodes for a job are the first thing to mend: the rest may follow from it.
        check_nodes(machine, n_nodes, partition, qos)
        if find(recipe, machine, n_nodes, cpu_ranks, to_train=True):
            raise  # the ranks have a layout: the recipe contradicts itself in something else
        # What a plan could take may be what training refuses.
        do = what_works(recipe, machine, n_nodes, cpu_ranks, to_train=True)
        raise PlanError(error.what, where=error.where, do=do or error.do) from None
    if why_not_trainable(plan.layout) is not None:
        check_nodes(machine, n_nodes, partition, qos)
        refuse_launch(recipe, machine, plan.layout, cpu_ranks)
    return plan
