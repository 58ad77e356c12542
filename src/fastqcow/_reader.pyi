from collections.abc import Callable, Sequence
from typing import TypedDict

from fastqcow._types import BinaryFile, Digest, Writable

UNALLOCATED: int
UNALLOCATED_ALLOC: int
ZERO: int
ZERO_ALLOC: int
DATA: int
COMPRESSED: int
LIBZ: object
ZSTD: object

class Stats(TypedDict):
    clusters_inflated: int
    cache_hits: int
    bytes_fetched: int
    bytes_returned: int

class Source:
    @property
    def path(self) -> str: ...
    @property
    def has_path(self) -> bool: ...
    @property
    def size(self) -> int: ...
    @staticmethod
    def from_fd(fd: int, path: str, has_path: bool, seek_holes: bool) -> Source: ...
    @staticmethod
    def from_file(file: BinaryFile, path: str, has_path: bool) -> Source: ...
    def identity(self) -> object: ...
    def pread(self, nbytes: int, host_off: int) -> bytes: ...

class Crypt:
    def __init__(
        self,
        mode: str,
        vectors: str,
        block_nbytes: int,
        *,
        by_guest_off: bool,
        data: Callable[[bytes], bytes],
        counters: Callable[[bytes], bytes],
        tweaks: Callable[[bytes], bytes] | None,
        vector_keys: Callable[[bytes], bytes] | None,
    ) -> None: ...
    def decrypt(self, data: bytes, sector: int) -> bytes: ...

class Reader:
    @property
    def source(self) -> Source: ...
    @property
    def data(self) -> Source: ...
    @property
    def backing(self) -> Reader | None: ...
    @property
    def size(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @staticmethod
    def raw(
        source: Source, size: int, *, threads: int, largest_cluster: int, cluster_cache_nbytes: int, table_cache_nbytes: int
    ) -> Reader: ...
    @staticmethod
    def qcow2(
        source: Source,
        data: Source | None,
        backing: Reader | None,
        sibling: Reader | None,
        crypt: Crypt | None,
        *,
        version: int,
        cluster_bits: int,
        extended_l2: bool,
        codec: int,
        size: int,
        l1_off: int,
        l1_entries: int,
        threads: int,
        largest_cluster: int,
        cluster_cache_nbytes: int,
        table_cache_nbytes: int,
    ) -> Reader: ...
    def pread(self, nbytes: int, guest_off: int) -> bytes: ...
    def preadv(self, buffers: Sequence[Writable], guest_off: int) -> int: ...
    def extents(self, guest_off: int, end: int, capacity: int) -> list[tuple[int, int, int | None, int, int]]: ...
    def export(
        self,
        fd: int,
        path: str,
        grain: int,
        reads_zero: bool,
        offload: bool,
        progress: Callable[[int], object] | None,
        digest: Digest | None,
    ) -> int: ...
    def stats(self) -> Stats: ...
