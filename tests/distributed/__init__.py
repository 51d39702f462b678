"""Tests in two processes."""
