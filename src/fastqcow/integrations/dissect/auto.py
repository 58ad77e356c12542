"""Imported for what it does: `fastqcow.integrations.dissect.install()`."""

from fastqcow.integrations.dissect import install

install()
