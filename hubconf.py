"""Entry points of ``torch.hub``: the names of ``crossvit.list_models``.

``torch.hub.load(repository, "crossvit_15_240", pretrained=True)`` takes the arguments of
``crossvit.create_model``. A repository that is only downloaded has no compiled kernels: on a CPU,
``use_fused=True`` then runs the reference.
"""

import functools as _functools

import crossvit as _crossvit

dependencies = ["torch", "numpy"]


def _entrypoint(name):
    @_functools.wraps(_crossvit.create_model)
    def make(*args, **options):
        return _crossvit.create_model(name, *args, **options)

    make.__name__ = make.__qualname__ = name
    return make


globals().update({name: _entrypoint(name) for name in _crossvit.list_models()})
