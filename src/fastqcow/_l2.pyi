from array import array

from fastqcow._types import Readable

UNALLOCATED: int
UNALLOCATED_ALLOC: int
ZERO: int
ZERO_ALLOC: int
DATA: int
COMPRESSED: int
INVALID: int

def sentence(kind: int) -> str: ...
def parse(table: Readable, cluster_bits: int, extended: bool, version: int) -> tuple[array[int], array[int], array[int]]: ...
