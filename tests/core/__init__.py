"""Tests of ``randlora.core``, and of ``randlora.functional`` beside it."""
