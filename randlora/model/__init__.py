"""A whole model: choose weights, install adapters, switch and merge them, report on them."""
