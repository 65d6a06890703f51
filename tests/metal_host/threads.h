// The threads of a threadgroup, how they run and how they meet.
//
// Each thread is a fiber with a stack of its own that runs until it has to meet others: at a
// barrier or at a simd operation. The order of lanes, of simdgroups and of threadgroups follows
// from a seed; on a GPU it may be any.
#pragma once
#include <algorithm>
#include <random>

#include "memory.h"

// Saves the callee-saved registers on this stack and continues on another one.
extern "C" void switch_stack(void** old_stack_pointer, void* new_stack_pointer);
asm(R"(
.text
.globl switch_stack
.hidden switch_stack
.type switch_stack, @function
switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size switch_stack, .-switch_stack
)");

namespace metal_host {

std::vector<void*> kernel_buffers;
Fiber fibers[MAX_THREADS];
Lanes lanes_of[MAX_THREADS / SIMD_WIDTH];
int thread_count;  // in the running threadgroup: fewer at the edge of the grid
void* scheduler;   // its stack pointer while a fiber runs

// --- fibers ---------------------------------------------------------------------------------

void leave_fiber() {
  Fiber* leaving = self;
  switch_stack(&leaving->stack_pointer, scheduler);
}

void leave_kernel() {
  aborted = true;
  if (self) leave_fiber();  // never resumed
}

void fiber_main() {
  call_kernel(kernel_buffers.data(), self->attributes);
  self->state = State::done;
  leave_fiber();
}

// Makes the fiber's stack look as if it had been left just before fiber_main.
void begin(Fiber& fiber) {
  void** top = (void**)(fiber.stack + STACK_BYTES);
  *--top = nullptr;  // in place of a return address: keeps the stack aligned
  *--top = (void*)fiber_main;
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the registers of switch_stack
  fiber.stack_pointer = top;
  fiber.state = State::ready;
}

void resume(Fiber& fiber) {
  self = &fiber;
  switch_stack(&scheduler, fiber.stack_pointer);
  self = nullptr;
}

void wait(State state, CallSite site, int flags) {
  self->state = state, self->site = site, self->flags = flags;
  leave_fiber();
}

bool waits(const Fiber& fiber) {
  return fiber.state != State::ready && fiber.state != State::done;
}

bool same_site(const Fiber& a, const Fiber& b) {
  return a.site.line == b.site.line && !strcmp(a.site.file, b.site.file) &&
         !strcmp(a.site.function, b.site.function);
}

// --- what a kernel calls --------------------------------------------------------------------

const Lanes& exchange(const void* value, size_t bytes, CallSite site) {
  memcpy(self->value, value, bytes);
  wait(State::at_operation, site, 0);
  return lanes_of[self->simdgroup];
}

void simdgroup_barrier(int flags, CallSite site) { wait(State::at_simdgroup_barrier, site, flags); }

void threadgroup_barrier(int flags, CallSite site) { wait(State::at_barrier, site, flags); }

int this_lane() { return self->thread % SIMD_WIDTH; }

void report_absent_lane(CallSite site, int lane) {
  report("absent-lane", {site.file, site.line, nullptr}, Then::go_on,
         "%s in lane %d takes the value of lane %d, which does not exist", site.function,
         this_lane(), lane);
}

constexpr size_t THREADGROUP_MEMORY = 32 << 10;

void* threadgroup_array(const char* name, size_t bytes, size_t item_bytes, int line) {
  size_t total = bytes;
  for (const Region& region : regions) {
    if (region.space != THREADGROUP) continue;
    if (region.line == line && !strcmp(region.name, name)) return (void*)region.begin;
    total += region.end - region.begin;
  }
  Where where = {"source", line, nullptr};
  if (total > THREADGROUP_MEMORY)
    report("threadgroup-memory", where, Then::abort,
           "with '%s', the kernel uses %zu bytes of threadgroup memory; the limit is %zu", name,
           total, THREADGROUP_MEMORY);
  Region* region = add_region(name, bytes, item_bytes, THREADGROUP, true);
  if (!region) report("no-memory", where, Then::abort, "threadgroup array '%s'", name);
  region->line = line;
  return (void*)region->begin;
}

// --- meeting --------------------------------------------------------------------------------

uint64_t seed;
std::mt19937_64 generator;

// 0 … n-1 in the order of the seed: 0 forwards, 1 backwards, others at random.
std::vector<int> ordered(int n) {
  std::vector<int> order(n);
  for (int i = 0; i < n; i++) order[i] = seed == 1 ? n - 1 - i : i;
  if (seed > 1) std::shuffle(order.begin(), order.end(), generator);
  return order;
}

void report_divergence(const char* kind, const Fiber& a, const Fiber& b) {
  Where where = {a.site.file, a.site.line, nullptr};
  if (b.state == State::done)
    report(kind, where, Then::abort, "thread %d is at %s, thread %d has returned", a.thread,
           a.site.function, b.thread);
  else
    report(kind, where, Then::abort, "thread %d is at %s, thread %d is at %s in %s:%d", a.thread,
           a.site.function, b.thread, b.site.function, b.site.file, b.site.line);
}

// Lets the lanes of a simdgroup pass the simd operation or barrier at which they all wait. False if
// there is none: all have returned or wait at a barrier of the threadgroup.
bool meet_in_simdgroup(Fiber* lanes, int count) {
  Fiber* first = nullptr;
  for (Fiber* lane = lanes; lane < lanes + count && !first; lane++)
    if (waits(*lane) && lane->state != State::at_barrier) first = lane;
  if (!first) return false;
  bool barrier = first->state == State::at_simdgroup_barrier;
  Lanes& values = lanes_of[first->simdgroup];
  values.active = 0;
  for (int i = 0; i < count; i++) {
    // Threads that have returned are absent from operations; a barrier would wait for them forever.
    if (lanes[i].state == State::done ? barrier : !same_site(lanes[i], *first)) {
      report_divergence(barrier ? "divergent-barrier" : "divergent-simd", *first, lanes[i]);
      return false;
    }
    if (lanes[i].state == State::done) continue;
    values.active |= 1u << i;
    memcpy(values.value[i], lanes[i].value, MAX_VALUE);
    lanes[i].state = State::ready;
  }
  if (barrier)
    for (Space space : {DEVICE, THREADGROUP})
      if (first->flags & flag_of(space)) clocks[space].step[first->simdgroup]++;
  return true;
}

void run_simdgroup(int simdgroup) {
  Fiber* lanes = fibers + simdgroup * SIMD_WIDTH;
  int count = std::min(SIMD_WIDTH, thread_count - simdgroup * SIMD_WIDTH);
  do {
    for (int lane : ordered(count)) {
      if (lanes[lane].state == State::ready) resume(lanes[lane]);
      if (aborted) return;
    }
  } while (meet_in_simdgroup(lanes, count));
}

// Lets all threads pass the barrier at which they wait. False if all have returned.
bool meet_in_threadgroup() {
  Fiber* end = fibers + thread_count;
  Fiber* first = std::find_if(fibers, end, waits);
  if (first == end) return false;
  for (Fiber* fiber = fibers; fiber < end; fiber++) {
    if (fiber->state == State::done || !same_site(*fiber, *first)) {
      report_divergence("divergent-barrier", *first, *fiber);
      return false;
    }
    fiber->state = State::ready;
  }
  for (Space space : {DEVICE, THREADGROUP})
    if (first->flags & flag_of(space)) clocks[space].epoch++;
  return true;
}

void run_threadgroup() {
  for (Clock& clock : clocks) {
    clock.start = ++clock.epoch;
    std::fill(std::begin(clock.step), std::end(clock.step), 0);
  }
  for (int i = 0; i < thread_count; i++) begin(fibers[i]);
  int simdgroups = (thread_count + SIMD_WIDTH - 1) / SIMD_WIDTH;
  do {
    for (int simdgroup : ordered(simdgroups)) {
      run_simdgroup(simdgroup);
      if (aborted) return;
    }
  } while (meet_in_threadgroup());
}

}  // namespace metal_host
