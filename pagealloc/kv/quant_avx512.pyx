"""The loops of `quant_loops` for processors with AVX-512 (F, BW, DQ, VL); see `quant`.

Compiled with flags of its own (setup.py): only a processor that has these may import it.
"""

from cpython.pycapsule cimport PyCapsule_New

from pagealloc.kv.quant_loops cimport fill, loops_t

cdef loops_t _loops
fill(&_loops)
LOOPS = PyCapsule_New(&_loops, "pagealloc.kv.loops", NULL)
