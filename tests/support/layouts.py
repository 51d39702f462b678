"""Matrices in the layouts that a matrix product may receive."""

import torch

LAYOUTS = ("rows", "columns", "strided")


def matrix(rows, columns, layout, dtype=torch.float64):
    """A matrix of normal numbers, stored by rows, by columns, or without a unit stride."""
    if layout == "rows":
        return torch.randn(rows, columns).to(dtype)
    if layout == "columns":
        return torch.randn(columns, rows).to(dtype).T
    return torch.randn(rows, 2 * columns).to(dtype)[:, ::2]
