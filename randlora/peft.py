"""Adapters of PEFT's RandLora, read from its folders and written to them.

    randlora.peft.load_adapter(model, "folder-of-peft")
    randlora.inject(model, rank=32, alpha=640, basis="peft")
    randlora.peft.save_adapter(model, "folder-for-peft")

What PEFT computes and what is computed here agree to rounding; :mod:`randlora.peft_bases` says
which bases these are. PEFT has ``Λ`` as ``(r, n)`` and the scaling as ``randlora_alpha / r``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from randlora.adapters import DEFAULT, Settings, Site, check_adapter_name
from randlora.checkpoint import replacing, safetensors
from randlora.contents import Contents, FileError, MismatchError, collect, restore
from randlora.handlers import parameter_site
from randlora.patterns import modules_by_name
from randlora.peft_bases import PeftBank
from randlora.targets import names_of

__all__ = ["load_adapter", "save_adapter"]

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_BASE, _MODEL = "base_model.", "base_model.model."
_LAMBDA, _GAMMA, _A, _B = (f"randlora_{name}" for name in ("lambda", "gamma", "A", "B"))
# Which of PEFT's two flags are set.
_FLAGS = {
    "peft": {"sparse": False, "very_sparse": False},
    "peft_sparse": {"sparse": True, "very_sparse": False},
    "peft_very_sparse": {"sparse": False, "very_sparse": True},
}
ModelT = TypeVar("ModelT", bound=nn.Module)


# --- from PEFT -----------------------------------------------------------------------------------


def load_adapter(
    model: ModelT, folder: str | os.PathLike[str], *, adapter: str = DEFAULT
) -> ModelT:
    """Load what PEFT's ``save_pretrained`` wrote: adapt ``model`` so, unless it is already.

    Bases that are in the file are used. They are kept as their recipe where PEFT's rule gives them,
    as it does on a machine like the one they were drawn on, and else as they are. Without them the
    rule is all there is: for bfloat16, which PEFT uses wherever a device has it.

    Args:
        model: the plain base model, or one with an adapter of this name and of the folder's making.
        folder: with PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter: the name it is to have.

    Returns:
        ``model``.

    Raises:
        TypeError: if an argument is of the wrong type.
        FileError: if the folder holds no whole RandLora adapter, or one with trained biases.
        MismatchError: if it does not fit the model; the model is then what it was.
        OSError: if a file cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_adapter_name(adapter)
    with torch.device("cpu"):  # whatever the default device is
        config, tensors = _read(_folder(folder))
        contents = _contents(config, tensors, model)
        return restore(model, contents, adapter, check_base=False)


def _folder(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {folder!r} of type {type(folder).__name__}")
    return Path(folder)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, the configuration as PEFT's defaults complete it."""
    if not folder.is_dir():
        raise FileError(f"folder must be a folder with {_CONFIG} and {_TENSORS}, got {folder}")
    text = (folder / _CONFIG).read_bytes()
    (folder / _TENSORS).stat()  # its own error where there is nothing
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
            raise FileError(f"{folder} has {name!r}, of a foreign name or with values not finite")
    return config, tensors


def _contents(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> Contents:
    modules = dict(modules_by_name(model, remove_duplicate=False))
    aliases = names_of(model)
    names = sorted(_under(tensors, _LAMBDA))
    if not names or set(names) != _under(tensors, _GAMMA):
        raise FileError(f"{_TENSORS} must have a {_LAMBDA} and a {_GAMMA} for each of its layers")
    sites = {name: _site(modules, name) for name in names}
    for name in names:
        if len(aliases[modules[name]]) > 1:  # PEFT would adapt it under the first of its names only
            raise MismatchError(f"{name!r} is one module with {aliases[modules[name]][1:]}")
    try:
        missing = _missing(config, names, model)
        settings = {
            name: Settings.of(
                site,
                rank=config["r"],
                alpha=config["randlora_alpha"],
                dropout=config["randlora_dropout"],
                any_rank=True,
            )
            for name, site in sites.items()
        }
        bank = _bank(config, tensors, list(sites.values()))
        saved_modules = _saved(config, modules)
    except (TypeError, ValueError, LookupError, re.error) as error:
        raise FileError(f"{_CONFIG} and {_TENSORS} do not go together: {error}") from error
    if missing:
        raise MismatchError(
            f"target_modules={config['target_modules']!r} has {', '.join(missing)} in the model, "
            "but the folder has nothing for it"
        )
    numbers = {}
    for name, site in sites.items():
        lam = tensors[f"{_MODEL}{name}.{_LAMBDA}"]
        gamma = tensors[f"{_MODEL}{name}.{_GAMMA}"]
        r, n = settings[name].rank, settings[name].num_bases
        if lam.shape != (r, n) or gamma.shape != (n, site.p):
            raise MismatchError(
                f"{name!r} must have numbers of shapes {(r, n)} and {(n, site.p)} in the model, "
                f"the folder has {tuple(lam.shape)} and {tuple(gamma.shape)}"
            )
        numbers[f"{name}.weight"] = torch.cat([lam.T.float(), gamma.float()], 1)
    ours = (_LAMBDA, _GAMMA, _A, _B)
    beneath = tuple(f"{_MODEL}{name}." for name in saved_modules)
    for name in tensors:
        if not name.endswith(ours) and not name.startswith(beneath):
            raise MismatchError(f"the folder has {name!r}, which is in no module trained in full")
    return Contents(
        updates={f"{name}.weight": (site, settings[name], 0) for name, site in sites.items()},
        banks=(bank,),
        digests=(None,),
        numbers=numbers,
        base=None,
        saved={
            name.removeprefix(_MODEL): tensor
            for name, tensor in tensors.items()
            if not name.endswith(ours)
        },
        modules_to_save=tuple(saved_modules),
        version="",
    )


def _under(tensors: Mapping[str, Tensor], end: str) -> set[str]:
    """The names of the modules that have a tensor called so."""
    whole = f".{end}"
    return {
        name.removeprefix(_MODEL).removesuffix(whole)
        for name in tensors
        if name.startswith(_MODEL) and name.endswith(whole)
    }


def _site(modules: Mapping[str, nn.Module], name: str) -> Site:
    if name not in modules:
        raise MismatchError(f"the folder has an update for {name!r}, but the model has none such")
    site = parameter_site(modules[name], "weight")
    if isinstance(site, str) or not _is_peft_s(modules[name], site):
        raise MismatchError(
            f"the folder has an update for {name!r}, a {type(modules[name]).__name__} in the model"
        )
    return site


def _is_peft_s(module: nn.Module, site: Site) -> bool:
    """Whether PEFT's RandLora knows layers of this class."""
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    known = isinstance(module, nn.Linear) or "transformers.pytorch_utils.Conv1D" in names
    return known and site.parameter == "weight"


def _saved(config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> list[str]:
    """What is trained in full: modules whose names end so, by letters, and all beneath them."""
    ends = tuple(config.get("modules_to_save") or ())
    tops = [name for name in modules if name and name.endswith(ends)]
    return [name for name in modules if any(f"{name}.".startswith(f"{top}.") for top in tops)]


def _missing(config: Mapping[str, Any], names: list[str], model: nn.Module) -> list[str]:
    """The targets that PEFT would find in the model and that the folder has nothing for."""
    targets = config.get("target_modules")
    if targets is None:
        return []
    out = config.get("modules_to_save") or []
    missing = []
    for name, module in modules_by_name(model):
        site = parameter_site(module, "weight")
        known = not isinstance(site, str) and _is_peft_s(module, site)
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
    """Whether a module lies in ``layers_to_transform``, by the first number in its name."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in [rf"(?:.*?\.)?{p}" for p in patterns] or [r".*?\.[^.]*"]:
        if found := re.match(rf"{pattern}\.(\d+)\.", name):
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _bank(config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: list[Site]) -> PeftBank:
    flags = {flag: bool(config[flag]) for flag in ("sparse", "very_sparse")}
    if flags["very_sparse"]:
        flags["sparse"] = False  # as PEFT has it
    kind = next(kind for kind, wanted in _FLAGS.items() if wanted == flags)
    out, in_ = max(site.out for site in sites), max(site.in_ for site in sites)
    arguments: dict[str, Any] = {"rank": config["r"], "seed": config["projection_prng_key"]}
    sizes: dict[str, Any] = {"smaller": min(out, in_), "larger": max(out, in_)}
    a, b = (_the_one(tensors, name) for name in (_A, _B))
    if a is None or b is None:
        if a is not b or config["save_projection"]:
            raise ValueError(
                f"save_projection={config['save_projection']!r}, but not both bases are there"
            )
        return PeftBank(kind, **arguments, **sizes)
    # Drawn for these layers, or for more of them.
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
    """A base, which PEFT writes once for each layer."""
    found = [tensor for key, tensor in tensors.items() if key.endswith(f".{name}")]
    if any(not torch.equal(found[0], other) for other in found[1:]):
        raise ValueError(f"there are several different {name}")
    return found[0] if found else None


# --- to PEFT -------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    save_projection: bool = True,
) -> None:
    """Write an adapter as PEFT's ``save_pretrained`` does, for ``PeftModel.from_pretrained``.

    Args:
        model: adapted with a ``basis`` of PEFT's (``peft``, ``peft_sparse``, ``peft_very_sparse``),
            or by :func:`load_adapter`; linear layers and ``Conv1D`` only.
        folder: where to; made if it is not there. Each of its two files is replaced at once.
        adapter: which one; by default the active one.
        save_projection: whether to write the bases, once; PEFT then need not draw them, which it
            does the same on machines that are alike.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if no layer of ``model`` is adapted, or none under this name, or the adapter is
            none that PEFT could have made: other bases, layers, or numbers of bases.
        OSError: if a file cannot be written.
    """
    if not isinstance(save_projection, bool):
        raise TypeError(f"save_projection must be True or False, got {save_projection!r}")
    target = _folder(folder)
    with torch.device("cpu"):  # whatever the default device is
        contents = collect(model, adapter, None)
    bank, alpha, dropout = _common(model, contents)
    sites = [site for site, *_ in contents.updates.values()]
    out, in_ = max(site.out for site in sites), max(site.in_ for site in sites)
    smaller, larger = min(out, in_), max(out, in_)
    plain = PeftBank(bank.kind, rank=bank.rank, smaller=smaller, larger=larger, seed=bank.seed)
    if not save_projection and not bank.same_recipe(plain):
        raise ValueError(
            f"save_projection must be True for {bank!r}, which is not what PEFT would draw for "
            "these layers"
        )

    names = [name.removesuffix(".weight") for name in contents.updates]
    others = {name for name, _ in modules_by_name(model)} - {*contents.modules_to_save}
    trained = tuple(f"{name}." for name in contents.modules_to_save)
    if moved := [name for name in contents.saved if not name.startswith(trained)]:
        raise ValueError(
            "model must have changed nothing but its updates and modules_to_save, to be written "
            f"for PEFT, but {', '.join(moved)} moved; name their modules in modules_to_save"
        )
    for end in contents.modules_to_save:
        like = [n for n in others if n.endswith(end)]
        if like:
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
        # A list of names would have PEFT take every module whose name ends in one of them.
        "target_modules": "|".join(map(re.escape, names)),
        "modules_to_save": list(contents.modules_to_save) or None,
        "projection_prng_key": bank.seed,
        "save_projection": save_projection,
        **_FLAGS[bank.kind],
        "fan_in_fan_out": sites[0].transposed,
        "bias": "none",
    }
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in contents.saved.items()}
    for name in names:
        both = contents.numbers[f"{name}.weight"]
        tensors[f"{_MODEL}{name}.{_LAMBDA}"] = both[:, : bank.rank].T
        tensors[f"{_MODEL}{name}.{_GAMMA}"] = both[:, bank.rank :]
    if save_projection:
        a, b = bank.projections(smaller, larger)
        tensors[f"{_BASE}{_A}"], tensors[f"{_BASE}{_B}"] = a, b
    target.mkdir(parents=True, exist_ok=True)
    # Both are on the disk before either takes its place.
    with replacing(target / _CONFIG) as first, replacing(target / _TENSORS) as second:
        first.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        second.write(safetensors().torch.save(whole, {"format": "pt"}))


def _common(model: nn.Module, contents: Contents) -> tuple[PeftBank, float, float]:
    """What all updates must share for PEFT: the bank, alpha and dropout."""
    (bank, *others) = contents.banks
    if others or not isinstance(bank, PeftBank):
        kinds = ", ".join(map(repr, contents.banks))
        raise ValueError(
            f"model must have one bank, of a kind of PEFT's, to be written; it has {kinds}"
        )
    common, aliases = set(), names_of(model)
    modules = dict(modules_by_name(model, remove_duplicate=False))
    for name, (site, settings, _) in contents.updates.items():
        module = modules[name.rpartition(".")[0]]
        if module is modules[""] or len(aliases[module]) > 1:
            raise ValueError(
                "model must have its layers beneath it, each by one name, to be written for PEFT, "
                f"but {name!r} is also at {aliases[module]}"
            )
        if not _is_peft_s(module, site):
            raise ValueError(
                f"model must have updates of linear layers and Conv1D only, to be written for PEFT,"
                f" but has one of {name!r} in a {type(module).__name__}"
            )
        if settings.num_bases != -(-site.p // settings.rank):
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
