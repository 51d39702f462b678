"""Parameters that FSDP2 (``torch.distributed.fsdp.fully_shard``) has sharded.

FSDP keeps each parameter of a module as a ``DTensor``, of which a process holds one part, and puts
the whole one, a plain parameter, in its place while the module is called. The parameters of several
modules form a group, which is gathered at once. A parameter that joins or leaves a module after
``fully_shard`` must join or leave the group too. Torch has no public call for that: this file uses
private ones, and is the only one that does.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from randlora.modules.disabling import backward_task_id


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a ``DTensor``: a part here, the rest in other processes."""
    # By name, because importing the class takes as long as half of torch.
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, each of which must call this; else itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of it if it is not sharded."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return ``value``, which every process has, in parts like those of ``tensor``."""
    if not is_sharded(tensor) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    value = value.detach().to(device=tensor.device, dtype=tensor.dtype)
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is of a tensor subclass with numbers of its own, sharded or not."""
    return is_traceable_wrapper_subclass(local(weight))


def mesh_of(tensors: Iterable[Tensor]) -> Any:
    """Return the mesh of the first sharded tensor, or None."""
    return next((t.device_mesh for t in tensors if is_sharded(t)), None)  # type: ignore[attr-defined]


def is_fsdp_class(cls: type) -> bool:
    """Whether ``fully_shard`` (or ``replicate``) made a class and put it in front of another."""
    first = cls.__bases__[0]
    return first.__module__.startswith("torch.distributed.") and len(cls.__bases__) == 2


def _fsdp_modules(model: nn.Module) -> list[Any]:
    # Other classes that torch puts in front of a module have no groups.
    return [module for module in model.modules() if hasattr(type(module), "_get_fsdp_state")]


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back in place of gathered ones, as before the first call.

    Not in a backward, which uses the gathered ones. A hook that only reads a model may call this.
    """
    for module in [] if backward_task_id() != -1 else _fsdp_modules(model):
        for group in _groups_of(module):
            group._to_sharded()  # `module.reshard()` does nothing after an error within a call


def _groups_of(fsdp_module: Any) -> list[Any]:
    """Return the groups of a module that was sharded: objects of torch that list their members."""
    state = fsdp_module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups  # type: ignore[no-any-return]
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # in torch 2.9


class Groups:
    """The groups of a model: which one a parameter is in, and which one it would be in."""

    def __init__(self, model: nn.Module) -> None:
        self._beside: dict[tuple[nn.Module, str], Any] = {}  # the member that has a parameter
        self._above: dict[nn.Module, Any] = {}  # a member of the group of the next module above
        modules = _fsdp_modules(model)
        if modules and backward_task_id() != -1:
            raise ValueError("model must not be changed in a backward, while FSDP has gathered it")
        for module in modules:  # from the root on, so that the next one above wins
            members = [(group, one) for group in _groups_of(module) for one in group.fsdp_params]
            if members:
                self._above |= dict.fromkeys(module.modules(), members[0])
            for found in members:
                self._beside |= dict.fromkeys(_places(found[1]), found)

    def require(self, name: str, module: nn.Module) -> None:
        """Raise if a module is distributed, but not by ``fully_shard`` within the model."""
        sharded = [n for n, parameter in module._parameters.items() if is_sharded(parameter)]
        managed = vars(module).get("_is_fsdp_managed_module") and module not in self._above
        # Old versions of transformers hold parts of weights as plain tensors.
        parallel = hasattr(module, "_hf_tp_plan")
        if managed or parallel or any((module, n) not in self._beside for n in sharded):
            raise ValueError(
                f"model must contain the module that fully_shard was given, and this must have "
                f"parameters, but {name!r} is distributed otherwise; inject before fully_shard, "
                "and use no tensor parallelism"
            )

    def new_member(self, value: Tensor, module: nn.Module, beside: str) -> NewMember | None:
        """Prepare a new parameter for the group of a module; None if the module is in none.

        If the module has a parameter ``beside``, it is the group of that one.
        """
        found = self._beside.get((module, beside)) or self._above.get(module)
        return None if found is None else NewMember(value, *found)


class NewMember:
    """A new parameter for a group. What can fail is done before anything is changed."""

    def __init__(self, value: Tensor, group: Any, beside: Any) -> None:
        self.group, self._info, holder = group, type(beside._module_info), nn.Module()
        holder.parameter = nn.Parameter(value.detach().to(beside.device))
        self._member = type(beside)(
            holder.parameter,
            self._info(holder, "parameter"),
            beside.mesh_info,
            beside.post_forward_mesh_info,
            beside.device,
            None,  # sharded along the first dimension
            group.mp_policy,
            group.offload_policy,
        )
        self._member._post_load_hook_handle.remove()
        self.parameter: nn.Parameter = self._member.sharded_param

    def join(self, module: Any, name: str) -> None:
        """Let the group manage the parameter, which is registered in ``module`` as ``name``.

        If it is tied, call this once for each of its places.
        """
        member, group = self._member, self.group
        if member in group.fsdp_params:
            member._module_info.shared_modules.append(module)
            member._module_info.shared_param_names.append(name)
            return
        member._module_info = self._info(module, name)
        member._post_load_hook_handle = module.register_load_state_dict_post_hook(
            lambda *_: member.reset_sharded_param()
        )
        group.fsdp_params.append(member)


def note_trained(model: nn.Module) -> None:
    """Let the groups note which parameters are trained, after this has changed.

    FSDP notes their dtypes in its first run. Before it shares them out, it adds up gradients by
    itself; frozen parameters lose those too.
    """
    for group in (group for module in _fsdp_modules(model) for group in _groups_of(module)):
        for member in group.fsdp_params:
            if not member.sharded_param.requires_grad:
                member.unsharded_accumulated_grad = None
                if (gathered := vars(member).get("_unsharded_param")) is not None:
                    gathered.grad = None
        if hasattr(group.comm_ctx, "device_handle"):  # it has run
            group._init_mp_dtypes()


def check_dtypes(new: Iterable[NewMember], trained: Container[Tensor] = ()) -> None:
    """Raise if the parameters of one group that are trained together are not of one dtype.

    These are new ones and those of the members in ``trained``.
    """
    dtypes: dict[int, set[torch.dtype]] = {}
    for member in new:
        there = (one.sharded_param for one in member.group.fsdp_params)
        found = dtypes.setdefault(id(member.group), {p.dtype for p in there if p in trained})
        found.add(member.parameter.dtype)
    for found in dtypes.values():
        if len(found) > 1:
            raise ValueError(
                "model must have one dtype for all that is trained in a group of FSDP, but "
                f"modules_to_save and the adapter have {', '.join(sorted(map(str, found)))}; give "
                "the modules in modules_to_save to fully_shard by themselves"
            )


def leave(model: nn.Module) -> None:
    """Let groups forget parameters that their modules do not have any more."""
    for module in _fsdp_modules(model):
        for group in list(_groups_of(module)):
            for member in list(group.fsdp_params):
                if not any(name in owner._parameters for owner, name in _places(member)):
                    member._post_load_hook_handle.remove()
                    group.fsdp_params.remove(member)
            if not group.fsdp_params:  # FSDP has no empty groups
                state = module._get_fsdp_state()
                if hasattr(state, "_fsdp_param_groups"):
                    state._fsdp_param_groups.remove(group)
                else:
                    state._fsdp_param_group = None


def _places(member: Any) -> list[tuple[nn.Module, str]]:
    """Where a member of a group is registered: modules and names, several for a tied parameter."""
    info = member._module_info
    shared = zip(info.shared_modules, info.shared_param_names, strict=True)
    return [(info.module, info.param_name), *shared]


def write_once(mesh: Any, write: Any) -> None:
    """Let the first process of a mesh write a file, and raise in all of them if that fails.

    Without a mesh, each process that calls this writes.
    """
    if mesh is None:
        write()
        return
    error: BaseException | None = None
    if not any(mesh.get_coordinate()):
        try:
            write()
        except Exception as raised:
            error = raised
    errors = [error]
    for dimension in range(mesh.ndim):
        found: list[Any] = [None] * mesh.size(dimension)
        torch.distributed.all_gather_object(found, errors, group=mesh.get_group(dimension))
        errors = [one for part in found for one in part]
    if (error := next((e for e in errors if e is not None), None)) is not None:
        raise error
