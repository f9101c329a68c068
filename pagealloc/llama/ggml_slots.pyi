# No Python names: Cython rooms cimport the .pxd.
