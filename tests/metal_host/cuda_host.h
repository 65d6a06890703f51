// The part of CUDA that kernels here use: executed behind g++, as types alone for Clang's CUDA mode,
// which tells functions of the device from those of the host.
#pragma once
#include "arrays.h"

typedef _Float16 half;

#ifdef __CUDA__
// As in CUDA: a macro called "device" would get in between.
#define __location__(a) __attribute__((a))
#define __device__ __location__(device)
#define __global__ __location__(global)
#define __shared__ __location__(shared)
#define __grid_constant__
#define MSL_THREADGROUP(name, ...) __shared__ msl_type<__VA_ARGS__> name
template <class T>
using msl_type = T;
struct uint3 {
  unsigned x, y, z;
};
#define CUDA_NUMBER(T)                 \
  struct T {                           \
    T() = default;                     \
    __device__ T(float);               \
    __device__ operator float() const; \
  };
CUDA_NUMBER(__half)
CUDA_NUMBER(__nv_bfloat16)
#else
#include "types.h"
#define __device__
#define __global__ __attribute__((noinline))
#define __grid_constant__
#define MSL_THREADGROUP(name, ...) auto& name = msl_threadgroup<__VA_ARGS__>(#name)
using __half = half;
using __nv_bfloat16 = bfloat;
using uint3 = metal_host::Triple;
#endif
#define __forceinline__ inline __attribute__((always_inline))

extern "C" __device__ float expf(float);
extern "C" __device__ float logf(float);
extern "C" __device__ float tanhf(float);
extern "C" __device__ float fmaxf(float, float);

__device__ inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }

#ifdef __CUDA__
__device__ float __shfl_xor_sync(unsigned mask, float x, int distance, int width = 32);
__device__ void __syncthreads();
#else
using metal_host::CallSite;
using metal_host::here;

// A lane that the mask does not name, or the value of a lane that is not there, is undefined.
MSL_UNCHECKED inline float __shfl_xor_sync(
    unsigned mask, float x, int distance, CallSite site = here("__shfl_xor_sync")) {
  const metal_host::Lanes& lanes = metal_host::exchange(&x, sizeof x, site);
  int lane = metal_host::this_lane() ^ distance;
  bool exists = lane >= 0 && lane < metal_host::SIMD_WIDTH && (lanes.active & mask) >> lane & 1;
  if (!exists || lanes.active & ~mask) {
    metal_host::report_absent_lane(site, lane);
    return x;
  }
  return *reinterpret_cast<const float*>(lanes.value[lane]);
}

// A barrier for shared and global memory.
inline void __syncthreads(CallSite site = here("__syncthreads")) {
  metal_host::threadgroup_barrier(1 | 2, site);
}
#endif

namespace mlx::core::cu {
// Shapes and strides are passed by value, in arrays for as many axes as MLX supports.
template <class T>
struct Sizes {
  T items[10];  // MAX_NDIM
  __device__ const T& operator[](int axis) const { return items[axis]; }
};
using Shape = Sizes<int32_t>;
using Strides = Sizes<int64_t>;
}  // namespace mlx::core::cu
