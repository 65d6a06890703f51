// The running thread, and the problems reported so far.
#pragma once
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "host.h"

// Where the linker has put this library: its constants may be read, and addresses of the kernel are
// reported as offsets from the beginning.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[];

namespace metal_host {

constexpr size_t STACK_BYTES = 256 << 10;
enum class State { ready, at_operation, at_simdgroup_barrier, at_barrier, done };

// One thread of the kernel.
struct Fiber {
  char* stack;
  void* stack_pointer;
  State state;
  int thread, simdgroup;  // in the threadgroup
  CallSite site;            // where it waits
  int flags;              // of the barrier at which it waits
  alignas(MAX_VALUE) unsigned char value[MAX_VALUE];  // passed to a simd operation
  Attributes attributes;
};
Fiber* self = nullptr;               // the running one
const Triple* threadgroup = nullptr;  // the position of the running one

struct Report {
  char kind[32], message[400], file[64];
  int32_t line;     // 0: to be looked up from the offset
  uint64_t offset;  // of the instruction in this library; 0 if there is none
};
Report* reports;
int report_count, max_reports;
bool aborted;
void leave_kernel();  // does not return within a kernel

enum class Then { go_on, abort };
struct Where {
  const char* file;
  int line;
  void* instruction;
};
constexpr Where NOWHERE = {"", 0, nullptr};

// Whether a loop or another thread has reported the same before.
bool is_known(const Report& fresh) {
  for (int i = 0; i < report_count; i++) {
    const Report& other = reports[i];
    if (fresh.offset == other.offset && fresh.line == other.line &&
        !strcmp(fresh.kind, other.kind) && !strcmp(fresh.file, other.file))
      return true;
  }
  return false;
}

__attribute__((format(printf, 4, 5))) void report(const char* kind, Where where, Then then,
                                                  const char* format, ...) {
  Report r = {};
  snprintf(r.kind, sizeof r.kind, "%s", kind);
  snprintf(r.file, sizeof r.file, "%s", where.file);
  r.line = where.line;
  r.offset = where.instruction ? (char*)where.instruction - __ehdr_start : 0;
  if (!is_known(r) && report_count < max_reports) {
    va_list values;
    va_start(values, format);
    int n = vsnprintf(r.message, sizeof r.message / 2, format, values);
    va_end(values);
    n = n < int(sizeof r.message / 2) ? n : sizeof r.message / 2 - 1;
    if (threadgroup)
      n += snprintf(r.message + n, 64, " (threadgroup %u %u %u", threadgroup->x, threadgroup->y,
                    threadgroup->z);
    if (threadgroup && self) n += snprintf(r.message + n, 32, ", thread %d", self->thread);
    if (threadgroup) snprintf(r.message + n, 2, ")");
    reports[report_count++] = r;
  }
  if (then == Then::abort || report_count == max_reports) leave_kernel();
}

}  // namespace metal_host
