// What response_logps.metal uses of Metal and CUDA lacks, for mx.fast.cuda_kernel. Address spaces
// are no macros here: launch.py takes them out.

#define METAL_FUNC __device__ __forceinline__
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fc00000)
#endif

using uint = unsigned int;

namespace metal {

namespace precise {
__device__ __forceinline__ float exp(float x) { return ::expf(x); }
__device__ __forceinline__ float log(float x) { return ::logf(x); }
__device__ __forceinline__ float tanh(float x) { return ::tanhf(x); }
}  // namespace precise

__device__ __forceinline__ float max(float a, float b) { return ::fmaxf(a, b); }

// Every lane takes part (the full mask): launch.py makes threadgroups of whole warps only.
__device__ __forceinline__ float simd_max(float x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    x = ::fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  }
  return x;
}

__device__ __forceinline__ float simd_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

enum class mem_flags { mem_threadgroup };
__device__ __forceinline__ void threadgroup_barrier(mem_flags) { __syncthreads(); }

}  // namespace metal
