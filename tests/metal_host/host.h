// The interface between a compiled kernel and the runtime that executes it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace metal_host {

constexpr int SIMD_WIDTH = 32;   // of every Apple GPU
constexpr int MAX_THREADS = 1024;  // in a threadgroup
constexpr int MAX_VALUE = 16;    // bytes that a lane can pass to the others: a float4

struct Triple {
  uint32_t x, y, z;
};

// The values of a kernel's [[attributes]] for one thread.
struct Attributes {
  Triple dispatch_threads_per_threadgroup, grid_origin, grid_size, thread_position_in_grid,
      thread_position_in_threadgroup, threadgroup_position_in_grid, threadgroups_per_grid,
      threads_per_grid, threads_per_threadgroup;
  uint32_t dispatch_quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup,
      quadgroup_index_in_threadgroup, quadgroups_per_threadgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup, thread_execution_width, thread_index_in_quadgroup,
      thread_index_in_simdgroup, thread_index_in_threadgroup, threads_per_simdgroup;
};

// A call in the kernel's text at which threads meet.
struct CallSite {
  const char* function;
  const char* file;
  int line;
};

// As the default of a last parameter: the line of the call.
constexpr CallSite here(const char* function, const char* file = __builtin_FILE(),
                     int line = __builtin_LINE()) {
  return {function, file, line};
}

// The values of a simdgroup's lanes at a simd operation. Bit i of `active`: lane i takes part.
struct Lanes {
  uint32_t active;
  alignas(MAX_VALUE) unsigned char value[SIMD_WIDTH][MAX_VALUE];
};

// --- of the runtime, called by the functions in msl.h ---------------------------------------

const Lanes& exchange(const void* value, size_t bytes, CallSite site);
void simdgroup_barrier(int flags, CallSite site);
void threadgroup_barrier(int flags, CallSite site);
// Returns the same array to all threads of a threadgroup.
void* threadgroup_array(const char* name, size_t bytes, size_t item_bytes, int line);
void report_absent_lane(CallSite site, int lane);
int this_lane();

// --- of the kernel, called by the runtime ---------------------------------------------------

void call_kernel(void* const* buffers, const Attributes& thread);

}  // namespace metal_host
