"""`fastqcow check`: whether an image's tables and refcounts are sound."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from fastqcow.cli.common import Commands, add_image, add_output
from fastqcow.errors import printable

if TYPE_CHECKING:
    from fastqcow.checking import CheckResult

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "check",
        help="tell whether an image's tables and refcounts are sound",
        description="Check the tables and the refcounts of an image, and change nothing. "
        "Exit code 0: sound, 2: corrupt, 3: nothing but space is lost, 1: the check could not be completed.",
        epilog="example: fastqcow check disk.qcow2",
    )
    add_image(parser)
    add_output(parser)
    parser.add_argument("-q", dest="quiet", action="store_true", help="say nothing but errors")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastqcow.checking import Finding, check

    def report(found: Finding) -> None:
        print(printable(f"fastqcow: {found.severity}: {found}"), file=sys.stderr)

    def fields(result: CheckResult) -> dict[str, Any]:
        """qemu-img leaves out what is zero."""
        found = {
            "image-end-offset": result.image_end_off,
            "corruptions": result.corruptions,
            "leaks": result.leaks,
            "overlaps": result.overlaps,
            "total-clusters": result.total_clusters,
            "allocated-clusters": result.allocated_clusters,
            "fragmented-clusters": result.fragmented_clusters,
            "compressed-clusters": result.compressed_clusters,
        }
        kept = {name: number for name, number in found.items() if number}
        return {**kept, "check-errors": result.check_errors, "filename": arguments.image, "format": "qcow2"}

    result = check(arguments.image, report=report)
    if arguments.output == "json":
        import json

        print(json.dumps(fields(result), indent=4))
    elif not arguments.quiet:
        print("\n".join(human(result)))
    if result.not_reported:
        print(f"fastqcow: {result.not_reported} more findings are counted, but not listed", file=sys.stderr)
    if result.check_errors:
        print("fastqcow: the check could not be completed", file=sys.stderr)
        return 1
    return 2 if result.corruptions else 3 if result.leaks else 0


def human(result: CheckResult) -> list[str]:
    lines = []
    if result.corruptions:
        lines += [f"\n{result.corruptions} errors were found on the image."]
        lines += ["Data may be corrupted, or further writes to the image may corrupt it."]
    if result.leaks:
        lines += [f"\n{result.leaks} leaked clusters were found on the image."]
        lines += ["This means waste of disk space, but no harm to data."]
    if result.check_errors:
        lines += [f"\n{result.check_errors} internal errors have occurred during the check."]
    if result.overlaps:
        lines += [f"\n{result.overlaps} clusters are in use for different things at once."]
    lines = lines or ["No errors were found on the image."]
    if result.total_clusters and result.allocated_clusters:
        total, allocated = result.total_clusters, result.allocated_clusters
        lines += [
            f"{allocated}/{total} = {allocated * 100 / total:0.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:0.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:0.2f}% compressed clusters"
        ]
    if result.image_end_off:
        lines += [f"Image end offset: {result.image_end_off}"]
    return lines
