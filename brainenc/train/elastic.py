"""How many workers may be counted on while nodes are being taken away. Figures in, a number out; knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Collection

Nodes = dict[str, dict[str, float]]
"""Node -> what it has of each resource."""


def possible_workers(
    reserved: Nodes, alive: Nodes, leaving: Collection[str], *, count: Callable[[Nodes], int], least: int
) -> int:
    """Workers that the nodes which stay can hold.

    Args:
        reserved: what is set aside for the run, which may lie on nodes that leave although others have room.
        alive: everything that each node has.
        leaving: nodes on which nothing new is placed.
        count: how many workers find room in such resources.
        least: with fewer the run does not start.
    """
    found = count({node: resources for node, resources in reserved.items() if node not in leaving})
    if leaving and found < least:
        return count({node: resources for node, resources in alive.items() if node not in leaving})
    return found
