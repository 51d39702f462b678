"""Adapters independent of a model: their data, their files, and PEFT's files."""
