"""Builds the Cython core; everything else is said in pyproject.toml.

Every ``.pyx`` under ``pagealloc/`` becomes one extension module of the same name.  Environment
variables choose another build, kept in a folder of its own under ``build/``:

``PAGEALLOC_SANITIZE=address|thread|undefined``
    instrument with that sanitizer.
``PAGEALLOC_LINETRACE=1``
    let coverage see Cython lines.
``PAGEALLOC_UNOBSERVED=1``
    leave out what profilers of the heap and of contention hook into: what a test compares with.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SANITIZERS = ("address", "thread", "undefined")
DIRECTIVES = {
    "language_level": 3,
    "binding": True,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
}
# Compiled against NumPy's C API, of which no more is used than the oldest NumPy supported has.
NUMPY_MODULES = (
    "pagealloc.core.numpy_handler",
    "pagealloc.kv.batch_rows",
    "pagealloc.kv.quant",
    "pagealloc.kv.row_arrays",
    "pagealloc.kv.row_copy",
    "pagealloc.kv.sequence_arrays",
    "pagealloc.kv.sequence_rows",
    "pagealloc.kv.token_positions",
    "pagealloc.kv.window_rows",
)
# Loops for processors that not every machine has: imported only where they can run.
CPU_FLAGS = {
    "pagealloc.kv.quant_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "pagealloc.kv.quant_avx512": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
    ],
}
NUMPY_MACROS = [
    ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION"),  # 1.26's as well
    ("NPY_NO_DEPRECATED_API", "NPY_1_25_API_VERSION"),
]

sanitizer = os.environ.get("PAGEALLOC_SANITIZE", "")
linetrace = os.environ.get("PAGEALLOC_LINETRACE", "") not in ("", "0")
unobserved = os.environ.get("PAGEALLOC_UNOBSERVED", "") not in ("", "0")
if sanitizer and sanitizer not in SANITIZERS:
    sys.exit(f"PAGEALLOC_SANITIZE={sanitizer!r}: expected one of {', '.join(SANITIZERS)}")
names = [sanitizer, "linetrace" if linetrace else "", "unobserved" if unobserved else ""]
flavour = "-".join(filter(None, names))

compile_args = ["-std=c11", "-pthread", "-fvisibility=hidden"]
# A call of an undeclared function compiles with a warning, and then cuts its pointers to 32 bits.
compile_args += ["-Werror=implicit-function-declaration"]
link_args = ["-pthread"]
macros: list[tuple[str, str | None]] = [("_GNU_SOURCE", None)]
if sanitizer:
    compile_args += ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizer}"]
    link_args += [f"-fsanitize={sanitizer}"]
elif "-O" in os.environ.get("CFLAGS", ""):  # the builder's wish
    compile_args += ["-g0"]
else:
    compile_args += ["-O3", "-g0"]
if unobserved:
    macros += [("PAGEALLOC_UNOBSERVED", "1")]
if linetrace:
    DIRECTIVES |= {"linetrace": True}
    macros += [("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]


def extensions() -> list[Extension]:
    """One extension per ``.pyx``; all are rebuilt when a header or this file changes."""
    os.chdir(ROOT)  # setuptools wants paths relative to this file
    headers = sorted(str(path) for path in Path("pagealloc").rglob("*.h"))
    sources = {
        ".".join(source.with_suffix("").parts): source
        for source in sorted(Path("pagealloc").rglob("*.pyx"))
    }
    if platform.machine() not in ("x86_64", "AMD64"):
        sources = {name: source for name, source in sources.items() if name not in CPU_FLAGS}
    return [
        Extension(
            name,
            [str(source)],
            depends=["setup.py", *headers],
            include_dirs=sorted({"pagealloc/core", "pagealloc/include", str(source.parent)}),
            define_macros=list(macros),
            extra_compile_args=compile_args + CPU_FLAGS.get(name, []),
            extra_link_args=link_args,
        )
        for name, source in sources.items()
    ]


class Build(build):
    """Forget what an earlier build left of modules since removed, or the wheel ships them."""

    def run(self) -> None:
        built = Path(self.build_lib)
        for path in list(built.rglob("*")):
            stem = Path(path.parent.relative_to(built), path.name.partition(".")[0])
            is_extension = path.suffix in (".so", ".pyd")
            source = stem.with_suffix(".pyx") if is_extension else path.relative_to(built)
            if path.is_file() and not source.exists():
                path.unlink()
        super().run()


class BuildExt(build_ext):
    """Cython runs here rather than at the top: the sdist lists ``.pyx``, and needs no compiler.

    Nor does it need NumPy, whose headers are looked up here too.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self) -> None:
        import numpy as np
        from Cython.Build import cythonize

        for extension in self.extensions:
            if extension.name in NUMPY_MODULES:
                extension.include_dirs.append(np.get_include())
                extension.define_macros.extend(NUMPY_MACROS)
        generated = Path(self.build_temp, "cython")
        recipe_ns = (ROOT / "setup.py").stat().st_mtime_ns
        modules = cythonize(
            self.extensions,
            build_dir=str(generated),
            compiler_directives=DIRECTIVES,
            nthreads=os.cpu_count() or 1,
            force=any(c.stat().st_mtime_ns < recipe_ns for c in generated.rglob("*.c")),
        )
        c_files = {module.name: module.sources for module in modules}
        pyx_files = {extension.name: extension.sources for extension in self.extensions}
        for extension in self.extensions:
            extension.sources = c_files[extension.name]
        super().build_extensions()
        for extension in self.extensions:  # an editable build lists its sources after this
            extension.sources = pyx_files[extension.name]


setup(
    ext_modules=extensions(),
    cmdclass={"build": Build, "build_ext": BuildExt},
    options={"build": {"build_base": str(Path("build", flavour))}},
)
