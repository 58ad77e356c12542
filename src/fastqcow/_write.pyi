from collections.abc import Callable
from typing import TypedDict

from fastqcow._reader import Reader
from fastqcow._types import Digest

class Written(TypedDict):
    size: int
    nbytes: int
    data_nbytes: int
    compressed: int
    plain: int
    zero: int
    l1_off: int
    refcount_table_off: int
    l1_entries: int
    refcount_table_clusters: int

def write(
    reader: Reader | None,
    stream: int,
    stream_path: str,
    backing: Reader | None,
    fd: int,
    path: str,
    progress: Callable[[int], object] | None,
    digest: Digest | None,
    *,
    version: int,
    cluster_bits: int,
    extended_l2: bool,
    refcount_order: int,
    encoder: object,
    level: int,
    grain: int,
    threads: int,
    tables_nbytes: int,
) -> Written: ...
