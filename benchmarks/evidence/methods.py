"""The methods that are compared: how each adapts the linear layers of a model, of what size.

The *size* of a method is its rank, or what its paper has in place of one. ``size_for`` finds the
size with which a method trains as many numbers as LoRA of some rank.

Libraries give what they have: this package, and PEFT. What neither has is written here from the
papers' equations, as a parametrization that adds ``ΔW`` to a weight: simple, not fast.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import randlora

Shape = tuple[int, int]  # out, in

# --- from libraries ------------------------------------------------------------------------------


def use_randlora(
    model: nn.Module,
    names: Sequence[str],
    rank: int,
    seed: int,
    *,
    basis: str = "isometric",
    sparsity: float | None = None,
    train_a: bool = False,
) -> None:
    """This package."""
    randlora.inject(
        model,
        rank,
        target_modules=list(names),
        basis=randlora.BasisBank("sparse" if sparsity else basis, seed=seed, sparsity=sparsity),
        train_a=train_a,
        modules_to_save=[],
    )


def use_half(model: nn.Module, names: Sequence[str], bases: int, seed: int) -> None:
    """So many bases that together have half of full rank: RandLoRA-b (section 6.3)."""
    bank = randlora.BasisBank("dense", seed=seed)
    for name in names:
        layer = model.get_submodule(name)
        rank = half_rank(*layer.weight.shape, bases)
        made = randlora.RandLoRALinear.from_linear(layer, rank=rank, num_bases=bases, bank=bank)
        model.set_submodule(name, made)


def use_peft(
    model: nn.Module, names: Sequence[str], size: int, seed: int, *, config: str, **settings: object
) -> None:
    """PEFT's adapter with this configuration. LoRA has rsLoRA's scaling, ``α / √r`` with α = r."""
    import peft

    made_for = {
        "LoraConfig": {"lora_alpha": size, "use_rslora": True},
        "VeraConfig": {"projection_prng_key": seed},
        "ShiraConfig": {"random_seed": seed},  # a mask for each shape
    }
    settings = {**made_for.get(config, {}), **settings}
    made = getattr(peft, config)(r=size, target_modules=list(names), **settings)
    torch.manual_seed(seed)
    peft.get_peft_model(model, made)  # adapts the layers in place; the model around it is not used


def use_prompt(model: nn.Module, names: Sequence[str], size: int, seed: int) -> None:
    """PEFT's prompt tuning of ``model.encoder``: as many embeddings before the tokens."""
    import peft

    config = peft.PromptTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=size,
        prompt_tuning_init="SAMPLE_VOCAB",
    )
    torch.manual_seed(seed)
    model.encoder = peft.get_peft_model(model.encoder, config)


def use_full(model: nn.Module, names: Sequence[str], size: int, seed: int) -> None:
    for name in names:
        model.get_submodule(name).weight.requires_grad_(True)


# --- from papers ---------------------------------------------------------------------------------


class Update(nn.Module, ABC):
    """A parametrization ``W0 + ΔW``. A subclass has the shape ``q × p`` of a tall ``ΔW``."""

    def __init__(self, weight: Tensor, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.wide = weight.shape[0] < weight.shape[1]
        self.p, self.q = sorted(weight.shape)
        self.build(weight.detach(), size, generator)

    @abstractmethod
    def build(self, weight: Tensor, size: int, generator: torch.Generator) -> None:
        """Make the parameters, so that ``ΔW = 0``."""

    @abstractmethod
    def delta(self) -> Tensor:
        """The tall ``ΔW``, ``(q, p)``."""

    def forward(self, weight: Tensor) -> Tensor:
        delta = self.delta()
        return weight + (delta.T if self.wide else delta).to(weight.dtype)


@lru_cache(maxsize=8)
def shared_matrices(
    seed: int, count: int, left: int, right: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return draw(count, left).to(device, dtype), draw(count, right).to(device, dtype)


class NoLA(Update):
    """``ΔW = (Σ_i β_i B_i)(Σ_i α_i A_i)``, rank 16, α and β trained (arXiv 2310.02556, equation 4).

    All layers of one shape share the random matrices.
    """

    rank = 16

    def build(self, weight: Tensor, size: int, generator: torch.Generator) -> None:
        sides = self.q * self.rank, self.rank * self.p
        self.drawn = partial(shared_matrices, generator.initial_seed(), size, *sides)
        # A's entries start with the variance 1 / p, as LoRA's do; B starts at 0.
        alpha = torch.randn(size, generator=generator) / math.sqrt(size * self.p)
        self.alpha, self.beta = nn.Parameter(alpha), nn.Parameter(torch.zeros(size))

    def delta(self) -> Tensor:
        # Autocast would copy the matrices in each layer and keep the copies for backward.
        device = self.beta.device
        low = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if low else self.beta.dtype
        b, a = self.drawn(device, dtype)
        return (self.beta @ b).view(self.q, -1) @ (self.alpha @ a).view(-1, self.p)


class KRAdapter(Update):
    """The column c is ``u_c ⊗ v_c``, with about ``√q`` numbers in each (arXiv 2508.00230)."""

    @staticmethod
    def sides(q: int) -> Shape:
        first = math.isqrt(q)
        return first, -(-q // first)

    def build(self, weight: Tensor, size: int, generator: torch.Generator) -> None:
        first, second = self.sides(self.q)
        v = (2 * torch.rand(self.p, 1, second, generator=generator) - 1) / math.sqrt(second)
        self.u, self.v = nn.Parameter(torch.zeros(self.p, first, 1)), nn.Parameter(v)

    def delta(self) -> Tensor:
        return (self.u * self.v).flatten(1)[:, : self.q].T


class Sum(Update):
    """``Σ_j B_j Λ_j A_j Γ_j`` for given bases, with the package's start and scaling."""

    mean = 1  # how many of the sum add up in one direction, beside a sum of independent ones

    def build(self, weight: Tensor, size: int, generator: torch.Generator) -> None:
        size = min(size, self.p)
        self.n = self.number(size)
        a, b = self.bases(weight, size, generator)
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)
        self.lam = nn.Parameter(torch.ones(self.n, b.shape[1] // self.n))
        self.gamma = nn.Parameter(torch.zeros(self.n, self.p))
        self.scaling = randlora.BasisBank().default_scaling(self.q, self.p, self.n) / self.mean

    def number(self, size: int) -> int:
        """How many bases there are, by default for full rank."""
        return -(-self.p // size)

    @abstractmethod
    def bases(self, weight: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``A``, ``(r, p)`` or ``(n, r, p)``, and ``B``, ``(q, n r)``, of unit variance."""

    def delta(self) -> Tensor:
        c = self.lam[:, :, None] * self.a * self.gamma[:, None, :]
        return self.scaling * (self.b @ c.flatten(0, 1))


class Averaged(Sum):
    """RandLoRA-a (section 6.3): ``(Σ_j B_j Λ_j)(Σ_j A_j Γ_j)``, of LoRA's rank and count."""

    def number(self, size: int) -> int:
        return averaged_bases(self.q, self.p, size)

    def bases(self, weight: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        self.mean = self.n
        draw = partial(torch.randn, generator=generator)
        return draw(self.n, size, self.p), draw(self.q, self.n * size)

    def delta(self) -> Tensor:
        b = (self.b.unflatten(1, self.lam.shape) * self.lam).sum(1)
        return self.scaling * (b @ (self.a * self.gamma[:, None, :]).sum(0))


class Ternary(Sum):
    """Both bases are sparse: an entry is ``±1`` with probability ``2 / s``, else 0 (section 6.4).

    In this package ``A`` stays dense.
    """

    def __init__(
        self, weight: Tensor, size: int, generator: torch.Generator, sparsity: int
    ) -> None:
        self.sparsity = sparsity
        super().__init__(weight, size, generator)

    def bases(self, weight: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def draw(*shape: int) -> Tensor:
            uniform = torch.rand(shape, generator=generator)
            signs = (uniform < 1 / self.sparsity).float() - (
                uniform > 1 - 1 / self.sparsity
            ).float()
            return signs * math.sqrt(self.sparsity / 2)  # of unit variance

        return draw(size, self.p), draw(self.q, self.n * size)


def singular(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The singular vectors: on the long side in columns, on the short in rows, of unit variance."""
    long, _, short = torch.linalg.svd(weight if weight.shape[0] >= weight.shape[1] else weight.T)
    p = short.shape[0]
    return long[:, :p] * math.sqrt(long.shape[0]), short * math.sqrt(p)


class SingularB(Sum):
    """``B`` from singular vectors of the frozen weight, ``A`` random.

    The bases take the vectors in turns, so that each has some of large and of small values.
    """

    def bases(self, weight: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        long, _ = singular(weight)
        turns = torch.arange(self.n * size) % self.p  # a last basis that is too large begins anew
        places = turns.view(size, self.n).T.flatten()  # the first vector of each basis, the second
        return torch.randn(size, self.p, generator=generator), long[:, places]


class SingularBoth(SingularB):
    """And ``A`` from the first right singular vectors."""

    def bases(self, weight: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        _, b = super().bases(weight, size, generator)
        return singular(weight)[1][:size], b


class Overcomplete(Sum):
    """Three quarters of the bases, and the rank with which these train as many numbers."""

    @staticmethod
    def smaller(p: int, size: int) -> tuple[int, int]:
        """The number of bases and their rank."""
        n = -(-p // size)
        fewer = max(1, 3 * n // 4)
        return fewer, n * (size + p) // fewer - p

    def bases(self, weight: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        self.n, rank = self.smaller(self.p, size)
        draw = partial(torch.randn, generator=generator)
        return draw(rank, self.p), draw(self.q, self.n * rank)


class Hybrid(Sum):
    """RandLoRA and a LoRA of rank 2, added (section 6.6)."""

    rank = 2

    def bases(self, weight: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        draw = partial(torch.randn, generator=generator)
        self.first = nn.Parameter(draw(self.rank, self.p) / math.sqrt(self.p))
        self.second = nn.Parameter(torch.zeros(self.q, self.rank))
        return draw(size, self.p), torch.linalg.qr(draw(self.q, self.p))[0].mul(math.sqrt(self.q))[
            :, torch.arange(self.n * size) % self.p
        ]

    def delta(self) -> Tensor:
        return super().delta() + self.second @ self.first


def use_update(
    model: nn.Module, names: Sequence[str], size: int, seed: int, *, kind: Callable[..., Update]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        layer = model.get_submodule(name)
        made = kind(layer.weight, size, generator).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", made)
        layer.parametrizations.weight.original.requires_grad_(False)


# --- the table -----------------------------------------------------------------------------------


def per_rank(out: int, into: int, size: int) -> int:
    return size * (out + into)


def bases_of(out: int, into: int, size: int) -> int:
    p = min(out, into)
    size = min(size, p)
    return -(-p // size) * (size + p)


def averaged_bases(out: int, into: int, rank: int) -> int:
    """As many bases of this rank as train what LoRA does."""
    return max(1, round(per_rank(out, into, rank) / (rank + min(out, into))))


def half_rank(out: int, into: int, bases: int) -> int:
    return max(1, round(min(out, into) / 2 / bases))


def half_bases(out: int, into: int, bases: int) -> int:
    return bases * (half_rank(out, into, bases) + min(out, into))


def overcomplete_bases(out: int, into: int, size: int) -> int:
    p = min(out, into)
    n, rank = Overcomplete.smaller(p, min(size, p))
    return n * (rank + p)


@dataclass(frozen=True)
class Method:
    """A method: how it is called, what it trains in a layer, and how it adapts a model."""

    title: str
    count: Callable[[int, int, int], int]  # numbers in a layer out × in of some size
    adapt: Callable[[nn.Module, Sequence[str], int, int], None]  # model, layers, size, seed
    fixed: int | None = None  # its size, if the count of LoRA is out of reach


def peft(
    title: str,
    config: str,
    count: Callable[..., int] = per_rank,
    fixed: int | None = None,
    **settings: object,
) -> Method:
    return Method(title, count, partial(use_peft, config=config, **settings), fixed)


def ours(title: str, **settings: object) -> Method:
    return Method(title, bases_of, partial(use_randlora, **settings))


def update(
    title: str,
    kind: Callable[..., Update],
    count: Callable[..., int] = bases_of,
    fixed: int | None = None,
) -> Method:
    return Method(title, count, partial(use_update, kind=kind), fixed)


ZEROS = {66: 6, 93: 28, 98: 100, 99: 200}  # percent, and the sparsity s: 1 - 2 / s
METHODS = {
    "head": Method("head only", lambda out, into, size: 0, lambda *_: None, 0),
    "full": Method("full fine-tuning", lambda o, i, size: o * i, use_full, 0),
    "lora": peft("LoRA", "LoraConfig"),
    "lora 1": peft("LoRA, scaling 1", "LoraConfig", use_rslora=False),
    "dora": peft("DoRA", "LoraConfig", lambda o, i, size: size * (o + i) + o, use_dora=True),
    "hira": peft("HiRA", "HiraConfig"),
    "shira": peft("SHiRA", "ShiraConfig"),
    "vera": peft("VeRA", "VeraConfig", lambda o, i, size: size + o, 1024),
    "nola": update("NoLA", NoLA, lambda out, into, size: 2 * size, 1024),
    "kradapter": update(
        "KRAdapter",
        KRAdapter,
        lambda o, i, size: min(o, i) * sum(KRAdapter.sides(max(o, i))),
        0,
    ),
    # What it trains lies in no layer.
    "prompt": Method("prompt tuning", lambda out, into, size: 0, use_prompt, 32),
    "isometric": ours("RandLoRA, isometric"),
    "dense": ours("RandLoRA, uniform", basis="dense"),
    "normal": ours("RandLoRA, normal", basis="normal"),
    "binary": ours("RandLoRA, binary", basis="binary"),
    **{
        f"sparse {zeros}": ours(f"`B` {zeros} % zeros", sparsity=sparsity)
        for zeros, sparsity in ZEROS.items()
    },
    **{
        f"ternary {zeros}": update(
            f"`B` and `A` {zeros} % zeros", partial(Ternary, sparsity=sparsity)
        )
        for zeros, sparsity in ZEROS.items()
    },
    "randlora a": update(
        "RandLoRA-a",
        Averaged,
        lambda out, into, r: averaged_bases(out, into, r) * (r + min(out, into)),
    ),
    "randlora b": Method("RandLoRA-b", half_bases, use_half),
    "trained A": Method(
        "RandLoRA, A trained",
        lambda out, into, size: bases_of(out, into, size) + size * min(out, into),
        partial(use_randlora, train_a=True),
    ),
    "singular B": update("B of singular vectors", SingularB),
    "singular": update("B and A of singular vectors", SingularBoth),
    "overcomplete": update("fewer bases, larger rank", Overcomplete, overcomplete_bases),
    "hybrid": update(
        "RandLoRA and LoRA", Hybrid, lambda o, i, size: bases_of(o, i, size) + Hybrid.rank * (o + i)
    ),
}


def layers(model: nn.Module) -> dict[str, Shape]:
    """Names and shapes of the linear layers that are adapted: all but the head."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("head")
    }


def total(method: str, shapes: Iterable[Shape], size: int) -> int:
    """What a method trains in layers of these shapes."""
    return sum(METHODS[method].count(*shape, size) for shape in shapes)


def size_for(method: str, shapes: Sequence[Shape], rank: int) -> int:
    """The size at which the method trains as many numbers as LoRA of this rank, or nearly so."""
    if (fixed := METHODS[method].fixed) is not None:
        return fixed
    wanted, widest = total("lora", shapes, rank), max(map(max, shapes))
    return min(range(1, widest + 1), key=lambda size: abs(total(method, shapes, size) - wanted))


def adapt(model: nn.Module, method: str, size: int, seed: int) -> None:
    """Freeze the model and adapt its linear layers but the head."""
    model.requires_grad_(False)
    METHODS[method].adapt(model, list(layers(model)), size, seed)
