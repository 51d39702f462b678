"""Tests of ``randlora.model``."""
