"""Tests of ``randlora.modules``."""
