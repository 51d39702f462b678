"""Computes ΔW and its products on tensors. Imports no other subpackage of randlora."""
