"""No thread can be started: all is read and written all the same."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import fastqcow
from faults import Fault
from images import plain_and_compressed

IMAGE, CONTENTS = plain_and_compressed(40)


def main() -> None:
    Path("disk.qcow2").write_bytes(IMAGE)
    with Fault("pthread_create", -1, errno.EAGAIN) as fault:
        for source in ("disk.qcow2", io.BytesIO(IMAGE)):
            with fastqcow.open(source, threads=8) as image:
                assert image.read() == CONTENTS
                assert b"".join(image.pread(5000, at) for at in range(0, len(CONTENTS), 5000)) == CONTENTS
                fastqcow.convert(image, "out.raw")
                fastqcow.convert(image, "out.qcow2", format="qcow2", compress=True)
                assert Path("out.raw").read_bytes() == CONTENTS
    assert fault.calls > 10, fault.calls
    with fastqcow.open("out.qcow2") as image:
        assert image.read() == CONTENTS
    print("refused", fault.calls)


if __name__ == "__main__":
    main()
