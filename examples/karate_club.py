"""Zachary's karate club: 34 members, 78 friendships, and the club each joined when the old one split.

Source: Zachary 1977, "An information flow model for conflict and fission in small groups", Journal of Anthropological
Research 33. Members are numbered from 0 here, from 1 there. The data are facts of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

MEMBERS = 34
CLUBS = ("Mr. Hi", "Officer")
INSTRUCTOR, OFFICER = 0, 33
# Zachary's minimum cut puts this member with the officers; he joined Mr. Hi, three weeks before his black belt test.
MISASSIGNED_BY_ZACHARY = 8

FRIENDS_ABOVE = {
    0: (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 17, 19, 21, 31),
    1: (2, 3, 7, 13, 17, 19, 21, 30),
    2: (3, 7, 8, 9, 13, 27, 28, 32),
    3: (7, 12, 13),
    4: (6, 10),
    5: (6, 10, 16),
    6: (16,),
    8: (30, 32, 33),
    9: (33,),
    13: (33,),
    14: (32, 33),
    15: (32, 33),
    18: (32, 33),
    19: (33,),
    20: (32, 33),
    22: (32, 33),
    23: (25, 27, 29, 32, 33),
    24: (25, 27, 31),
    25: (31,),
    26: (29, 33),
    27: (33,),
    28: (31, 33),
    29: (32, 33),
    30: (32, 33),
    31: (32, 33),
    32: (33,),
}
"""Each member's friends with a higher number."""

JOINED_THE_OFFICER = (9, 14, 15, 18, 20, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33)


def edges() -> list[tuple[int, int]]:
    """The 78 friendships, lower number first.

    Example:
        >>> len(edges()), edges()[0]
        (78, (0, 1))
    """
    return [(member, friend) for member, friends in FRIENDS_ABOVE.items() for friend in friends]


def adjacency(dtype: torch.dtype = torch.float32) -> Tensor:
    """`[34, 34]`, symmetric: 1 between friends, 0 elsewhere and on the diagonal."""
    a = torch.zeros(MEMBERS, MEMBERS, dtype=dtype)
    first, second = torch.tensor(edges()).unbind(1)
    a[first, second] = a[second, first] = 1
    return a


def clubs() -> Tensor:
    """`[34]`, int64: 0 for those who joined Mr. Hi's club, 1 for the officer's."""
    labels = torch.zeros(MEMBERS, dtype=torch.int64)
    labels[list(JOINED_THE_OFFICER)] = 1
    return labels
