"""The data of one adapter, independent of a model and of the file that it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from randlora.bases.bank import BasisBank
from randlora.bases.peft_rule import PEFT_KINDS, PeftBank
from randlora.bases.streams import FORMAT_VERSION
from randlora.core.checks import as_positive_int, as_real
from randlora.files.errors import BaseModelError, BasesError
from randlora.modules.sharding import local, whole
from randlora.modules.weight_update import Settings, WeightSpec

FORMATS = 1, 2  # 2: with a trained A
SAMPLES = 8  # entries of each base weight, by which another base model is noticed

# Names of tensors in a file: the samples, entries of PEFT's bases, copies of other tensors, trained
# `A`.
BASE, BASES, SAVED_PREFIX, A_PREFIX = RESERVED = (
    "randlora.base",
    "randlora.bases.",
    "randlora.saved.",
    "randlora.a.",
)

# The names that format 1 has for the fields of a WeightSpec. `parameter` is not stored: it is the
# last part of the name of the weight.
_SPEC_KEYS = {field.name: field.name for field in fields(WeightSpec) if field.name != "parameter"}
_SPEC_KEYS |= {"frozen_row": "kept", "unreadable": "opaque"}


@dataclass(frozen=True)
class AdapterData:
    """One adapter. Updates are found by the full name of their weight, ``blocks.0.fc.weight``."""

    updates: dict[str, tuple[WeightSpec, Settings, int]]  # the int is a position in `banks`
    banks: tuple[BasisBank, ...]
    digests: tuple[str | None, ...]  # of the bases that updates use, by bank; None if unknown
    numbers: dict[str, Tensor]  # Λ and Γ side by side, (n, r + p), or (stack, n, r + p)
    trained_a: dict[str, Tensor]  # A, (r, p) or (stack, r, p), of each update that trains it
    base: Tensor | None  # samples of base weights by name, float32, (updates, SAMPLES), or None
    saved: dict[str, Tensor]  # copies of other parameters and buffers, by the originals' names
    modules_to_save: tuple[str, ...]  # the modules that the adapter trains in full
    version: str  # of randlora when the adapter was saved

    def sizes(self, place: int) -> list[tuple[int, int, int, int]]:
        """The sizes ``r, p, q, m`` of each update that uses the bank at this position."""
        updates = self.updates.values()
        return [settings.sizes(spec) for spec, settings, bank in updates if bank == place]

    def trained(self, name: str) -> tuple[Tensor, ...]:
        """The trained tensors of an update, as :attr:`WeightUpdate.shapes` describes them."""
        numbers, rank = self.numbers[name], self.updates[name][1].rank
        own = (self.trained_a[name],) if name in self.trained_a else ()
        return numbers[..., :rank], numbers[..., rank:], *own

    def check_bases(self) -> None:
        """Draw the bases; raise :class:`BasesError` unless their digests are those of the file."""
        for place, (bank, digest) in enumerate(zip(self.banks, self.digests, strict=True)):
            if digest is None:
                continue
            try:
                found = bank.digest(self.sizes(place))
            except (RuntimeError, MemoryError) as error:  # sizes that no real adapter has
                raise BasesError(f"{bank!r} cannot be drawn here: {error}") from error
            if found != digest:
                raise BasesError(f"the bases that {bank!r} gives here are not those of the file")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a file, by the names that they have there."""
        saved = {SAVED_PREFIX + name: tensor for name, tensor in self.saved.items()}
        base = {} if self.base is None else {BASE: self.base}
        entries = (_entries(bank, place) for place, bank in enumerate(self.banks))
        bases = {name: tensor for tensors in entries for name, tensor in tensors.items()}
        own = {A_PREFIX + name: tensor for name, tensor in self.trained_a.items()}
        return {**self.numbers, **own, **saved, **bases, **base}

    def header(self) -> dict[str, Any]:
        """Everything that is not a tensor, to be stored as JSON.

        ``choices`` lists the different combinations of spec, settings and bank. ``places`` has the
        position in ``choices`` for each update, in the order of names.
        """
        choices: list[dict[str, Any]] = []
        places = []
        for name in sorted(self.updates):
            spec, settings, bank = self.updates[name]
            fields_of_spec = {key: getattr(spec, name) for name, key in _SPEC_KEYS.items()}
            choice = {**fields_of_spec, **asdict(settings), "bank": bank}
            if not settings.train_a:
                del choice["train_a"]  # earlier versions do not know it
            if choice not in choices:
                choices.append(choice)
            places.append(choices.index(choice))
        return {
            "format": FORMATS[bool(self.trained_a)],
            "version": self.version,
            "banks": [
                {**b.recipe, "digest": d} for b, d in zip(self.banks, self.digests, strict=True)
            ],
            "bases": FORMAT_VERSION,
            "choices": choices,
            "places": places,
            "modules_to_save": list(self.modules_to_save),
        }

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterData:
        """The inverse of :meth:`header` and :meth:`tensors`.

        Raises errors of any type if the parts were not made by these methods.
        """
        banks = [_bank(recipe, tensors, place) for place, recipe in enumerate(header["banks"])]
        saved = {name: t for name, t in tensors.items() if name.startswith(SAVED_PREFIX)}
        entries = {name for place, bank in enumerate(banks) for name in _entries(bank, place)}
        own = {
            name.removeprefix(A_PREFIX): t
            for name, t in tensors.items()
            if name.startswith(A_PREFIX)
        }
        known = {BASE, *saved, *entries, *(A_PREFIX + name for name in own)}
        numbers = {name: tensor for name, tensor in tensors.items() if name not in known}
        updates = {}
        for name, place in zip(sorted(numbers), header["places"], strict=True):
            choice = dict(_at(header["choices"], place))
            bank = choice.pop("bank")
            fields_of_spec = {field: choice.pop(key) for field, key in _SPEC_KEYS.items()}
            spec = WeightSpec(name.rpartition(".")[2], **fields_of_spec)
            settings = Settings(**choice)
            size = (*spec.stack_shape, settings.num_bases, settings.rank + spec.p)
            fits = numbers[name].shape == size and numbers[name].is_floating_point()
            if not fits or name.startswith(RESERVED[1:]):
                raise ValueError(f"{name!r} is not an update of the size that its choices give")
            checked = Settings.of(
                spec,
                _at(banks, bank),
                rank=settings.rank,
                dropout=settings.dropout,
                num_bases=settings.num_bases,
                train_a=settings.train_a,
                asked_rank=as_positive_int("asked_rank", settings.asked_rank),
            )
            scaling = as_real("scaling", settings.scaling)
            if replace(checked, scaling=scaling) != settings:
                raise ValueError(f"{name!r} has settings of wrong types in `choices`")
            a, size = own.get(name), (*spec.stack_shape, settings.rank, spec.p)
            fits = a is not None and a.shape == size and a.is_floating_point()
            if not (fits if settings.train_a else a is None):
                raise ValueError(f"{name!r} needs an A of shape {size} if it trains A, else none")
            updates[name] = spec, settings, bank
        if extra := own.keys() - updates.keys():
            raise ValueError(f"{A_PREFIX + min(extra)!r} is the A of no update")
        if tensors[BASE].shape != (len(updates), SAMPLES):
            raise ValueError(f"{BASE!r} must have shape {(len(updates), SAMPLES)}")
        return cls(
            updates=updates,
            banks=tuple(banks),
            digests=tuple(_texts([bank["digest"] for bank in header["banks"]])),
            numbers=numbers,
            trained_a=own,
            base=tensors[BASE],
            saved={name.removeprefix(SAVED_PREFIX): tensor for name, tensor in saved.items()},
            modules_to_save=tuple(_texts(header["modules_to_save"])),
            version=header["version"],
        )


def _entries(bank: BasisBank, place: int) -> dict[str, Tensor]:
    """The stored entries of PEFT's bases that its rule does not give, by their names in a file."""
    entries = bank.entries if isinstance(bank, PeftBank) else None
    return dict(zip((f"{BASES}{place}.a", f"{BASES}{place}.b"), entries or (), strict=False))


def _at(items: list[Any], place: Any) -> Any:
    """The item at a position, which must not be negative."""
    if not isinstance(place, int) or not 0 <= place < len(items):
        raise ValueError(f"there is no place {place!r} among {len(items)}")
    return items[place]


def _texts(items: list[Any]) -> list[str]:
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"{items!r} must be names (strings)")
    return items


def _bank(recipe: Mapping[str, Any], tensors: Mapping[str, Tensor], place: int) -> BasisBank:
    arguments = {name: value for name, value in recipe.items() if name != "digest"}
    kind = arguments.pop("kind")
    if kind not in PEFT_KINDS:
        return BasisBank(kind, **arguments)
    names = f"{BASES}{place}.a", f"{BASES}{place}.b"
    entries = (tensors[names[0]], tensors[names[1]]) if names[0] in tensors else None
    return PeftBank(kind, **arguments, entries=entries)


def samples(weight: Tensor | None, spec: WeightSpec) -> Tensor:
    """Some entries of a base weight, equal in every dtype up to rounding; zeros if unreadable."""
    known = weight is not None and type(local(weight)) in (torch.nn.Parameter, Tensor)
    if weight is None or not known or not weight.is_floating_point():
        return torch.zeros(SAMPLES)
    if weight.numel() != max(spec.stack, 1) * spec.out * spec.in_:  # packed, as 4 bits are
        return torch.zeros(SAMPLES)
    places = torch.linspace(0, weight.numel() - 1, SAMPLES, dtype=torch.float64).long()
    return whole(weight.detach()).reshape(-1)[places.to(weight.device)].float().cpu()


def check_base_weights(data: AdapterData, weights: Mapping[str, Tensor | None]) -> None:
    """Raise :class:`BaseModelError` unless the base weights are those of the adapter's training.

    Only a few entries of each are compared, up to the rounding of low precision. That is enough to
    notice another model, but not every change to the same model.
    """
    if data.base is None:
        return
    for name, theirs in zip(sorted(data.updates), data.base, strict=True):
        # Rounding changes an entry by up to 2**-8 of it (bfloat16) or by 2**-24 (small, float16).
        if name in weights and not torch.allclose(
            samples(weights[name], data.updates[name][0]), theirs, rtol=2**-7, atol=2**-23
        ):
            raise BaseModelError(
                f"the adapter was trained on another base model: {name!r} has other values; use "
                "that model, or accept this one with check_base=False (--any-base)"
            )
