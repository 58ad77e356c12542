# cython: freethreading_compatible = True
"""The encoder of ISA-L, for _write. A module apart: nothing else loads the library."""

from cpython.pycapsule cimport PyCapsule_New

from fastqcow cimport _core

ENCODER = PyCapsule_New(<void *>&_core.fq_encoder_isal, "fastqcow.encoder", NULL)


def version():
    return _core.fq_version_isal().decode()
