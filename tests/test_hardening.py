"""The modules as they were built, by their ELF files: what makes errors in the core harder to make use of is in them."""

from __future__ import annotations

import importlib
import platform
import struct
import sys
import sysconfig
from pathlib import Path

import pytest

import fastqcow
from capabilities import need_glibc

MODULES = ("_check", "_inflate", "_l2", "_reader", "_write", *(["_isal"] if fastqcow.build_info().isal else []))
PT_DYNAMIC, PT_NOTE, PT_GNU_STACK, PT_GNU_RELRO = 2, 4, 0x6474E551, 0x6474E552
PF_X = 1
DT_FLAGS, DT_FLAGS_1 = 30, 0x6FFFFFFB
SHT_DYNSYM = 11
DF_BIND_NOW, DF_1_NOW = 8, 1
NT_GNU_PROPERTY, X86_FEATURE_1, X86_SHSTK = 5, 0xC0000002, 2
ENDBR64, PACIASP, BTI_C = b"\xf3\x0f\x1e\xfa", b"\x3f\x23\x03\xd5", b"\x5f\x24\x03\xd5"


class Elf:
    """A shared object of 64 bits."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        if self.data[:4] != b"\x7fELF":
            pytest.skip("the modules of this system are no ELF files")
        assert self.data[4] == 2, "not of 64 bits"
        self.order = "<" if self.data[5] == 1 else ">"
        (off,) = self.unpack("Q", 32)
        size, count = self.unpack("HH", 54)
        self.headers = [self.unpack("IIQQQQQQ", off + i * size) for i in range(count)]  # type, flags, off, addr, _, nbytes, ...

    def unpack(self, fields: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + fields, self.data, at)

    def segments(self, kind: int) -> list[tuple[int, ...]]:
        return [header for header in self.headers if header[0] == kind]

    def file_off(self, address: int) -> int:
        return next(h[2] + address - h[3] for h in self.segments(1) if h[3] <= address < h[3] + h[5])

    def dynamic(self) -> dict[int, int]:
        (header,) = self.segments(PT_DYNAMIC)
        entries = (self.unpack("QQ", header[2] + at) for at in range(0, header[5], 16))
        return {tag: value for tag, value in entries if tag}

    def symbols(self) -> dict[str, int]:
        """What the module takes from others, and gives to them, with its address."""
        (sections_off,), (size, count) = self.unpack("Q", 40), self.unpack("HH", 58)
        sections = [self.unpack("IIQQQQIIQQ", sections_off + i * size) for i in range(count)]  # name, type, _, _, off, nbytes, link
        table = next(section for section in sections if section[1] == SHT_DYNSYM)
        names = sections[table[6]][4]
        found = {}
        for at in range(table[4], table[4] + table[5], 24):
            name, _, _, _, value, _ = self.unpack("IBBHQQ", at)
            found[self.data[names + name : self.data.index(0, names + name)].decode()] = value
        return found

    def properties(self) -> dict[int, int]:
        """The first words of the properties in the GNU notes."""
        found = {}
        for header in self.segments(PT_NOTE):
            at, end = header[2], header[2] + header[5]
            align = 8 if header[7] == 8 else 4
            while at < end:
                name_nbytes, nbytes, kind = self.unpack("III", at)
                start = at + 12 + (name_nbytes + 3 & ~3)
                if kind == NT_GNU_PROPERTY and self.data[at + 12 : at + 16] == b"GNU\0":
                    each = start
                    while each < start + nbytes:
                        what, size, value = self.unpack("III", each)
                        found[what] = value
                        each += 8 + (size + 7 & ~7)
                at = start + (nbytes + align - 1 & -align)
        return found


def load(name: str) -> Elf:
    path = importlib.import_module(f"fastqcow.{name}").__file__
    assert path is not None
    return Elf(Path(path))


@pytest.fixture(params=MODULES)
def elf(request: pytest.FixtureRequest) -> Elf:
    return load(request.param)


def test_these_are_all_modules() -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    found = {path.name.removesuffix(suffix) for path in Path(fastqcow.__file__).parent.glob(f"*{suffix}")}
    assert found == set(MODULES)


def test_addresses_of_functions_cannot_be_written(elf: Elf) -> None:
    """All are looked up when the module is loaded, and their table is read-only from then on."""
    dynamic = elf.dynamic()
    assert dynamic.get(DT_FLAGS, 0) & DF_BIND_NOW or dynamic.get(DT_FLAGS_1, 0) & DF_1_NOW
    assert len(elf.segments(PT_GNU_RELRO)) == 1


def test_no_code_on_the_stack_nor_in_data(elf: Elf) -> None:
    (stack,) = elf.segments(PT_GNU_STACK)
    assert not stack[1] & PF_X
    assert not any(flags & 2 and flags & PF_X for kind, flags, *_ in elf.headers if kind == 1)


def test_stack_frames_are_guarded(elf: Elf) -> None:
    assert "__stack_chk_fail" in elf.symbols()


def test_calls_of_libc_are_checked() -> None:
    need_glibc()
    symbols = {name for module in MODULES for name in load(module).symbols()}
    if any(name.startswith(("__asan_init", "__tsan_init", "__ubsan_handle")) for name in symbols):
        pytest.skip("built for a sanitizer, which checks these calls itself")
    assert {name for name in symbols if name.endswith("_chk")} & {"__memcpy_chk", "__memset_chk", "__memmove_chk"}


def test_control_flow_is_guarded(elf: Elf) -> None:
    """The shadow stack can be switched on, and where a function may be called by its address there is a mark."""
    (entry,) = (address for name, address in elf.symbols().items() if name.startswith("PyInit_"))
    start = elf.data[elf.file_off(entry) :][:4]
    if platform.machine() == "x86_64":
        assert elf.properties()[X86_FEATURE_1] & X86_SHSTK
        assert start == ENDBR64
    elif platform.machine() == "aarch64":
        assert start in (PACIASP, BTI_C)
    else:
        pytest.skip(f"the compiler has nothing of the kind for {sys.platform} on {platform.machine()}")
