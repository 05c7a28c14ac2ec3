"""Zachary's karate club: 34 members, 78 friendships, and the club each joined when the old one split.

Source: Zachary 1977, "An information flow model for conflict and fission in small groups", Journal of Anthropological
Research 33. Members are numbered from 0 here, from 1 there. The data are facts of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

MEMBERS = 34
CLUBS = ("Mr. Hi", "the officer")
INSTRUCTOR, OFFICER = 0, 33
FRIENDS_ABOVE = {
    0: {1: 4, 2: 5, 3: 3, 4: 3, 5: 3, 6: 3, 7: 2, 8: 2, 10: 2, 11: 3, 12: 1, 13: 3, 17: 2, 19: 2, 21: 2, 31: 2},
    1: {2: 6, 3: 3, 7: 4, 13: 5, 17: 1, 19: 2, 21: 2, 30: 2},
    2: {3: 3, 7: 4, 8: 5, 9: 1, 13: 3, 27: 2, 28: 2, 32: 2},
    3: {7: 3, 12: 3, 13: 3},
    4: {6: 2, 10: 3},
    5: {6: 5, 10: 3, 16: 3},
    6: {16: 3},
    8: {30: 3, 32: 3, 33: 4},
    9: {33: 2},
    13: {33: 3},
    14: {32: 3, 33: 2},
    15: {32: 3, 33: 4},
    18: {32: 1, 33: 2},
    19: {33: 1},
    20: {32: 3, 33: 1},
    22: {32: 2, 33: 3},
    23: {25: 5, 27: 4, 29: 3, 32: 5, 33: 4},
    24: {25: 2, 27: 3, 31: 2},
    25: {31: 7},
    26: {29: 4, 33: 2},
    27: {33: 4},
    28: {31: 2, 33: 2},
    29: {32: 4, 33: 2},
    30: {32: 3, 33: 3},
    31: {32: 4, 33: 4},
    32: {33: 5},
}
"""Each member's friends with a higher number, and in how many of 8 contexts inside and outside the club they met."""

JOINED_THE_OFFICER = (9, 14, 15, 18, 20, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33)


def edges() -> list[tuple[int, int]]:
    """Return the 78 friendships, lower number first.

    Example:
        >>> len(edges()), edges()[0]
        (78, (0, 1))
    """
    return [(member, friend) for member, friends in FRIENDS_ABOVE.items() for friend in friends]


def capacities() -> Tensor:
    """Return `[34, 34]`, int64, symmetric: the number of contexts in which two friends met, 0 for others."""
    c = torch.zeros(MEMBERS, MEMBERS, dtype=torch.int64)
    for member, friends in FRIENDS_ABOVE.items():
        for friend, contexts in friends.items():
            c[member, friend] = c[friend, member] = contexts
    return c


def adjacency(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `[34, 34]`, symmetric: 1 between friends, 0 elsewhere and on the diagonal."""
    return (capacities() > 0).to(dtype)


def clubs() -> Tensor:
    """Return `[34]`, int64: 0 for those who joined Mr. Hi's club, 1 for the officer's."""
    labels = torch.zeros(MEMBERS, dtype=torch.int64)
    labels[list(JOINED_THE_OFFICER)] = 1
    return labels
