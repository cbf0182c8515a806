"""What one rendering of a template may still spend: work in units, and the length of texts.

It counts, and reads no clock: the same template and messages always end the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_UNITS = 500_000  # a message of a usual template takes some tens
MAX_CHARS = 8 << 20  # of any one text
_MAX_DEPTH = 64
_CHARS_PER_UNIT = 64


class Budget:
    """Every method raises SecurityError when the rest does not suffice."""

    def __init__(self, units: int = MAX_UNITS) -> None:
        self._units = units

    def charge(self, units: int) -> None:
        self._units -= units
        if self._units < 0:
            raise SecurityError("it does too much work")

    def pass_over(self, value: object) -> None:
        """Charges for one look at every item, or every character, of a value."""
        per_unit = _CHARS_PER_UNIT if isinstance(value, str) else 1
        self.charge(1 + (len(value) // per_unit if isinstance(value, Sized) else 0))

    def weigh(self, value: object) -> None:
        """Charges for a value's whole tree, a shared part as often as it is met."""
        stack: list[tuple[object, int]] = [(value, 0)]
        while stack:
            part, depth = stack.pop()
            self.charge(1)
            if isinstance(part, str):
                self.charge(len(part) // _CHARS_PER_UNIT)
            elif isinstance(part, Mapping | list | tuple):
                if depth >= _MAX_DEPTH:
                    raise SecurityError("its values are nested too deep")
                self.charge(len(part))
                inner: Iterable[object] = part
                if isinstance(part, Mapping):
                    inner = (side for pair in part.items() for side in pair)
                stack.extend((item, depth + 1) for item in inner)
            elif isinstance(part, Namespace):
                raise SecurityError("a namespace is used as a value")  # its tree is out of sight
            elif isinstance(part, Sized):
                self.charge(len(part))

    def grow(self, chars: int) -> None:
        """Charges for a text about to be made."""
        if chars > MAX_CHARS:
            raise SecurityError("it makes too long a text")
        self.charge(1 + chars // _CHARS_PER_UNIT)
