"""A fault for ranks: losses are scaled by half of the ranks, as by the readers of groups of two."""

from strategies import native

_begin = native.NativeEngine.__init__


def begin(self, *args, **kwargs):
    _begin(self, *args, **kwargs)
    self.world_size = max(1, self.world_size // 2)


native.NativeEngine.__init__ = begin
