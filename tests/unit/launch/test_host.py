from __future__ import annotations

from launch.host import cores_of_rank


def test_ranks_that_fill_a_node_divide_its_cores() -> None:
    cores = [0, 1, 2, 3, 6, 7, 8, 9]
    mine = [cores_of_rank(cores, 2, rank, 4) for rank in range(4)]
    assert mine == [[0, 1], [2, 3], [6, 7], [8, 9]]
    assert cores_of_rank(cores, 8, 0, 1) == cores


def test_others_are_left_to_the_kernel() -> None:
    """A gang smaller than the node, or one with more threads than there are cores."""
    assert cores_of_rank([0, 1, 2, 3], 1, 0, 2) == []
    assert cores_of_rank([0, 1], 1, 3, 4) == []
