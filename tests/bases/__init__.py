"""Tests of ``randlora.bases``."""
