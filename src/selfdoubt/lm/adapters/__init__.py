"""Adapter folders of language models: wrappers' parameters, LoRA in PEFT's own files, and exports for other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

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

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
