"""Executes custom Metal kernels on a Linux CPU, thread by thread, and checks every access.

Metal Shading Language is C++ with qualifiers, and MLX makes a kernel's text at run time. That text
is compiled by g++ instead, and the result is executed with real barriers. README.md says which bugs
are detected in this way and which are not. Read signature.py, build.py, kernel.py and launch.py in
this order, then runtime.cpp, threads.h and memory.h.
"""

from .build import MetalError, missing
from .kernel import metal_kernel, stand_in

__all__ = ["MetalError", "metal_kernel", "missing", "stand_in"]
