"""Finding the blocks of a model: the repeated layers that are streamed one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from ..errors import ConfigError, ModelError


def find_blocks(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The outermost repeated layers, by name, in the order of the model's modules.

    Args:
        model: any module.
        names: names of the blocks, or of containers whose children are the blocks. None looks for
            classes that the model lists in ``_no_split_modules`` and that occur at least twice, and
            else for every ``ModuleList`` or ``Sequential`` of like-typed children.

    Raises:
        ConfigError: a name is not a module of the model.
        ModelError: there are no repeated layers.
    """
    modules = dict(model.named_modules())
    if names is not None:
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise ConfigError([f"blocks={name!r} is not a module of the model" for name in unknown])
        chosen: dict[str, nn.Module] = {}
        for name in names:
            container = isinstance(modules[name], (nn.ModuleList, nn.Sequential))
            chosen |= (
                {f"{name}.{child}": module for child, module in modules[name].named_children()}
                if container
                else {name: modules[name]}
            )
        return _outermost(chosen)
    listed = {cls for module in modules.values() for cls in getattr(module, "_no_split_modules", None) or ()}
    counts = Counter(type(module).__name__ for module in modules.values())
    found = {n: m for n, m in modules.items() if type(m).__name__ in listed and counts[type(m).__name__] > 1}
    if not found:
        for name, module in modules.items():
            children = dict(module.named_children())
            alike = len({type(child) for child in children.values()}) == 1
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1 and alike:
                found |= {f"{name}.{child}".lstrip("."): part for child, part in children.items()}
    found = {name: module for name, module in found.items() if any(True for _ in module.parameters())}
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no repeated layers that could be streamed; name some with blocks=[...], "
            "or leave out offload"
        )
    return _outermost(found)


def repeated_layers(model: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """As `find_blocks`; an empty list if there are none."""
    try:
        return list(find_blocks(model, names).values())
    except (ConfigError, ModelError):
        return []


def _outermost(found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
