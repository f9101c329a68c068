"""The loops of `quant_loops` for any processor: SSE2 on x86-64, NEON on aarch64; see `quant`.
"""

from cpython.pycapsule cimport PyCapsule_New

from pagealloc.kv.quant_loops cimport fill, loops_t

cdef loops_t _loops
fill(&_loops)
LOOPS = PyCapsule_New(&_loops, "pagealloc.kv.loops", NULL)
