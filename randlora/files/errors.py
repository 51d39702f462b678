"""The errors of loading an adapter. In each case the model was not changed."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The file holds no adapter that fits the model. The model was not changed."""


class FileError(CheckpointError):
    """The file is missing parts, damaged, or of an unknown format."""


class MismatchError(CheckpointError):
    """File and model differ in the adapted weights, their sizes or their settings."""


class BasesError(CheckpointError):
    """The bases drawn here, or those that the model has, differ from those of the file."""


class BaseModelError(CheckpointError):
    """The base weights of the model are not those that the adapter was trained on."""
