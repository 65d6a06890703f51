// In place of types.h, for Clang with address spaces as part of types: a class's functions do not
// take objects in an address space there. Nothing here is executed.
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

// Replaces float4(a, b, c, d), which Clang does not know in C++ (see address_spaces.py).
template <class V, class... Items>
V msl_make(Items...);
// Makes float[2][3] the beginning of a declaration.
template <class T>
using msl_type = T;

// The address space to which a pointer or reference leads: 0 is a thread's own, -1 none.
template <class T>
constexpr int msl_space = -1;
#define MSL_SPACE(number, space)             \
  template <class T>                         \
  constexpr int msl_space<T space*> = number; \
  template <class T>                         \
  constexpr int msl_space<T space&> = number;
MSL_SPACE(0, )
MSL_SPACE(1, __attribute__((address_space(1))))
MSL_SPACE(2, __attribute__((address_space(2))))
MSL_SPACE(3, __attribute__((address_space(3))))

// Replace (To)value, which for Clang may lead from any address space to any other; in Metal it must
// not.
template <class To, class From>
constexpr std::enable_if_t<
    msl_space<From> == msl_space<To> || msl_space<From> < 0 || msl_space<To> < 0, To>
msl_cast(From value) {
  return (To)value;
}
template <class To, class From>
constexpr std::enable_if_t<msl_space<From&> == msl_space<To>, To> msl_cast_reference(From& value) {
  return (To)value;
}
