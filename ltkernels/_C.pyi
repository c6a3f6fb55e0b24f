# The compiled module. Its functions take integers (addresses, sizes, strides) that the callers in this package pass; csrc/bind*.cpp
# is their declaration.
from typing import Any

def __getattr__(name: str) -> Any: ...
