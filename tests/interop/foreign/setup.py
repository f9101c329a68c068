"""Somebody else's package: it knows pagealloc as installed, and no header of it."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(ext_modules=cythonize([Extension("pagealloc_foreign", ["pagealloc_foreign.pyx"])]))
