"""Adapting one module: its weight updates, its state, its class, and the supported classes."""
