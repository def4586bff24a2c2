"""Serves models of other libraries: ``accelerate``, ``restore``, and adapters.

``accelerate`` looks up the class of every module among adapters, inspects the module, and gives it
a ``forward`` of its own (``Served``) that calls the fused functions with the module's parameters.
No library is imported, and no class is changed.
"""

from crossvit_kernels.plug_in import adapters as adapters
from crossvit_kernels.plug_in.fit import accelerate, restore
from crossvit_kernels.plug_in.recipe import register_adapter
from crossvit_kernels.plug_in.report import Report, Row
from crossvit_kernels.plug_in.served import Served

__all__ = ["Report", "Row", "Served", "accelerate", "register_adapter", "restore"]
