"""Adapters of PEFT's RandLora, read from its folders and written to them.

    randlora.peft.load_adapter(model, "folder-of-peft")
    randlora.inject(model, rank=32, alpha=640, basis="peft")
    randlora.peft.save_adapter(model, "folder-for-peft")

An adapter computes the same in PEFT and here, up to rounding. Its bases are those of
:mod:`randlora.bases.peft_rule`. PEFT stores ``Λ`` as ``(r, n)``, and the scaling as
``randlora_alpha / r``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora.bases.peft_rule import PeftBank
from randlora.files.adapter_data import AdapterData
from randlora.files.checkpoint import adapter_state_dict
from randlora.files.collecting import collect
from randlora.files.errors import FileError, MismatchError
from randlora.files.restoring import restore
from randlora.files.storage import replacing, safetensors
from randlora.model.index import ModelIndex, ModelT
from randlora.model.injecting import peft_sizes
from randlora.modules.sharding import mesh_of, write_once
from randlora.modules.table import parameter_spec
from randlora.modules.weight_update import DEFAULT, Settings, WeightSpec, check_adapter_name

__all__ = ["load_adapter", "save_adapter"]

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_BASE, _MODEL = "base_model.", "base_model.model."
_LAMBDA, _GAMMA, _A, _B = (f"randlora_{name}" for name in ("lambda", "gamma", "A", "B"))

# The flags in PEFT's configuration for each kind.
_FLAGS = {
    "peft": {"sparse": False, "very_sparse": False},
    "peft_sparse": {"sparse": True, "very_sparse": False},
    "peft_very_sparse": {"sparse": False, "very_sparse": True},
}


def load_adapter(
    model: ModelT, folder: str | os.PathLike[str], *, adapter: str = DEFAULT
) -> ModelT:
    """Load an adapter that PEFT's ``save_pretrained`` wrote. A plain model is adapted for it first.

    If the folder has the bases, they are used: as a recipe, if PEFT's rule gives exactly these
    entries on this machine, else as stored entries. Without them PEFT's rule draws the bases in
    bfloat16, as PEFT does on every device that supports it.

    Args:
        model: the plain base model, or one that this folder was loaded into before.
        folder: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter: the name of the adapter in the model.

    Returns:
        ``model``.

    Raises:
        TypeError: if an argument is of the wrong type.
        FileError: if the folder has no complete RandLora adapter, or one with trained biases.
        MismatchError: if the adapter does not fit the model. The model is then unchanged.
        OSError: if a file cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_adapter_name(adapter)
    with torch.device("cpu"):  # whatever the default device is
        config, tensors = _read(_folder(folder))
        data = _adapter_data(config, tensors, ModelIndex(model))
        return restore(model, data, adapter, check_base=False)


def _folder(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {folder!r} of type {type(folder).__name__}")
    return Path(folder)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration, completed with PEFT's defaults, and the tensors."""
    if not folder.is_dir():
        raise FileError(f"folder must be a folder with {_CONFIG} and {_TENSORS}, got {folder}")
    text = (folder / _CONFIG).read_bytes()
    (folder / _TENSORS).stat()  # raises its own error if there is no file
    try:
        given = json.loads(text)
        kind = given["peft_type"]
        config = {
            "randlora_alpha": 640,
            "randlora_dropout": 0.0,
            "projection_prng_key": 0,
            "bias": "none",
            "sparse": False,
            "very_sparse": False,
            "save_projection": True,
            **given,
        }
        with safetensors().safe_open(str(folder / _TENSORS), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ImportError:
        raise
    except Exception as error:
        raise FileError(f"{folder} holds no whole adapter of PEFT: {error}") from error
    if kind != "RANDLORA":
        raise FileError(f"{folder} holds an adapter of the kind {kind!r}, not RANDLORA")
    if config["bias"] != "none":
        raise FileError(
            f"{folder} has bias={config['bias']!r}: biases were trained, which no adapter here does"
        )
    for name, tensor in tensors.items():
        if not name.startswith(_BASE) or not tensor.isfinite().all():
            raise FileError(f"{folder} has {name!r}, with infinite or NaN values or a wrong name")
    return config, tensors


def _adapter_data(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], index: ModelIndex
) -> AdapterData:
    """The adapter in a folder, after checking that it fits the model."""
    names = sorted(_under(tensors, _LAMBDA))
    if not names or set(names) != _under(tensors, _GAMMA):
        raise FileError(f"{_TENSORS} must have a {_LAMBDA} and a {_GAMMA} for each of its layers")
    specs = {name: _spec(index.modules, name) for name in names}
    for name in names:
        aliases = index.names[index.modules[name]]
        if len(aliases) > 1:  # PEFT would adapt it under the first of its names only
            raise MismatchError(f"{name!r} is one module with {aliases[1:]}")
    try:
        missing = _missing(config, names, index)
        alpha, dropout = config["randlora_alpha"], config["randlora_dropout"]
        bank = _bank(config, tensors, list(specs.values()))
        common: Any = {"rank": config["r"], "alpha": alpha, "dropout": dropout}
        settings = {name: Settings.of(spec, bank, **common) for name, spec in specs.items()}
        saved_modules = _saved(config, index.modules)
    except (TypeError, ValueError, LookupError, re.error) as error:
        raise FileError(f"{_CONFIG} and {_TENSORS} do not fit each other: {error}") from error
    if missing:
        raise MismatchError(
            f"target_modules={config['target_modules']!r} has {', '.join(missing)} in the model, "
            "but the folder has nothing for it"
        )
    numbers = {}
    for name, spec in specs.items():
        lam = tensors[f"{_MODEL}{name}.{_LAMBDA}"]
        gamma = tensors[f"{_MODEL}{name}.{_GAMMA}"]
        r, n = settings[name].rank, settings[name].num_bases
        if lam.shape != (r, n) or gamma.shape != (n, spec.p):
            raise MismatchError(
                f"{name!r} must have numbers of shapes {(r, n)} and {(n, spec.p)} in the model, "
                f"the folder has {tuple(lam.shape)} and {tuple(gamma.shape)}"
            )
        numbers[f"{name}.weight"] = torch.cat([lam.T.float(), gamma.float()], 1)
    ours = (_LAMBDA, _GAMMA, _A, _B)
    beneath = tuple(f"{_MODEL}{name}." for name in saved_modules)
    for name in tensors:
        if not name.endswith(ours) and not name.startswith(beneath):
            raise MismatchError(f"the folder has {name!r}, which is in no module trained in full")
    return AdapterData(
        updates={f"{name}.weight": (spec, settings[name], 0) for name, spec in specs.items()},
        banks=(bank,),
        digests=(None,),
        numbers=numbers,
        trained_a={},
        base=None,
        saved={n.removeprefix(_MODEL): t for n, t in tensors.items() if not n.endswith(ours)},
        modules_to_save=tuple(saved_modules),
        version="",
    )


def _under(tensors: Mapping[str, Tensor], end: str) -> set[str]:
    """The names of the modules that have a tensor with this last part of its name."""
    found = [name for name in tensors if name.startswith(_MODEL) and name.endswith(f".{end}")]
    return {name.removeprefix(_MODEL).removesuffix(f".{end}") for name in found}


def _spec(modules: Mapping[str, nn.Module], name: str) -> WeightSpec:
    if name not in modules:
        raise MismatchError(f"the folder has an update for {name!r}, but the model has none")
    spec = parameter_spec(modules[name], "weight")
    if isinstance(spec, str) or not _is_supported_by_peft(modules[name], spec):
        raise MismatchError(
            f"the folder has an update for {name!r}, a {type(modules[name]).__name__} in the model"
        )
    return spec


def _is_supported_by_peft(module: nn.Module, spec: WeightSpec) -> bool:
    """Whether PEFT's RandLora adapts layers of this class."""
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    known = isinstance(module, nn.Linear) or "transformers.pytorch_utils.Conv1D" in names
    return known and spec.parameter == "weight"


def _saved(config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules that PEFT trains in full: it compares ends of names, letter by letter."""
    ends = tuple(config.get("modules_to_save") or ())
    tops = [name for name in modules if name and name.endswith(ends)]
    return [name for name in modules if any(f"{name}.".startswith(f"{top}.") for top in tops)]


def _missing(config: Mapping[str, Any], names: list[str], index: ModelIndex) -> list[str]:
    """The layers that PEFT would adapt in this model and that the folder has no tensors for."""
    targets = config.get("target_modules")
    if targets is None:
        return []
    out = config.get("modules_to_save") or []
    missing = []
    for module, (name, *_) in index.names.items():
        spec = parameter_spec(module, "weight")
        known = not isinstance(spec, str) and _is_supported_by_peft(module, spec)
        if name in names or not known or any(f".{end}." in f".{name}." for end in out):
            continue
        if isinstance(targets, str):
            wanted = re.fullmatch(targets, name) is not None
        else:
            ends = any(name.endswith(f".{end}") for end in targets)
            wanted = name in targets or (ends and _in_layers(config, name))
        missing += [name] * wanted
    return missing


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    """Whether ``layers_to_transform`` has the first number in the name of a module."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in [rf"(?:.*?\.)?{p}" for p in patterns] or [r".*?\.[^.]*"]:
        if found := re.match(rf"{pattern}\.(\d+)\.", name):
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _bank(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], specs: list[WeightSpec]
) -> PeftBank:
    flags = {flag: bool(config[flag]) for flag in ("sparse", "very_sparse")}
    if flags["very_sparse"]:
        flags["sparse"] = False  # PEFT ignores it then
    kind = next(kind for kind, wanted in _FLAGS.items() if wanted == flags)
    arguments: dict[str, Any] = {"rank": config["r"], "seed": config["projection_prng_key"]}
    sizes: dict[str, Any] = dict(zip(("smaller", "larger"), peft_sizes(specs), strict=True))
    a, b = (_the_one(tensors, name) for name in (_A, _B))
    if a is None or b is None:
        if a is not b or config["save_projection"]:
            raise ValueError(
                f"save_projection={config['save_projection']!r}, but not both bases are there"
            )
        return PeftBank(kind, **arguments, **sizes)
    # The bases may be larger, if the model they were drawn for had larger layers.
    rank, larger, smaller = arguments["rank"], b.shape[0], a.shape[-1]
    shapes = (rank, 1, smaller), (larger, -(-smaller // rank), rank)
    fits = sizes["smaller"] <= smaller <= larger and sizes["larger"] <= larger
    if (tuple(a.shape), tuple(b.shape)) != shapes or not fits:
        raise ValueError(
            f"bases of {tuple(a.shape)} and {tuple(b.shape)} are not of rank {rank} for layers of "
            f"{sizes['larger']} x {sizes['smaller']}"
        )
    entries = a.flatten(1).float(), b.flatten(1).float()
    arguments |= {"smaller": smaller, "larger": larger}
    for dtype in ("bfloat16", "float16"):
        bank = PeftBank(kind, dtype=dtype, **arguments)
        if bank.gives(*entries):
            return bank
    return PeftBank(entries=entries, **arguments)


def _the_one(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The one base of this name, which PEFT stores once for each layer."""
    found = [tensor for key, tensor in tensors.items() if key.endswith(f".{name}")]
    if any(not torch.equal(found[0], other) for other in found[1:]):
        raise ValueError(f"all {name} must be equal, but some differ")
    return found[0] if found else None


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    save_projection: bool = True,
) -> None:
    """Write an adapter as PEFT's ``save_pretrained`` does, for ``PeftModel.from_pretrained``.

    Args:
        model: a model adapted with the ``basis`` ``peft``, ``peft_sparse`` or ``peft_very_sparse``,
            or by :func:`load_adapter`. Only linear layers and ``Conv1D`` may be adapted.
        folder: the folder to write; it is made if it does not exist. Existing files are replaced
            after both new ones are complete.
        adapter: the name of the adapter; by default the active one.
        save_projection: whether to write the bases. Without them PEFT draws them again, and gets
            the same ones on a similar machine with the same version of torch only.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if no layer of ``model`` is adapted or has this adapter, or PEFT cannot
            represent it: it has other bases, other layers, or fewer bases than full rank takes.
        OSError: if a file cannot be written.
    """
    if not isinstance(save_projection, bool):
        raise TypeError(f"save_projection must be True or False, got {save_projection!r}")
    target = _folder(folder)
    with torch.device("cpu"):  # whatever the default device is
        data = collect(model, adapter, None)
    index = ModelIndex(model)
    bank, alpha, dropout = _common(index, data)
    specs = [spec for spec, *_ in data.updates.values()]
    smaller, larger = peft_sizes(specs)
    plain = PeftBank(bank.kind, rank=bank.rank, smaller=smaller, larger=larger, seed=bank.seed)
    if not save_projection and not bank.same_recipe(plain):
        raise ValueError(
            f"save_projection must be True for {bank!r}, which is not what PEFT would draw for "
            "these layers"
        )
    names = [name.removesuffix(".weight") for name in data.updates]
    others = {name for name, *_ in index.names.values()} - {*data.modules_to_save}
    trained = tuple(f"{name}." for name in data.modules_to_save)
    if moved := [name for name in data.saved if not name.startswith(trained)]:
        raise ValueError(
            "model must have changed nothing but its updates and modules_to_save, to be written "
            f"for PEFT, but {', '.join(moved)} moved; name their modules in modules_to_save"
        )
    for end in data.modules_to_save:
        if like := [n for n in others if n.endswith(end)]:
            raise ValueError(
                f"modules_to_save must be the only ones whose names end so, to be written for "
                f"PEFT, which would take {', '.join(map(repr, like))} for {end!r} too"
            )
    config = {
        "peft_type": "RANDLORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": bank.rank,
        "randlora_alpha": alpha,
        "randlora_dropout": dropout,
        # With a list of names, PEFT would adapt every module whose name ends in one of them.
        "target_modules": "|".join(map(re.escape, names)),
        "modules_to_save": list(data.modules_to_save) or None,
        "projection_prng_key": bank.seed,
        "save_projection": save_projection,
        **_FLAGS[bank.kind],
        "fan_in_fan_out": specs[0].transposed,
        "bias": "none",
    }
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in data.saved.items()}
    for name in names:
        lam, gamma = data.trained(f"{name}.weight")
        tensors |= {f"{_MODEL}{name}.{_LAMBDA}": lam.T, f"{_MODEL}{name}.{_GAMMA}": gamma}
    if save_projection:
        a, b = bank.projections(smaller, larger)
        tensors |= {f"{_BASE}{_A}": a, f"{_BASE}{_B}": b}

    def write() -> None:
        target.mkdir(parents=True, exist_ok=True)
        # Both are complete on the disk before either replaces an old file.
        with replacing(target / _CONFIG) as first, replacing(target / _TENSORS) as second:
            first.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            second.write(safetensors().torch.save(whole, {"format": "pt"}))

    write_once(mesh_of(adapter_state_dict(model, adapter=adapter).values()), write)


def _common(index: ModelIndex, data: AdapterData) -> tuple[PeftBank, float, float]:
    """The bank, alpha and dropout, which PEFT needs to be the same for all updates."""
    (bank, *others) = data.banks
    if others or not isinstance(bank, PeftBank):
        kinds = ", ".join(map(repr, data.banks))
        raise ValueError(f"model must have one bank, of a kind of PEFT's, but it has {kinds}")
    common = set()
    for name, (spec, settings, _) in data.updates.items():
        module = index.modules[name.rpartition(".")[0]]
        if module is index.modules[""] or len(index.names[module]) > 1:
            raise ValueError(
                "model must have its layers beneath it, each by one name, to be written for PEFT, "
                f"but {name!r} is also at {index.names[module]}"
            )
        if not _is_supported_by_peft(module, spec):
            raise ValueError(
                f"model must have updates of linear layers and Conv1D only, to be written for PEFT,"
                f" but has one of {name!r} in a {type(module).__name__}"
            )
        if settings.train_a:
            raise ValueError(
                f"model must share a frozen A, to be written for PEFT, but {name!r} trains its own"
            )
        if settings.num_bases != -(-spec.p // settings.rank):
            raise ValueError(
                f"model must have ceil(p / rank) bases in each layer, to be written for PEFT, but "
                f"{name!r} has {settings.num_bases}"
            )
        common.add((settings.scaling, settings.dropout))
    if len(common) > 1:
        raise ValueError(
            "model must have one scaling and one dropout, to be written for PEFT, but has pairs "
            f"{sorted(common)}"
        )
    scaling, dropout = common.pop()
    alpha = scaling * bank.rank
    whole = round(alpha)
    return bank, whole if whole / bank.rank == scaling else alpha, dropout
