"""Adapter folders of language models: wrappers' parameters, LoRA in PEFT's own files, and exports for other tools."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.lm.adapters.adapter import AdapterFolder, check_adapter, load_adapter, read_adapter, save_adapter
    from selfdoubt.lm.adapters.export import export_merged, export_peft
    from selfdoubt.lm.adapters.lora import add_lora, load_lora, merge_lora, save_lora

_HOMES = {
    "AdapterFolder": "adapter",
    "add_lora": "lora",
    "check_adapter": "adapter",
    "export_merged": "export",
    "export_peft": "export",
    "load_adapter": "adapter",
    "load_lora": "lora",
    "merge_lora": "lora",
    "read_adapter": "adapter",
    "save_adapter": "adapter",
    "save_lora": "lora",
}

__all__ = [
    "AdapterFolder",
    "add_lora",
    "check_adapter",
    "export_merged",
    "export_peft",
    "load_adapter",
    "load_lora",
    "merge_lora",
    "read_adapter",
    "save_adapter",
    "save_lora",
]


def __getattr__(name: str) -> Any:
    # Lazy, because exports and LoRA are needed by few.
    if name in _HOMES:
        return getattr(import_module(f"selfdoubt.lm.adapters.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'selfdoubt.lm.adapters' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
