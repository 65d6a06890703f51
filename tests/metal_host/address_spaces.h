// What types.h has, for clang++ -fsyntax-only with address spaces that are part of a type: there
// the functions of a class take no object in an address space. Nothing here is executed.
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

// What address_spaces.py makes of float4(a, b, c, d), which clang does not know in C++.
template <class V, class... Items>
V msl_make(Items...);
// float[2][3] as the beginning of a declaration.
template <class T>
using msl_type = T;
