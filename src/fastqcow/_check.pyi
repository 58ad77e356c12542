from collections.abc import Callable
from typing import TypedDict

from fastqcow._reader import Source

HEADER: int
REFCOUNT_TABLE: int
L1: int
SNAPSHOT_L1: int
OTHER: int
DATA: int
CORRUPTION: int
LEAK: int
CHECK_ERROR: int
OVERLAP: int
REPORTS_MAX: int

class Counts(TypedDict):
    corruptions: int
    leaks: int
    check_errors: int
    overlaps: int
    allocated_clusters: int
    compressed_clusters: int
    fragmented_clusters: int
    image_end_off: int
    not_reported: int

class Checker:
    def __init__(
        self,
        source: Source,
        report: Callable[[int, str, int | None, int | None, int | None, int | None, int | None, int], object],
        *,
        version: int,
        cluster_bits: int,
        extended_l2: bool,
        external_data: bool,
        refcount_order: int,
        refcount_table_off: int,
        refcount_table_entries: int,
    ) -> None: ...
    def use(self, role: int, host_off: int, nbytes: int, times: int) -> None: ...
    def l1(self, l1_off: int, entries: int, l1_index: int, active: int, inactive: int) -> None: ...
    def bitmap(self, table_off: int, entries: int, times: int) -> None: ...
    def finish(self) -> Counts: ...
