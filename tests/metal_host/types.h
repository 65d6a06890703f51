// bfloat and vectors for g++, which has neither.
#pragma once

// --- bfloat: implicitly to float, only explicitly from float, as in Metal -------------------

template <class T>
using msl_if_integer = std::enable_if_t<std::is_integral<T>::value>;

struct bfloat {
  uint16_t bits;

  bfloat() = default;
  explicit constexpr bfloat(float value) : bits(rounded(value)) {}
  explicit constexpr bfloat(double value) : bits(rounded(float(value))) {}
  explicit constexpr bfloat(half value) : bits(rounded(float(value))) {}
  template <class T, class = msl_if_integer<T>>
  constexpr bfloat(T value) : bits(rounded(float(value))) {}

  constexpr operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
  constexpr bfloat operator-() const { return bfloat(-float(*this)); }

  // To the nearest, ties to even; NaN stays NaN.
  static constexpr uint16_t rounded(float value) {
    uint32_t word = __builtin_bit_cast(uint32_t, value);
    if ((word & 0x7fffffffu) > 0x7f800000u) return uint16_t((word >> 16) | 0x40u);
    return uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
  }
};

#define MSL_BFLOAT_OPERATOR(op)                                    \
  constexpr bfloat operator op(bfloat a, bfloat b) {               \
    return bfloat(float(a) op float(b));                           \
  }                                                                \
  template <class T, class = msl_if_integer<T>>                    \
  constexpr bfloat operator op(bfloat a, T b) {                    \
    return a op bfloat(b);                                         \
  }                                                                \
  template <class T, class = msl_if_integer<T>>                    \
  constexpr bfloat operator op(T a, bfloat b) {                    \
    return bfloat(a) op b;                                         \
  }                                                                \
  constexpr bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }
MSL_BFLOAT_OPERATOR(+)
MSL_BFLOAT_OPERATOR(-)
MSL_BFLOAT_OPERATOR(*)
MSL_BFLOAT_OPERATOR(/)

namespace metal {

// --- vectors --------------------------------------------------------------------------------

template <class T, int N>
struct vec_items;
template <class T>
struct vec_items<T, 2> {
  union {
    T items[2];
    struct { T x, y; };
  };
};
template <class T>
struct vec_items<T, 3> {
  union {
    T items[3];
    struct { T x, y, z; };
  };
};
template <class T>
struct vec_items<T, 4> {
  union {
    T items[4];
    struct { T x, y, z, w; };
  };
};

template <class T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec : vec_items<T, N> {
  using vec_items<T, N>::items;

  vec() = default;
  constexpr vec(T all) : vec_items<T, N>{} {
    for (int i = 0; i < N; i++) items[i] = all;
  }
  template <class... Items, class = std::enable_if_t<sizeof...(Items) == N>>
  constexpr vec(Items... each) : vec_items<T, N>{{{static_cast<T>(each)...}}} {}
  template <class From>
  explicit constexpr vec(const vec<From, N>& other) : vec_items<T, N>{} {
    for (int i = 0; i < N; i++) items[i] = static_cast<T>(other[i]);
  }

  constexpr T& operator[](int i) { return items[i]; }
  constexpr const T& operator[](int i) const { return items[i]; }
};

template <class T>
struct msl_same {
  using type = T;
};
// The type of a vector's elements, in a form from which no template argument is deduced, so that a
// number of another type beside the vector is converted.
template <class T>
using msl_item = typename msl_same<T>::type;

#define MSL_VECTOR_OPERATOR(op, Result)                                                       \
  template <class T, int N>                                                                   \
  constexpr vec<Result, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {              \
    vec<Result, N> result{};                                                                  \
    for (int i = 0; i < N; i++) result[i] = static_cast<Result>(a[i] op b[i]);                \
    return result;                                                                            \
  }                                                                                           \
  template <class T, int N>                                                                   \
  constexpr vec<Result, N> operator op(const vec<T, N>& a, msl_item<T> b) {                   \
    return a op vec<T, N>(b);                                                                 \
  }                                                                                           \
  template <class T, int N>                                                                   \
  constexpr vec<Result, N> operator op(msl_item<T> a, const vec<T, N>& b) {                   \
    return vec<T, N>(a) op b;                                                                 \
  }
#define MSL_VECTOR_ARITHMETIC(op)                            \
  MSL_VECTOR_OPERATOR(op, T)                                 \
  template <class T, int N, class Other>                     \
  constexpr vec<T, N>& operator op##=(vec<T, N>& a, const Other& b) { return a = a op b; }
MSL_VECTOR_ARITHMETIC(+)
MSL_VECTOR_ARITHMETIC(-)
MSL_VECTOR_ARITHMETIC(*)
MSL_VECTOR_ARITHMETIC(/)
MSL_VECTOR_OPERATOR(==, bool)
MSL_VECTOR_OPERATOR(!=, bool)
MSL_VECTOR_OPERATOR(<, bool)
MSL_VECTOR_OPERATOR(<=, bool)
MSL_VECTOR_OPERATOR(>, bool)
MSL_VECTOR_OPERATOR(>=, bool)

template <class T, int N>
constexpr vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = -a[i];
  return a;
}
template <int N>
constexpr bool any(const vec<bool, N>& v) {
  for (int i = 0; i < N; i++)
    if (v[i]) return true;
  return false;
}
template <int N>
constexpr bool all(const vec<bool, N>& v) {
  for (int i = 0; i < N; i++)
    if (!v[i]) return false;
  return true;
}

}  // namespace metal
