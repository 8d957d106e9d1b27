"""The paper's equations as plain matrices, written from the text, value by value; nothing of the library."""

import math

import torch


def group_of(index: int, features: int, size: int, grouping: str) -> int:
    if grouping == "strided":
        return index % size
    members, larger = features // size, features % size
    for group in range(size):
        count = members + 1 if group < larger else members
        if index < count:
            return group
        index -= count
    raise AssertionError


def sharing(m: torch.Tensor, k: int, d: int, in_grouping: str, out_grouping: str) -> torch.Tensor:
    size = m.shape[0]
    length = math.ceil(k / size) * size if in_grouping == "strided" else k
    compress = torch.zeros(size, k, dtype=m.dtype)
    for j in range(length):  # padded with its own first values
        compress[group_of(j, k, size, in_grouping), j % k] += 1
    decompress = torch.zeros(d, size, dtype=m.dtype)
    for i in range(d):
        decompress[i, group_of(i, d, size, out_grouping)] = 1
    return decompress @ m @ compress


def truncation(m: torch.Tensor, k: int, d: int) -> torch.Tensor:
    size = m.shape[0]
    delta = torch.zeros(d, k, dtype=m.dtype)
    for i in range(size):
        for j in range(size):
            delta[i, j] = m[i, j]
    return delta


def rotation_matrix(block: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    matrix = torch.zeros(size, size, dtype=dtype)
    for j in range(1, size // 2 + 1):
        angle = block * 10000 ** (-2 * (j - 1) / size)
        a, b = j - 1, j - 1 + size // 2
        matrix[a, a], matrix[a, b] = math.cos(angle), -math.sin(angle)
        matrix[b, a], matrix[b, b] = math.sin(angle), math.cos(angle)
    return matrix


def blocks(m: torch.Tensor, k: int, d: int, rotate: bool) -> torch.Tensor:
    size = m.shape[0]
    count = math.ceil(k / size)
    whole = torch.zeros(count * size, k, dtype=m.dtype)  # all outputs before cutting and repeating
    for n in range(count):
        take = torch.zeros(size, k, dtype=m.dtype)
        for i in range(size):
            take[i, (n * size + i) % k] = 1
        turned = rotation_matrix(n, size, m.dtype) @ take if rotate else take
        whole[n * size : (n + 1) * size] = m @ turned
    return torch.stack([whole[i % (count * size)] for i in range(d)])


def delta_weight(operator: str, m: torch.Tensor, k: int, d: int, groupings: tuple[str, str]) -> torch.Tensor:
    """D x K."""
    if operator == "truncation":
        return truncation(m, k, d)
    if operator == "sharing":
        return sharing(m, k, d, *groupings)
    return blocks(m, k, d, rotate=operator == "rotation")
