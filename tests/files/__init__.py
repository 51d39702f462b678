"""Tests of ``randlora.files``."""
