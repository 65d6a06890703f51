// Executes a compiled kernel: its grid, its buffers, and the calls that g++ adds to it.
//
// Kernels are compiled with the thread and undefined-behaviour sanitizers and linked with this file
// in place of their libraries: the functions that g++ makes them call are at the end.
#include <xmmintrin.h>

#include "threads.h"

namespace metal_host {

// --- the grid -------------------------------------------------------------------------------

uint32_t product(Triple t) { return t.x * t.y * t.z; }
uint32_t divided_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
Triple divided_up(Triple a, Triple b) {
  return {divided_up(a.x, b.x), divided_up(a.y, b.y), divided_up(a.z, b.z)};
}
Triple position(uint32_t index, Triple size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

void set_threads(Triple grid, Triple full, Triple group) {
  Triple first = {group.x * full.x, group.y * full.y, group.z * full.z};
  Triple size = {std::min(full.x, grid.x - first.x), std::min(full.y, grid.y - first.y),
                 std::min(full.z, grid.z - first.z)};
  thread_count = int(product(size));
  for (uint32_t i = 0; i < product(size); i++) {
    Triple in_group = position(i, size);
    fibers[i].thread = int(i);
    fibers[i].simdgroup = int(i) / SIMD_WIDTH;
    Attributes& a = fibers[i].attributes;
    a.grid_origin = {0, 0, 0};
    a.grid_size = a.threads_per_grid = grid;
    a.threadgroups_per_grid = divided_up(grid, full);
    a.threadgroup_position_in_grid = group;
    a.dispatch_threads_per_threadgroup = full;
    a.threads_per_threadgroup = size;
    a.thread_position_in_threadgroup = in_group;
    a.thread_position_in_grid = {first.x + in_group.x, first.y + in_group.y, first.z + in_group.z};
    a.thread_index_in_threadgroup = i;
    a.thread_execution_width = a.threads_per_simdgroup = SIMD_WIDTH;
    a.dispatch_simdgroups_per_threadgroup = divided_up(product(full), SIMD_WIDTH);
    a.simdgroups_per_threadgroup = divided_up(product(size), SIMD_WIDTH);
    a.simdgroup_index_in_threadgroup = i / SIMD_WIDTH;
    a.thread_index_in_simdgroup = i % SIMD_WIDTH;
    a.dispatch_quadgroups_per_threadgroup = divided_up(product(full), 4);
    a.quadgroups_per_threadgroup = divided_up(product(size), 4);
    a.quadgroup_index_in_threadgroup = i / 4;
    a.thread_index_in_quadgroup = i % 4;
  }
}

void run_grid(Triple grid, Triple group) {
  Triple groups = divided_up(grid, group);
  for (int index : ordered(int(product(groups)))) {
    set_threads(grid, group, position(uint32_t(index), groups));
    threadgroup = &fibers[0].attributes.threadgroup_position_in_grid;
    run_threadgroup();
    threadgroup = nullptr;
    if (aborted) return;
  }
}

// An argument of the kernel, as launch.py describes it.
struct Buffer {
  void* data;
  uint64_t bytes, item_bytes;
  int32_t writable, initialised;
  char name[64];
};

struct Launch {
  Triple grid, group;
  uint64_t seed, max_accesses;
  const Buffer* buffers;
  Report* reports;
  int32_t buffer_count, max_reports;
};

bool copy_buffers_in(const Launch& launch) {
  for (int i = 0; i < launch.buffer_count; i++) {
    const Buffer& b = launch.buffers[i];
    Region* region = add_region(b.name, b.bytes, b.item_bytes, DEVICE, b.writable);
    if (!region) return false;
    region->initialised = b.initialised;
    memcpy((void*)region->begin, b.data, b.bytes);
    kernel_buffers.push_back((void*)region->begin);
  }
  return true;
}

bool make_stacks() {
  if (fibers[0].stack) return true;
  void* stacks = mmap(nullptr, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return false;
  for (int i = 0; i < MAX_THREADS; i++) fibers[i].stack = (char*)stacks + i * STACK_BYTES;
  return true;
}

// Returns the number of reports, or -1 if there is not enough memory.
extern "C" __attribute__((visibility("default"))) int launch(const Launch* what) {
  seed = what->seed, max_accesses = what->max_accesses;
  reports = what->reports, max_reports = what->max_reports;
  generator.seed(seed);
  accesses = 0, report_count = 0, aborted = false;
  memset(clocks, 0, sizeof clocks);
  kernel_buffers.clear();
  bool memory = make_stacks() && copy_buffers_in(*what);
  if (memory) {
    unsigned control = _mm_getcsr();
    _mm_setcsr(control | 0x8040);  // denormals are zero, as they may be on a GPU
    run_grid(what->grid, what->group);
    _mm_setcsr(control);
    if (!aborted) check_all_written();
    for (int i = 0; i < what->buffer_count; i++)
      if (what->buffers[i].writable)
        memcpy(what->buffers[i].data, kernel_buffers[i], what->buffers[i].bytes);
  }
  remove_regions();
  return memory ? report_count : -1;
}

}  // namespace metal_host

// --- calls that g++ adds to a kernel --------------------------------------------------------

using metal_host::check_access;
using metal_host::report;

extern "C" {
void __tsan_init() {}
#define HOOKS(name, bytes)                                                      \
  void __tsan_##name##read##bytes(void* p) {                                    \
    check_access(p, bytes, false, __builtin_return_address(0));                 \
  }                                                                             \
  void __tsan_##name##write##bytes(void* p) {                                   \
    check_access(p, bytes, true, __builtin_return_address(0));                  \
  }
HOOKS(, 1) HOOKS(, 2) HOOKS(, 4) HOOKS(, 8) HOOKS(, 16)
HOOKS(unaligned_, 2) HOOKS(unaligned_, 4) HOOKS(unaligned_, 8) HOOKS(unaligned_, 16)
void __tsan_read_range(void* p, size_t bytes) {
  if (bytes) check_access(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  if (bytes) check_access(p, bytes, true, __builtin_return_address(0));
}

// All data that g++ passes begins with the location.
struct Location {
  const char* file;
  uint32_t line, column;
};
#define UNDEFINED(name, kind, message)                                                       \
  void __ubsan_handle_##name##_abort(Location* at) {                                         \
    report(kind, {at->file, int(at->line), nullptr}, metal_host::Then::abort, message);      \
  }
UNDEFINED(out_of_bounds, "out-of-bounds", "index outside of an array's declared size")
UNDEFINED(add_overflow, "overflow", "signed integer overflow in +")
UNDEFINED(sub_overflow, "overflow", "signed integer overflow in -")
UNDEFINED(mul_overflow, "overflow", "signed integer overflow in *")
UNDEFINED(negate_overflow, "overflow", "signed integer overflow in negation")
UNDEFINED(divrem_overflow, "undefined-behaviour", "integer division by zero, or overflow in it")
UNDEFINED(shift_out_of_bounds, "undefined-behaviour", "shift by a negative or too large count")
UNDEFINED(load_invalid_value, "undefined-behaviour", "a bool that is neither true nor false")
UNDEFINED(type_mismatch_v1, "undefined-behaviour", "null or misaligned pointer")
}
