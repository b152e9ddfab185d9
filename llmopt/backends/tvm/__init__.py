"""TVM: a shared library of our own kernels, for the processors that LLVM compiles for."""
