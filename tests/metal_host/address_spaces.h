// In place of types.h, for clang++ -fsyntax-only with address spaces as part of types: a class's
// functions do not take objects in an address space there. Nothing here is executed.
#pragma once

typedef __bf16 bfloat;

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
template <class V>
bool any(V);
template <class V>
bool all(V);
}  // namespace metal

// Replaces float4(a, b, c, d), which clang does not know in C++ (see address_spaces.py).
template <class V, class... Items>
V msl_make(Items...);
// Makes float[2][3] the beginning of a declaration.
template <class T>
using msl_type = T;
