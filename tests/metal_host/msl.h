// The part of Metal's <metal_stdlib> that kernels here use, in C++17 for g++ on x86-64.
//
// It includes no mathematical header: ::exp or ::abs would join the overloads below and accept
// calls that are ambiguous in Metal. What is missing here does not compile, and is reported so.
#pragma once
#include "arrays.h"

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

#ifdef MSL_ADDRESS_SPACES
#include "address_spaces.h"
#else
#include "types.h"
#endif

#define __METAL__ 1
#define __METAL_VERSION__ 320
#define METAL_FUNC inline __attribute__((always_inline))

#undef INFINITY
#undef NAN
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define MAXFLOAT 3.40282347e+38f
#define FLT_MAX MAXFLOAT
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-07f
#define HALF_MAX ((half)65504.0f)
#define M_E_F 2.71828183f
#define M_PI_F 3.14159265f
#define M_LN2_F 0.693147181f
#define M_LOG2E_F 1.44269504f

constexpr half operator""h(long double value) { return half(value); }
constexpr bfloat operator""bf(long double value) { return bfloat(float(value)); }

// The names that MLX gives to its element types.
typedef half float16_t;
typedef bfloat bfloat16_t;

namespace metal {

using std::conditional_t;
using std::enable_if_t;
using std::is_integral_v;
using std::is_same_v;
template <class T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;

template <class T>
struct numeric_limits;
#define MSL_FLOAT_LIMITS(T, largest, step)                              \
  template <>                                                           \
  struct numeric_limits<T> {                                            \
    static constexpr T max() { return T(largest); }                     \
    static constexpr T lowest() { return T(-largest); }                 \
    static constexpr T infinity() { return T(INFINITY); }               \
    static constexpr T quiet_NaN() { return T(NAN); }                   \
    static constexpr T epsilon() { return T(step); }                    \
  };
MSL_FLOAT_LIMITS(float, 3.40282347e+38f, 1.1920929e-07f)
MSL_FLOAT_LIMITS(half, 65504.0f, 9.765625e-4f)
MSL_FLOAT_LIMITS(bfloat, 3.38953139e+38f, 7.8125e-3f)
#define MSL_INTEGER_LIMITS(T, smallest, largest)      \
  template <>                                         \
  struct numeric_limits<T> {                          \
    static constexpr T min() { return smallest; }     \
    static constexpr T lowest() { return smallest; }  \
    static constexpr T max() { return largest; }      \
  };
MSL_INTEGER_LIMITS(uchar, 0, 255)
MSL_INTEGER_LIMITS(int, -__INT_MAX__ - 1, __INT_MAX__)
MSL_INTEGER_LIMITS(uint, 0, ~0u)
MSL_INTEGER_LIMITS(long, -__LONG_MAX__ - 1, __LONG_MAX__)
MSL_INTEGER_LIMITS(ulong, 0, ~0ul)

#define MSL_VECTORS(T)       \
  using T##2 = vec<T, 2>;    \
  using T##3 = vec<T, 3>;    \
  using T##4 = vec<T, 4>;
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(bool)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)

}  // namespace metal

template <class To, class From>
constexpr To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, from);
}

namespace metal {
using ::as_type;

// --- mathematics ----------------------------------------------------------------------------
// One overload per type, so that max(float, int) is ambiguous, as it is in Metal.

#define MSL_UNARY(name, expression)                                       \
  inline float name(float x) { return expression; }                       \
  inline half name(half narrow) {                                         \
    float x = float(narrow);                                              \
    return half(expression);                                              \
  }                                                                       \
  inline bfloat name(bfloat narrow) {                                     \
    float x = float(narrow);                                              \
    return bfloat(float(expression));                                     \
  }                                                                       \
  template <class T, int N>                                               \
  vec<T, N> name(vec<T, N> v) {                                           \
    for (int i = 0; i < N; i++) v[i] = name(v[i]);                        \
    return v;                                                             \
  }
#define MSL_BINARY(name, expression)                                      \
  inline float name(float x, float y) { return expression; }              \
  inline half name(half a, half b) {                                      \
    float x = float(a), y = float(b);                                     \
    return half(expression);                                              \
  }                                                                       \
  inline bfloat name(bfloat a, bfloat b) {                                \
    float x = float(a), y = float(b);                                     \
    return bfloat(float(expression));                                     \
  }                                                                       \
  template <class T, int N>                                               \
  vec<T, N> name(vec<T, N> v, vec<T, N> w) {                              \
    for (int i = 0; i < N; i++) v[i] = name(v[i], w[i]);                  \
    return v;                                                             \
  }
MSL_UNARY(exp, __builtin_expf(x))
MSL_UNARY(exp2, __builtin_exp2f(x))
MSL_UNARY(exp10, __builtin_powf(10.0f, x))
MSL_UNARY(log, __builtin_logf(x))
MSL_UNARY(log2, __builtin_log2f(x))
MSL_UNARY(log10, __builtin_log10f(x))
MSL_UNARY(sqrt, __builtin_sqrtf(x))
MSL_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_UNARY(sin, __builtin_sinf(x))
MSL_UNARY(cos, __builtin_cosf(x))
MSL_UNARY(tanh, __builtin_tanhf(x))
MSL_UNARY(fabs, __builtin_fabsf(x))
MSL_UNARY(floor, __builtin_floorf(x))
MSL_UNARY(ceil, __builtin_ceilf(x))
MSL_UNARY(round, __builtin_roundf(x))
MSL_UNARY(rint, __builtin_rintf(x))
MSL_UNARY(trunc, __builtin_truncf(x))
MSL_UNARY(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f)
MSL_UNARY(abs, __builtin_fabsf(x))
MSL_BINARY(pow, __builtin_powf(x, y))
MSL_BINARY(fmod, __builtin_fmodf(x, y))
MSL_BINARY(fmin, __builtin_fminf(x, y))
MSL_BINARY(fmax, __builtin_fmaxf(x, y))
MSL_BINARY(min, __builtin_fminf(x, y))
MSL_BINARY(max, __builtin_fmaxf(x, y))
MSL_BINARY(copysign, __builtin_copysignf(x, y))
MSL_BINARY(divide, x / y)

#define MSL_OF_FLOATS(T)                                                                  \
  inline T fma(T a, T b, T c) { return T(__builtin_fmaf(float(a), float(b), float(c))); } \
  inline T clamp(T x, T least, T most) { return min(max(x, least), most); }               \
  inline bool isnan(T x) { return __builtin_isnan(float(x)); }                            \
  inline bool isinf(T x) { return __builtin_isinf(float(x)) != 0; }                       \
  inline bool isfinite(T x) { return __builtin_isfinite(float(x)); }
MSL_OF_FLOATS(float)
MSL_OF_FLOATS(half)
MSL_OF_FLOATS(bfloat)

#define MSL_OF_INTEGERS(T)                             \
  inline T min(T a, T b) { return b < a ? b : a; }     \
  inline T max(T a, T b) { return a < b ? b : a; }     \
  inline T clamp(T x, T least, T most) { return min(max(x, least), most); }
MSL_OF_INTEGERS(char)
MSL_OF_INTEGERS(uchar)
MSL_OF_INTEGERS(short)
MSL_OF_INTEGERS(ushort)
MSL_OF_INTEGERS(int)
MSL_OF_INTEGERS(uint)
MSL_OF_INTEGERS(long)
MSL_OF_INTEGERS(ulong)
inline int abs(int x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }

template <class T, int N>
constexpr T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum = sum + a[i] * b[i];
  return sum;
}
template <class T>
constexpr T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}

// The fast and precise variants of a GPU are the same here.
#define MSL_VARIANTS                                                                               \
  using metal::exp, metal::exp2, metal::exp10, metal::log, metal::log2, metal::log10, metal::sqrt, \
      metal::rsqrt, metal::sin, metal::cos, metal::tanh, metal::pow, metal::fabs, metal::floor,    \
      metal::ceil, metal::round, metal::rint, metal::trunc, metal::abs, metal::fmod, metal::fmin,  \
      metal::fmax, metal::min, metal::max, metal::divide, metal::fma, metal::clamp;
namespace fast {
MSL_VARIANTS
}
namespace precise {
MSL_VARIANTS
}

}  // namespace metal

#include "simd.h"

// As in MLX's own header, which precedes every custom kernel.
using namespace metal;

// --- keywords of the language: no includes after them ---------------------------------------

#ifdef MSL_ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define MSL_THREADGROUP(name, ...) static threadgroup msl_type<__VA_ARGS__> name
#else
#define device
#define constant
#define threadgroup
// Replaces "threadgroup float name[2][3];" (see build.py), with float[2][3] for the dots.
#define MSL_THREADGROUP(name, ...) auto& name = msl_threadgroup<__VA_ARGS__>(#name)
#endif
#define thread
#define kernel gnu::noinline

// What Metal does not have.
#pragma GCC poison double std new delete goto virtual throw try catch
#pragma GCC poison printf malloc free memcpy memset
