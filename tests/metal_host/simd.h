// Metal's barriers, and operations between the lanes of a simdgroup.
#pragma once

namespace metal {

// --- barriers -------------------------------------------------------------------------------

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

using metal_host::here;
using metal_host::CallSite;
inline void threadgroup_barrier(mem_flags flags, CallSite site = here("threadgroup_barrier")) {
  metal_host::threadgroup_barrier(int(flags), site);
}
inline void simdgroup_barrier(mem_flags flags, CallSite site = here("simdgroup_barrier")) {
  metal_host::simdgroup_barrier(int(flags), site);
}

// --- simdgroups -----------------------------------------------------------------------------

METAL_FUNC bool msl_active(const metal_host::Lanes& lanes, int lane) {
  return (lanes.active >> lane) & 1;
}
template <class T>
METAL_FUNC const T& msl_value(const metal_host::Lanes& lanes, int lane) {
  return *reinterpret_cast<const T*>(lanes.value[lane]);
}
template <class T>
METAL_FUNC const metal_host::Lanes& msl_exchange(const T& x, CallSite site) {
  static_assert(sizeof(T) <= metal_host::MAX_VALUE, "too large for a simd operation");
  return metal_host::exchange(&x, sizeof(T), site);
}

template <class T>
MSL_UNCHECKED T msl_from_lane(T x, int lane, CallSite site) {
  const metal_host::Lanes& lanes = msl_exchange(x, site);
  if (lane >= 0 && lane < metal_host::SIMD_WIDTH && msl_active(lanes, lane))
    return msl_value<T>(lanes, lane);
  metal_host::report_absent_lane(site, lane);
  return x;
}
// For shuffles that leave lanes at the edge unchanged.
template <class T>
MSL_UNCHECKED T msl_from_lane_or_own(T x, int lane, CallSite site) {
  bool outside = lane < 0 || lane >= metal_host::SIMD_WIDTH;
  return msl_from_lane(x, outside ? metal_host::this_lane() : lane, site);
}
// Reduces the active lanes in the order of a tree; all of them get the same result.
template <class T, class Operation>
MSL_UNCHECKED T msl_reduce(T x, Operation operation, CallSite site) {
  const metal_host::Lanes& lanes = msl_exchange(x, site);
  T partial[metal_host::SIMD_WIDTH];
  bool active[metal_host::SIMD_WIDTH];
  for (int i = 0; i < metal_host::SIMD_WIDTH; i++) {
    active[i] = msl_active(lanes, i);
    if (active[i]) partial[i] = msl_value<T>(lanes, i);
  }
  for (int half_of = metal_host::SIMD_WIDTH / 2; half_of; half_of /= 2)
    for (int i = 0; i < half_of; i++) {
      if (!active[i + half_of]) continue;
      T other = partial[i + half_of];
      partial[i] = active[i] ? static_cast<T>(operation(partial[i], other)) : other;
      active[i] = true;
    }
  return partial[0];
}

#define MSL_REDUCTION(name, expression)                                        \
  template <class T>                                                           \
  T name(T x, CallSite site = here(#name)) {                                   \
    return msl_reduce(x, [](T a, T b) { return expression; }, site);           \
  }
MSL_REDUCTION(simd_sum, a + b)
MSL_REDUCTION(simd_product, a * b)
MSL_REDUCTION(simd_max, max(a, b))
MSL_REDUCTION(simd_min, min(a, b))
MSL_REDUCTION(simd_and, a & b)
MSL_REDUCTION(simd_or, a | b)
MSL_REDUCTION(simd_xor, a ^ b)
inline bool simd_all(bool x, CallSite site = here("simd_all")) { return simd_and(int(x), site); }
inline bool simd_any(bool x, CallSite site = here("simd_any")) { return simd_or(int(x), site); }

#define MSL_SHUFFLE(name, take, lane)                                          \
  template <class T>                                                           \
  T name(T x, ushort n, CallSite site = here(#name)) {                         \
    int self = metal_host::this_lane();                                        \
    (void)self;                                                                \
    return take(x, lane, site);                                                \
  }
MSL_SHUFFLE(simd_shuffle, msl_from_lane, n)
MSL_SHUFFLE(simd_broadcast, msl_from_lane, n)
MSL_SHUFFLE(simd_shuffle_xor, msl_from_lane, self ^ n)
MSL_SHUFFLE(simd_shuffle_down, msl_from_lane_or_own, self + n)
MSL_SHUFFLE(simd_shuffle_up, msl_from_lane_or_own, self - n)
MSL_SHUFFLE(simd_shuffle_rotate_down, msl_from_lane, (self + n) % metal_host::SIMD_WIDTH)
MSL_SHUFFLE(simd_shuffle_rotate_up, msl_from_lane, (self - n) & (metal_host::SIMD_WIDTH - 1))
template <class T>
MSL_UNCHECKED T simd_broadcast_first(T x, CallSite site = here("simd_broadcast_first")) {
  const metal_host::Lanes& lanes = msl_exchange(x, site);
  return msl_value<T>(lanes, __builtin_ctz(lanes.active));
}

}  // namespace metal
